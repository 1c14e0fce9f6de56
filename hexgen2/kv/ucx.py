"""UcxTransport: KV reads by UCX through NIXL: RDMA, CUDA, shared memory or TCP, whatever UCX finds between two ranks.

What was measured about NIXL 1.5.1, and what follows from it here:

* Releasing the handle of a READ in flight, or removing its peer, returns at once and without an error, yet the READ
  goes on to write our memory. So a handle is released only when its READ is over, and a peer is removed only when no
  READ of it is open. A peer that is stopped keeps its READs open until it goes on or dies.
* A peer that dies ends its READs with an error within 0.1 s on one machine, between two when the connection breaks.
* Without its progress thread (which spins a core) nothing moves unless somebody calls, and UCX cannot wake a sleeper:
  both ends must poll. The end that is read from must do so while a connection is made, and over TCP all the time.
* Over TCP and over plain shared memory a READ is emulated by the peer, and there UCX aborts the process that is read
  from if the reader dies between asking and the first byte of the answer (``ucp_request.inl: unexpected error``). With
  RDMA, CUDA IPC and CMA (processes of one machine) the peer has no part in a READ, and no such risk. Between machines
  without RDMA, TcpTransport is the better choice. ``close`` waits a moment for open READs for the same reason.
* UCX over TCP lets whoever can connect address any memory: on loopback it is bound to ``lo``; elsewhere set
  ``UCX_NET_DEVICES`` to a private network.
"""

import os
import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from logging import WARNING, getLogger
from pathlib import Path
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import numpy as np

from hexgen2.address import is_loopback
from hexgen2.errors import ConfigError
from hexgen2.kv.transport import Span, TransportError, check_spans, merged
from hexgen2.kv.ucx_log import ucx_logged

if TYPE_CHECKING:
    import torch

#: One package per CUDA version; all have the same interface.
NIXL_MODULES = ("nixl", "nixl_cu12", "nixl_cu13")
# Idle peers beyond this are forgotten, oldest first: peers that were restarted leave endpoints behind.
_MAX_PEERS = 256
_BACKENDS = ["UCX"]
# How long ``close`` waits for open reads.
_CLOSE_S = 1.0


class _Endpoint(msgspec.Struct, frozen=True, array_like=True, tag="hexgen2-ucx-1"):
    """A registered send buffer; ``metadata`` is NIXL's, with the agent's name, its addresses and remote keys."""

    metadata: bytes
    base: int
    num_bytes: int
    memory: Literal["DRAM", "VRAM"]
    device: int


@dataclass(slots=True)
class _Peer:
    name: str
    endpoint: _Endpoint
    num_open: int = 0
    lost: bool = False
    #: Whether a read is over, so that UCX has told what carries them.
    known: bool = False


@dataclass(slots=True)
class _Read:
    peer: bytes  # its endpoint, packed
    transfer: Any  # NIXL's handle
    error: TransportError | None = None  # failed, but NIXL would not release it yet


