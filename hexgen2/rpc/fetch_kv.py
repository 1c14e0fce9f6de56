"""The FetchKv client of decode workers: one channel per prefill address, a bounded number of them."""

from collections import OrderedDict
from collections.abc import AsyncGenerator

import grpc

from hexgen2.errors import Unavailable
from hexgen2.kv.handoff import FetchMessage
from hexgen2.rpc.client import channel, to_error, trace_metadata
from hexgen2.rpc.kv_convert import first_token_from_proto, offer_from_proto, pieces_from_proto
from hexgen2.security.tls import TlsFiles
from hexgen2.v1 import prefill_pb2, prefill_pb2_grpc
from hexgen2.worker.receive import RemoteKv

#: The Decode call's own deadline is shorter; this bounds callers that set none.
MAX_FETCH_S = 3600.0
MAX_CHANNELS = 256


class KvClient:
    """Reads transfers from prefill replicas."""

    def __init__(self, tls: TlsFiles | None = None) -> None:
        self._tls = tls
        self._channels: OrderedDict[str, grpc.aio.Channel] = OrderedDict()
        self._in_use: dict[str, int] = {}

    async def fetch(self, remote: RemoteKv, resume: bool) -> AsyncGenerator[FetchMessage, None]:
        """Messages of one FetchKv call; closing the iterator cancels the call.

        Raises:
            HexgenError: as the peer raised it; Unavailable when it is gone.
        """
        address = remote.prefill_address
        stub = prefill_pb2_grpc.PrefillStub(await self._channel(address))
        request = prefill_pb2.FetchKvRequest(transfer_id=remote.transfer_id, token=remote.token, resume=resume)
        self._in_use[address] = self._in_use.get(address, 0) + 1
        call = stub.FetchKv(request, metadata=trace_metadata(), timeout=MAX_FETCH_S)
        try:
            async for response in call:
                match response.WhichOneof("event"):
                    case "header":
                        yield offer_from_proto(response.header)
                    case "pieces":
                        yield pieces_from_proto(response.pieces)
                    case "first_token":
                        yield first_token_from_proto(response.first_token)
        except grpc.aio.AioRpcError as error:
            raise to_error(error) from None
        finally:
            call.cancel()
            self._in_use[address] -= 1

    async def close(self) -> None:
        """Close all channels."""
        for each in self._channels.values():
            await each.close()
        self._channels.clear()

    async def _channel(self, address: str) -> grpc.aio.Channel:
        found = self._channels.get(address)
        if found is None:
            idle = next((a for a in self._channels if not self._in_use.get(a)), None)
            if len(self._channels) >= MAX_CHANNELS and idle is None:
                raise Unavailable(f"transfers from {MAX_CHANNELS} prefill replicas are under way")
            found = self._channels[address] = channel(address, self._tls)
            if len(self._channels) > MAX_CHANNELS and idle is not None:
                self._in_use.pop(idle, None)
                await self._channels.pop(idle).close()
        else:
            self._channels.move_to_end(address)
        return found
