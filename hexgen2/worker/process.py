"""The life of a worker process: bind, load the engine, register, serve, drain, leave, free. The same for every role."""

import asyncio
import os
import secrets
import signal
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

import structlog

import hexgen2
from hexgen2 import metrics, telemetry
from hexgen2.address import parse_address
from hexgen2.calibration import Sample
from hexgen2.config import EmulatedEngineConfig, WorkerConfig
from hexgen2.devices import here
from hexgen2.engine.base import Engine
from hexgen2.errors import EngineFailed
from hexgen2.kv.ranks import Ranks
from hexgen2.plan import KvReceived, Load, Replica, ReplicaState, Role
from hexgen2.rpc.report import REPORT_TIMEOUT_S, Reporter
from hexgen2.rpc.server import GrpcServer, run_until_signal
from hexgen2.security.tls import TlsFiles
from hexgen2.worker.aio import Gate, owned
from hexgen2.worker.loading import Pools, loading

log = structlog.get_logger(__name__)

#: How often the engine is asked whether it lives; what dies with requests running is noticed by them at once.
HEALTH_INTERVAL_S = 1.0
#: Before its machine goes a worker ends what still runs, so that it is continued elsewhere.
HAND_OVER_S = 3.0


async def run_worker(
    config: WorkerConfig,
    gate: Gate,
    register: Callable[[GrpcServer], None],
    attach: Callable[[Engine, Ranks, Pools], Awaitable[None]],
    tls: TlsFiles | None = None,
    received: Callable[[int], KvReceived] = lambda quarantine_bytes: KvReceived(quarantine_bytes=quarantine_bytes),
    samples: Callable[[], tuple[Sample, ...]] = tuple,
) -> None:
    """Serve until a signal. ``received`` tells of the KV that came, given the bytes in quarantine; ``samples`` is what
    was measured of the engine since it was last called.

    Raises:
        EngineFailed: the engine did not start, or died.
        ConfigError: an address cannot be bound.
    """
    failed = ""
    async with AsyncExitStack() as stack:
        stack.callback(telemetry.setup(config.role, config.replica_id))
        metrics_address = stack.enter_context(metrics.metrics_served(config.metrics_listen))
        server = GrpcServer(config.listen, tls=tls)
        register(server)
        address = await server.start()
        stack.push_async_callback(server.stop, 0.0)
        loaded = await stack.enter_async_context(loading(config))
        engine, ranks = loaded.engine, loaded.ranks

        def load() -> Load:
            running, waiting = engine.num_requests()
            if loaded.pools is not None:
                waiting += loaded.pools.num_waiting
            metrics.NUM_REQUESTS_RUNNING.set(running)
            metrics.NUM_REQUESTS_WAITING.set(waiting)
            if loaded.pools is None:
                return Load(running, waiting)
            memory = loaded.pools.of(reporter.replica.role)
            kv = received(ranks.quarantine_bytes)
            return Load(running, waiting, memory.bytes_used, memory.bytes_total, kv)

        def take_role(role: Role, epoch: int) -> None:
            gate.role_epoch = epoch

        drain_s = config.drain_s

        def leave(within_s: float) -> None:
            nonlocal drain_s
            if reporter.reason:
                return
            drain_s, reporter.reason = max(0.0, within_s - HAND_OVER_S), "its machine goes"
            log.warning("told_to_leave", within_s=round(within_s, 1), drain_s=round(drain_s, 1))
            os.kill(os.getpid(), signal.SIGTERM)

        replica = replace(_replica(config, address), metrics_address=metrics_address)
        reporter = Reporter(
            config.coordinator, replica, load, tls=tls, on_role=take_role, samples=samples, on_leave=leave
        )
        reporting = await stack.enter_async_context(owned(reporter.run()))

        async def start() -> None:
            pools = await loaded.start()
            hello = ranks.hellos[0]
            metrics.KV_TRANSPORT_INFO.labels(hello.transport, hello.transport_detail).set(1)
            if tls is not None and not hello.transport.endswith("+tls"):
                log.warning("kv_plane_without_tls", transport=hello.transport_detail, host=config.kv.host)
            await attach(engine, ranks, pools)
            # Asks the driver, which takes its time.
            shape = await asyncio.to_thread(_shape, config, ranks)
            reporter.replica = replace(
                reporter.replica,
                model=engine.model.name,
                model_sha256=engine.model.sha256,
                max_model_len=engine.max_model_len,
                send_tokens=pools.max_tokens("send"),
                staging_tokens=pools.max_tokens("staging"),
                transport=hello.transport_detail,
                **shape,
            )
            gate.open()
            await server.set_serving(True)
            reporter.state = ReplicaState.READY
            await stack.enter_async_context(owned(watch()))
            log.info(
                "ready",
                address=address,
                model=engine.model.name,
                dtype=engine.model.dtype,
                ranks=loaded.num_ranks,
                transport=hello.transport_detail,
                kv_pool_bytes=pools.bytes_total,
            )

        async def watch() -> None:
            nonlocal failed
            failed = why = await _end_of(engine, ranks)
            log.error("engine_lost", error=why)
            gate.close()
            os.kill(os.getpid(), signal.SIGTERM)

        async def drain() -> None:
            reporter.state = ReplicaState.DRAINING
            gate.close()
            await server.set_serving(False)
            if not await gate.wait_empty(drain_s):
                # They end with this process, and gateways continue them elsewhere.
                log.warning("drain_incomplete", running=gate.num_inside, drain_s=drain_s)

        await run_until_signal(start, drain)
        gate.close()
        # Whoever routes hears that nothing is lost; a coordinator that is away finds out by itself.
        reporter.reason = failed or reporter.reason or "it was stopped"
        reporter.state = ReplicaState.STOPPED
        await asyncio.wait((reporting,), timeout=2 * REPORT_TIMEOUT_S)
    log.info("stopped")
    if failed:
        raise EngineFailed(failed)


def _shape(config: WorkerConfig, ranks: Ranks) -> dict[str, Any]:
    """How the engine is split, and over what; an emulated one stands for any hardware and tells nothing."""
    if isinstance(config.engine, EmulatedEngineConfig):
        return {}
    size = config.engine.tensor_parallel_size
    layers = tuple(hello.slice.num_layers for hello in ranks.hellos[::size])
    # The driver lists GPUs by its own numbers, the process may see others: only one kind is told.
    kinds = set(here().gpus)
    device = kinds.pop() if len(kinds) == 1 else "" if kinds else "cpu"
    return {"tensor_parallel_size": size, "stage_layers": layers, "device": device}


async def _end_of(engine: Engine, ranks: Ranks) -> str:
    """Wait until the engine or one of its agents is gone; why."""
    while True:
        try:
            return await asyncio.wait_for(ranks.lost(), HEALTH_INTERVAL_S)
        except TimeoutError:
            try:
                await engine.check_health()
            except EngineFailed as error:
                return str(error)


def _replica(config: WorkerConfig, address: str) -> Replica:
    engine = config.engine
    _, port = parse_address(address)
    return Replica(
        replica_id=config.replica_id or f"{config.role}-{port}",
        # A flexible one serves whole requests until the plan says what else.
        role=Role.COLOCATED if config.role == "flexible" else Role(config.role),
        flexible=config.role == "flexible",
        version=hexgen2.__version__,
        address=config.advertise or address,
        model=engine.name if isinstance(engine, EmulatedEngineConfig) else engine.model.name,
        model_sha256=b"",
        incarnation=secrets.token_hex(8),
        max_model_len=0,
        transport="",
    )