class UcxTransport:
    """See the module and ``transport.Transport``.

    Args:
        host: address of this rank's KV plane. On loopback UCX is bound to the loopback interface, unless
            ``UCX_NET_DEVICES`` says otherwise; elsewhere the choice is UCX's own.
        device: a network device as UCX calls it (``mlx5_0:1``, ``eth0``), to use no other: where a rank has several,
            each is a way of its own. Empty: as above.
    """

    name = "ucx"

    def __init__(self, host: str = "127.0.0.1", device: str = "") -> None:
        self.local = device or host
        _prepare_environment(host)
        self._read_path: str | None = None
        # A device may write what is registered: memory that is to stay as it is shall not be.
        self.direct_read_bytes = 0 if has_rdma() else 16 << 20
        with ucx_logged() as self._log:
            api, self._errors, self._lost, self._version = _load_nixl()
            # The name is new in every process, so that no peer takes a restarted one for its predecessor.
            self._agent: Any = api.nixl_agent(
                f"hexgen2-{os.getpid()}-{secrets.token_hex(8)}",
                api.nixl_agent_config(enable_prog_thread=False, backends=[]),
            )
            try:
                self._agent.create_backend("UCX", {"ucx_devices": device} if device else {})
            except self._errors as error:
                raise ConfigError(f"kv.transport: UCX does not start on {device or 'any device'}: {error}") from error
        self._registered: list[tuple[Any, torch.Tensor]] = []  # NIXL's descriptors keep no memory alive
        self._endpoint = b""
        self._landing: torch.Tensor | None = None
        self._peers: dict[bytes, _Peer] = {}  # oldest use first
        self._reads: dict[int, _Read] = {}
        self._over: list[tuple[int, TransportError | None]] = []
        self._next_handle = 0
        self._serving = False

    def register(self, send: "torch.Tensor | None", landing: "torch.Tensor | None") -> None:
        """Pin and map both buffers, in host or device memory."""
        for name, buffer in (("send", send), ("landing", landing)):
            if buffer is not None:
                try:
                    self._registered.append((self._agent.register_memory(buffer, backends=_BACKENDS), buffer))
                except self._errors as error:
                    raise ConfigError(
                        f"kv: UCX cannot register the {name} buffer of {buffer.numel()} bytes: {error}"
                    ) from error
        self._landing = landing
        if send is not None:
            memory, device = _place(send)
            endpoint = _Endpoint(self._agent.get_agent_metadata(), send.data_ptr(), send.numel(), memory, device)
            self._endpoint = msgspec.msgpack.encode(endpoint)

    def endpoint(self) -> bytes:
        """Addresses and keys of our send buffer. Whoever has it can read that: it travels like a secret."""
        return self._endpoint

    def describe(self) -> str:
        """For people: what carries our reads, as UCX tells after the first; until then what it may choose from."""
        if self._read_path is not None:
            return f"ucx ({self._read_path})"
        transports, devices = os.environ.get("UCX_TLS", "all"), os.environ.get("UCX_NET_DEVICES", "all")
        return f"ucx (NIXL {self._version}, transports {transports}, devices {devices})"

    def read(self, endpoint: bytes, spans: Sequence[Span]) -> int:
        """Post a read, greeting the peer first where it is new. In shared memory it is over on return."""
        landing = self._landing
        peer = self._peer(endpoint)
        check_spans(spans, peer.endpoint.num_bytes, 0 if landing is None else landing.numel())
        self._next_handle += 1
        spans = merged(spans)
        if not spans or landing is None:
            self._over.append((self._next_handle, None))
            return self._next_handle
        ours = [(landing.data_ptr() + s.local_offset, s.num_bytes) for s in spans]
        theirs = [(peer.endpoint.base + s.remote_offset, s.num_bytes) for s in spans]
        try:
            transfer = self._agent.initialize_xfer(
                "READ",
                self._descriptors(ours, *_place(landing)),
                self._descriptors(theirs, peer.endpoint.memory, peer.endpoint.device),
                peer.name,
                backends=_BACKENDS,
            )
            state = self._agent.transfer(transfer)
        except self._errors as error:
            peer.lost = peer.lost or isinstance(error, self._lost)
            self._forget_if_lost(endpoint)
            raise TransportError(f"ucx: the read cannot be posted: {error}") from error
        self._reads[self._next_handle] = _Read(endpoint, transfer)
        peer.num_open += 1
        if state != "PROC":
            self._settle(self._next_handle, state)
        return self._next_handle

    def poll(self) -> Sequence[tuple[int, TransportError | None]]:
        """Let UCX progress and look at every open read."""
        self._agent.get_new_notifs()
        for handle, read in list(self._reads.items()):
            try:
                state = "ERR" if read.error is not None else self._agent.check_xfer_state(read.transfer)
            except self._errors as error:
                self._peers[read.peer].lost |= isinstance(error, self._lost)
                read.error = TransportError(f"ucx: the read failed: {error}")
                state = "ERR"
            if state != "PROC":
                self._settle(handle, state)
        over, self._over = self._over, []
        return over

    def is_direct(self, endpoint: bytes) -> bool:
        """Where the kernel copies from the peer's memory, which it does as we poll."""
        peer = self._peers.get(endpoint)
        return self.direct_read_bytes > 0 and peer is not None and peer.known and self._log.is_local

    def revoke(self, handle: int) -> bool:
        """See the module: it goes on to write."""
        return False

    def landed_bytes(self, handle: int) -> int:
        """UCX does not tell."""
        return 0

    def cut(self, endpoint: bytes) -> None:
        """Nothing to do: a READ cannot be called back, see the module."""

    def serving(self, active: bool) -> None:
        """While True ``poll`` must be called, so that peers' connections and reads make progress."""
        self._serving = active

    def needs_poll(self) -> bool:
        """While our reads are open, or peers may be reading."""
        return self._serving or bool(self._reads) or bool(self._over)

    def failed_handshakes(self) -> int:
        """UCX shakes no hands."""
        return 0

    def selectable(self) -> Sequence[int]:
        """None: UCX cannot wake a sleeper here."""
        return ()

    def close(self) -> None:
        """Release everything. UCX's connections end with the agent, and with them whatever was still in flight."""
        if self._agent is None:
            return
        end = monotonic() + _CLOSE_S
        while self._reads and monotonic() < end:
            self.poll()
            sleep(0.0002)
        agent, self._agent = self._agent, None
        for read in self._reads.values():
            self._quietly(read.transfer.release)
        for peer in self._peers.values():
            self._quietly(agent.remove_remote_agent, peer.name)
        for registered, _ in self._registered:
            self._quietly(agent.deregister_memory, registered)
        self._reads.clear()
        self._peers.clear()
        self._registered.clear()
        self._landing = None

    def _peer(self, packed: bytes) -> _Peer:
        peer = self._peers.pop(packed, None)
        if peer is None:
            try:
                endpoint = msgspec.msgpack.decode(packed, type=_Endpoint)
            except msgspec.DecodeError as error:
                raise TransportError(f"ucx: the peer's endpoint is of another transport or version: {error}") from error
            end = endpoint.base + endpoint.num_bytes
            if not (0 <= endpoint.base <= end < 1 << 63 and 0 <= endpoint.device < 1 << 16):
                raise TransportError("ucx: the peer's endpoint names memory that cannot be")
            self._forget_idle()
            try:
                name = self._agent.add_remote_agent(endpoint.metadata).decode()
            except UnicodeDecodeError as error:
                raise TransportError("ucx: the peer's endpoint is malformed") from error
            except self._errors as error:
                raise TransportError(f"ucx: the peer cannot be reached: {error}") from error
            peer = _Peer(name, endpoint)
            # Another peer may be reached in another way.
            self._read_path = None
        self._peers[packed] = peer  # last in the order of use
        if peer.lost:
            raise TransportError("ucx: the peer is lost; reads of it are still ending")
        return peer

    def _descriptors(self, ranges: Sequence[tuple[int, int]], memory: str, device: int) -> Any:
        rows = np.array([(address, length, device) for address, length in ranges], dtype=np.uint64)
        return self._agent.get_xfer_descs(rows, memory)

    def _settle(self, handle: int, state: str) -> None:
        """Report a read that is done or failed, once NIXL lets go of it."""
        read = self._reads[handle]
        if state != "DONE" and read.error is None:
            read.error = TransportError("ucx: the read failed")
        try:
            read.transfer.release()
        except self._errors as error:
            read.error = read.error or TransportError(f"ucx: the read's handle cannot be released: {error}")
            return
        del self._reads[handle]
        peer = self._peers[read.peer]
        peer.num_open -= 1
        if not peer.known or read.error is not None:
            self._read_path = self._log.read_path()
            peer.known = read.error is None
        self._over.append((handle, read.error))
        self._forget_if_lost(read.peer)

    def _forget_if_lost(self, packed: bytes) -> None:
        peer = self._peers[packed]
        if peer.lost and not peer.num_open:
            del self._peers[packed]
            self._quietly(self._agent.remove_remote_agent, peer.name)

    def _forget_idle(self) -> None:
        excess = len(self._peers) - _MAX_PEERS + 1
        for packed in [packed for packed, peer in self._peers.items() if not peer.num_open][: max(0, excess)]:
            self._quietly(self._agent.remove_remote_agent, self._peers.pop(packed).name)

    def _quietly(self, release: Callable[..., object], *args: object) -> None:
        """Let go of something that NIXL may have let go of already."""
        with suppress(*self._errors):
            release(*args)


