"""The coordinator process: ``python -m services.coordinator --config coordinator.yaml``."""

import asyncio
import time
from contextlib import AsyncExitStack
from pathlib import Path

import structlog

import hexgen2
from hexgen2 import metrics, telemetry
from hexgen2.address import check_free, parse_address
from hexgen2.cli.options import run_service
from hexgen2.cluster_file import find_cluster
from hexgen2.config import CoordinatorConfig, home
from hexgen2.coordinator.assignment import assignment_of
from hexgen2.coordinator.outlook import TOLD, Outlook
from hexgen2.coordinator.page.site import page_served
from hexgen2.coordinator.state import Change, FleetState
from hexgen2.coordinator.store import FleetStore
from hexgen2.errors import ConfigError
from hexgen2.placement import from_json, load_placement, to_json
from hexgen2.plan import PlanChange
from hexgen2.rpc.server import GrpcServer, run_until_signal
from hexgen2.security.tls import load_tls
from hexgen2.v1 import coordinator_pb2_grpc
from hexgen2.workload_file import find_workload
from services.coordinator.replanner import Replanner
from services.coordinator.service import SERVICE, UNTRACED, CoordinatorService, not_kept, not_recorded

log = structlog.get_logger(__name__)


async def serve(config: CoordinatorConfig) -> None:
    """Serve until a signal.

    Raises:
        ConfigError: an address cannot be bound, the plan or the state's file cannot be used.
    """
    async with AsyncExitStack() as stack:
        stack.callback(telemetry.setup("coordinator"))
        metrics_address = stack.enter_context(metrics.metrics_served(config.metrics_listen))
        configured = to_json(load_placement(config.plan)) if config.plan else ""
        # Before the file: who starts a second one should hear of the port, not of the file's lock.
        check_free(config.listen)
        save, record, snapshot = not_kept, not_recorded, None
        changes: tuple[PlanChange, ...] = ()
        if (path := state_file(config)) is not None:
            store = await stack.enter_async_context(FleetStore(path))
            save, record, snapshot = store.save, store.record, await store.load()
            changes = await store.changes(TOLD)
        # A plan that was applied stays in force until another is configured.
        applied = snapshot.applied if snapshot is not None and snapshot.configured == configured else ""
        in_force = applied or configured
        # Milliseconds: where the file of the coordinator before is gone, epochs are above its.
        state = FleetState(
            time.time_ns() // 1_000_000,
            config.lost_after_s,
            assignment=assignment_of(from_json(in_force)) if in_force else None,
            version=hexgen2.__version__,
            codec=config.codec,
        )
        state.applied, state.configured = applied, configured
        if snapshot is not None and state.restore(snapshot, time.monotonic()) is Change.MEMBERS:
            state.replan(unix_s=time.time())
        await save(state.snapshot)
        log.info("state", file=str(path or ""), restored=snapshot is not None, replicas=len(state.plan.replicas))
        outlook = Outlook(config.replanning.bucket_s, config.replanning.horizon_s, changes)
        service = CoordinatorService(
            state,
            time.monotonic,
            save=save,
            record=record,
            outlook=outlook,
            max_clock_skew_s=config.max_clock_skew_s,
        )
        replanner = _replanner(config, service, outlook)
        server = GrpcServer(config.listen, untraced=UNTRACED, tls=load_tls(config.tls))
        server.add(coordinator_pb2_grpc.add_CoordinatorServicer_to_server, service, SERVICE)

        # Outside the task group, which would wrap its error.
        address = await server.start()
        stack.push_async_callback(server.stop, 0.0)
        page_address = await stack.enter_async_context(
            page_served(config.page_listen, service.fleet, names=config.page_names)
        )

        async def start() -> None:
            await server.set_serving(True)
            log.info("ready", address=address, metrics=metrics_address, page=page_address, plan_epoch=state.plan.epoch)

        async def drain() -> None:
            await server.set_serving(False)
            service.close()
            await server.stop(config.drain_s)

        async with asyncio.TaskGroup() as tasks:
            beside = [tasks.create_task(service.run_expiry())]
            if replanner is not None:
                stack.enter_context(replanner)
                beside.append(tasks.create_task(replanner.run()))
            await run_until_signal(start, drain)
            for task in beside:
                task.cancel()
    log.info("stopped")


def _replanner(config: CoordinatorConfig, service: CoordinatorService, outlook: Outlook) -> Replanner | None:
    """None unless it is asked for. Raises ConfigError when there is no plan, or its workload is not known."""
    if not config.replan:
        return None
    placement = service.placement
    if placement is None:
        raise ConfigError("replan: there is no plan: give one (plan: plan.yaml), or leave replan out")
    settings = config.replanning
    # Both are needed later, in another process: what is missing is told now.
    find_cluster(settings.cluster or placement.cluster)
    workload = find_workload(settings.workload or placement.workload)
    return Replanner(settings, service, outlook, placement, workload, time.monotonic)


def state_file(config: CoordinatorConfig) -> Path | None:
    """As configured, or by the address, which a coordinator keeps over restarts; none where the port is any."""
    if config.state_file is not None:
        return config.state_file
    host, port = parse_address(config.listen, what="listen")
    return home() / "coordinator" / f"{host.replace(':', '_')}-{port}.db" if port else None


def main() -> None:
    """Entry point."""
    run_service("coordinator", CoordinatorConfig, serve)


if __name__ == "__main__":
    main()
