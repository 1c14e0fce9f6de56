"""The KV agent of one rank: lives in the process that owns the engine's KV memory, beside the engine's own threads.

One thread owns the transport and the local socket to the service. It polls while a read is open, here or at a peer,
and sleeps otherwise. The engine's forward thread only copies to and from the agent's buffers; it waits for nobody.
"""

import os
import selectors
import socket
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path
from threading import Event, Thread
from time import monotonic, sleep

import torch

from hexgen2.errors import ConfigError, TransferRefused
from hexgen2.kv import kernels
from hexgen2.kv.codec import to_wire
from hexgen2.kv.messages import (
    Close,
    Closed,
    Counts,
    Failed,
    Fetch,
    Hello,
    Loaded,
    Opened,
    OpenRecv,
    OpenSend,
    Piece,
    Quarantine,
    Ready,
    ToAgent,
    ToService,
    agent_reader,
    encode,
)
from hexgen2.kv.reads import CHECK_S
from hexgen2.kv.send_buffer import SendBuffer
from hexgen2.kv.staging import StagedKv, Staging
from hexgen2.kv.transport import Transport
from hexgen2.kv.wire import KvShape, PageLayout, RankSlice

log = getLogger(__name__)

#: ``put`` announces what it has once this much waits, but not more often than that: a word of it goes through five
#: threads until it is read. A step's rest follows with ``flush``.
ANNOUNCE_BYTES = 1 << 20
ANNOUNCE_S = 0.001
#: How long the thread sleeps between polls while a read of its own is open: latency against CPU.
POLL_S = 0.0002
#: And while peers may be reading from here, which moves their bytes by itself or needs us rarely. Five times the
#: polls cost five times as much of the core that the engine computes on.
SERVE_POLL_S = 0.001
START_TIMEOUT_S = 60.0
_RECEIVE_BYTES = 64 << 10
#: How long peers are helped with reads that are still open when a transfer is closed.
LINGER_S = 2.0


@dataclass(slots=True, eq=False)
class _Put:
    """On its way to be announced; on CUDA only once ``event`` has passed."""

    transfer_id: str
    layer: int
    chunk: int
    digests: torch.Tensor
    event: "torch.cuda.Event | None"