def _place(buffer: "torch.Tensor") -> tuple[Literal["DRAM", "VRAM"], int]:
    """NIXL's memory type and device number."""
    return ("DRAM", 0) if buffer.device.type == "cpu" else ("VRAM", buffer.get_device())


def _prepare_environment(host: str) -> None:
    """Settings that UCX reads when it starts; what the user has set stays."""
    if not has_rdma():
        # UCX's InfiniBand module crashes the process at exit where there is nothing for it.
        os.environ.setdefault("UCX_MODULES", "^ib")
    if is_loopback(host) and Path("/sys/class/net/lo").exists():
        os.environ.setdefault("UCX_NET_DEVICES", "lo")


def has_rdma() -> bool:
    """Whether this machine has an RDMA device (InfiniBand, RoCE, EFA)."""
    return bool(rdma_devices())


def rdma_devices() -> list[str]:
    """This machine's RDMA devices, as UCX calls them but for the port (``mlx5_0``)."""
    return _names(Path("/sys/class/infiniband"))


def network_interfaces() -> list[str]:
    """What UCX could open TCP connections on."""
    return _names(Path("/sys/class/net"))


def _names(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir()) if folder.is_dir() else []


def _load_nixl() -> tuple[Any, tuple[type[Exception], ...], type[Exception], str]:
    """NIXL's interface, its exceptions (they have no common base), the one for a lost peer, and its version."""
    module = next((name for name in NIXL_MODULES if find_spec(name)), None)
    if module is None:
        raise ConfigError("kv.transport: ucx needs NIXL; install nixl-cu12 (or nixl-cu13), or choose tcp")
    try:
        api = import_module(f"{module}._api")
        bindings: Any = api.nixlBind
    except ImportError as error:
        raise ConfigError(f"kv.transport: ucx needs NIXL, which cannot be loaded: {error}; choose tcp") from error
    # NIXL configures a logger that writes to stdout, where answers of commands go.
    log = getLogger("nixl")
    log.handlers.clear()
    log.propagate = True
    if "NIXL_LOG_LEVEL" not in os.environ:
        log.setLevel(WARNING)
    errors = tuple(e for e in vars(bindings).values() if isinstance(e, type) and issubclass(e, Exception))
    try:
        number = version(module.replace("_", "-"))
    except PackageNotFoundError:
        number = "of unknown version"
    return api, errors, bindings.nixlRemoteDisconnectError, number
