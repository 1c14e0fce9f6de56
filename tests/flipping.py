"""Somebody between two ends of a TCP connection who turns over one bit."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Flipper:
    """Hands on what comes, but once turns over the first bit of byte ``at`` of what the server sends."""

    def __init__(self, host: str, port: int) -> None:
        self.at: int | None = None
        self.flipped = 0
        self.port = 0
        self._host, self._port = host, port

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Flipper"]:
        tasks: set[asyncio.Task[None]] = set()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            tasks.add(task)
            try:
                to = await asyncio.open_connection(self._host, self._port)
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._hand_on(reader, to[1], flip=False))
                    group.create_task(self._hand_on(to[0], writer, flip=True))
            except* OSError:
                pass
            finally:
                writer.close()
                to[1].close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _hand_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, flip: bool) -> None:
        passed = 0
        while data := bytearray(await reader.read(1 << 16)):
            if flip and self.at is not None and passed <= self.at < passed + len(data):
                data[self.at - passed] ^= 1
                self.flipped += 1
                self.at = None
            passed += len(data)
            writer.write(data)
            await writer.drain()
        writer.close()