class KvAgent:
    """See the module. ``is_sending``, ``put``, ``flush``, ``staged`` and ``loaded`` are the engine's side."""

    def __init__(
        self,
        socket_path: Path,
        rank_slice: RankSlice,
        shape: KvShape,
        transports: Sequence[Transport],
        *,
        device: torch.device,
        send_bytes: int,
        staging_bytes: int,
        landing_bytes: int,
        stall_s: float,
    ) -> None:
        """Allocate and register the buffers, say hello at ``socket_path`` and start the thread.

        Raises:
            ConfigError: a buffer is too small for one page, the service does not answer, the transport cannot start.
        """
        self._layout = PageLayout(shape, rank_slice)
        for name, size, least in (
            ("send_bytes", send_bytes, self._layout.page_bytes if send_bytes else 0),
            ("staging_bytes", staging_bytes, self._layout.page_bytes if staging_bytes else 0),
            ("landing_bytes", landing_bytes, self._layout.slot_bytes if staging_bytes else 0),
        ):
            if size < least:
                raise ConfigError(f"kv.{name} is {size}; this model needs at least {least} per rank")
        if device.type == "cpu":
            kernels.prepare()
        self._transports = tuple(transports)
        self._device = device
        self._send = SendBuffer(self._layout, send_bytes, device)
        self._staging = Staging(
            self._layout,
            transports,
            device,
            staging_bytes=staging_bytes,
            landing_bytes=landing_bytes if staging_bytes else 0,
            stall_s=stall_s,
            wake=self._wake,
        )
        self._socket_path = socket_path
        self._puts: deque[_Put] = deque()
        self._put_bytes = 0
        self._announced_at = 0.0
        self._outbox: deque[ToService] = deque()
        self._closing: set[str] = set()
        self._quarantine = 0
        self._serve_until = 0.0
        self._stopping = False
        self._wake_out, self._wake_in = socket.socketpair()
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)
        self._ready = Event()
        self._error: Exception | None = None
        self._thread = Thread(target=self._main, name="kv-agent", daemon=True)
        self._thread.start()
        if not self._ready.wait(START_TIMEOUT_S):
            raise ConfigError(f"KV agent did not start within {START_TIMEOUT_S:.0f} s")
        if self._error is not None:
            raise ConfigError(f"KV agent did not start: {self._error}") from self._error

    # The engine's side.

    def is_sending(self, transfer_id: str) -> bool:
        """Whether a send buffer is held for the transfer. False once it was aborted: skip the work."""
        return transfer_id in self._send

    def put(self, transfer_id: str, layer: int, chunk: int, piece: torch.Tensor) -> None:
        """Copy one layer of consecutive chunks, ``[kv_head, 2, tokens, head_dim]``, ``chunk`` the first, to the send
        buffer and digest it there. All chunks are full but the prompt's last.

        On CUDA the work is queued on the current stream. Transfers that are not held are ignored.
        """
        digests = self._send.put(transfer_id, layer, chunk, piece)
        if digests is None:
            return
        event = None
        if digests.is_cuda:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        self._puts.append(_Put(transfer_id, layer, chunk, digests, event))
        self._put_bytes += piece.numel() * piece.element_size()
        if self._put_bytes >= ANNOUNCE_BYTES and monotonic() - self._announced_at >= ANNOUNCE_S:
            self.flush()

    def flush(self) -> None:
        """Announce everything put so far."""
        if self._put_bytes:
            self._put_bytes = 0
            self._announced_at = monotonic()
            self._wake()

    def staged(self, transfer_id: str) -> StagedKv | None:
        """The verified KV to load, or None when the transfer was given up. Then ``loaded`` or ``not_loaded``."""
        return self._staging.staged(transfer_id)

    def loaded(self, transfer_id: str) -> None:
        """Tell the service that the KV is in the engine's own blocks."""
        self._staging.unpin(transfer_id)
        self._outbox.append(Loaded(transfer_id))
        self._wake()

    def not_loaded(self, transfer_id: str) -> None:
        """What ``staged`` gave was of no use: let it go without a word to the service."""
        self._staging.unpin(transfer_id)
        self._wake()

    def close(self) -> None:
        """Stop the thread and free the buffers. Idempotent."""
        self._stopping = True
        self._wake()
        self._thread.join(timeout=10.0)

    # The agent's thread.

    def _wake(self) -> None:
        # A full pipe already wakes; a closed one has nobody left to wake.
        with suppress(BlockingIOError, OSError):
            self._wake_in.send(b"\0")

    def _main(self) -> None:
        try:
            self._serve()
        except Exception as error:
            # The top of a thread. The service sees the socket close and takes the replica out of service.
            self._error = error
            if self._ready.is_set():
                log.exception("KV agent stopped")
        finally:
            self._ready.set()
            self._staging.stop()
            for transport in self._transports:
                transport.close()
            self._wake_out.close()
            self._wake_in.close()

    def _serve(self) -> None:
        for transport in self._transports:
            transport.register(
                self._send.buffer if self._send.num_pages else None,
                self._staging.reads.reachable(transport) if self._staging.num_pages else None,
            )
        reader = agent_reader()
        with socket.socket(socket.AF_UNIX) as service, selectors.DefaultSelector() as selector:
            service.settimeout(START_TIMEOUT_S)
            service.connect(str(self._socket_path))
            self._outbox.append(
                Hello(
                    slice=self._layout.slice,
                    shape=self._layout.shape,
                    send_pages=self._send.num_pages,
                    staging_pages=self._staging.num_pages,
                    page_bytes=self._layout.page_bytes,
                    endpoints=tuple(transport.endpoint() for transport in self._transports),
                    transport=self._transports[0].name,
                    transport_detail=self._transports[0].describe(),
                    pid=os.getpid(),
                )
            )
            selector.register(service, selectors.EVENT_READ)
            selector.register(self._wake_out, selectors.EVENT_READ)
            for transport in self._transports:
                for fd in transport.selectable():
                    selector.register(fd, selectors.EVENT_READ)
            while not self._stopping:
                self._drain(service)
                self._ready.set()
                serving = self._send.num_open > 0 or monotonic() < self._serve_until
                for transport in self._transports:
                    transport.serving(serving)
                poll = bool(self._puts) or any(transport.needs_poll() for transport in self._transports)
                moved = self._staging.reads.moved
                wait_s = CHECK_S if self._staging.reads.busy else None
                events = selector.select(0 if poll or moved else wait_s)
                if poll and not events and not moved:
                    sleep(POLL_S if self._staging.reads.num_open or self._puts else SERVE_POLL_S)
                for key, _ in events:
                    if key.fileobj is self._wake_out:
                        self._wake_out.recv(4096)
                    elif key.fileobj is service:
                        data = service.recv(_RECEIVE_BYTES)
                        if not data:
                            return
                        for message in reader.feed(data):
                            self._handle(message)
                self._outbox.extend(self._staging.turn())
                self._announce()
                self._retry_closing()
                self._report_quarantine()
                self._report_handshakes()

    def _drain(self, service: socket.socket) -> None:
        while self._outbox:
            service.sendall(encode(self._outbox.popleft()))

    def _handle(self, message: ToAgent) -> None:
        match message:
            case OpenSend():
                self._send.open(message.transfer_id, message.token, message.num_tokens, message.codec, message.pages)
                self._outbox.append(Opened(message.transfer_id))
            case OpenRecv():
                try:
                    self._staging.open(message)
                except TransferRefused as error:
                    self._outbox.append(Failed(message.transfer_id, "invalid", str(error)))
                self._outbox.append(Opened(message.transfer_id))
            case Fetch():
                self._staging.fetch(message.transfer_id, message.pieces)
            case Close():
                if message.transfer_id in self._send:
                    # The reader may have gone in the middle of a read, which ends only with our help.
                    self._serve_until = monotonic() + LINGER_S
                self._send.close(message.transfer_id)
                self._closing.add(message.transfer_id)

    def _announce(self) -> None:
        pieces: dict[str, list[Piece]] = {}
        rank, num_heads = self._layout.slice.rank, self._layout.slice.num_kv_heads
        while self._puts and (self._puts[0].event is None or self._puts[0].event.query()):  # type: ignore[no-untyped-call]
            put = self._puts.popleft()
            ready = pieces.setdefault(put.transfer_id, [])
            digests = to_wire(put.digests)
            last = ready[-1] if ready else None
            if last is not None and (last.layer, last.end(num_heads)) == (put.layer, put.chunk):
                ready[-1] = Piece(rank, put.layer, last.chunk, last.digests + digests)
            else:
                ready.append(Piece(rank, put.layer, put.chunk, digests))
        self._outbox.extend(Ready(transfer_id, tuple(ready)) for transfer_id, ready in pieces.items())

    def _retry_closing(self) -> None:
        for transfer_id in [t for t in self._closing if self._staging.close(t)]:
            self._closing.discard(transfer_id)
            self._outbox.append(Closed(transfer_id))

    def _report_quarantine(self) -> None:
        num_bytes = self._staging.reads.quarantine_bytes
        if num_bytes != self._quarantine:
            self._quarantine = num_bytes
            self._outbox.append(Quarantine(num_bytes))

    def _report_handshakes(self) -> None:
        failed = sum(transport.failed_handshakes() for transport in self._transports)
        if failed:
            self._outbox.append(Counts((("kv_handshakes_failed", failed),)))


def count(socket_path: Path, values: tuple[tuple[str, int], ...]) -> None:
    """Add to the service's counters from a process that has no agent (vLLM's scheduler); never fails its caller."""
    with suppress(OSError), socket.socket(socket.AF_UNIX) as service:
        service.settimeout(1.0)
        service.connect(str(socket_path))
        service.sendall(encode(Counts(values)))
