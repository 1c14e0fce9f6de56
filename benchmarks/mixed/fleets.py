"""Fleets that serve a placement: one made for each, or one whose machines take roles as each asks."""

import asyncio
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from benchmarks.mixed import on_cpu
from benchmarks.mixed.by_hand import by_hand
from benchmarks.mixed.setting import Setting
from hexgen2.cli.client import apply_plan
from hexgen2.cli.fleet import Fleet
from hexgen2.cli.fleet_config import FleetConfig
from hexgen2.config import MIB
from hexgen2.placement import Placement, to_json, to_yaml
from hexgen2.scheduler.problem import Problem

#: vLLM is imported twice by each worker, by some of them on a fifth of a core.
START_TIMEOUT_S = 900.0
APPLY_TIMEOUT_S = 10.0
#: From a plan's arrival to gateways and workers that follow it.
SETTLE_S = 3.0


class Fleets:
    """One after the other, with emulated engines."""

    def __init__(self, setting: Setting, model: Path) -> None:
        self.setting = setting
        self.model = model
        self._held = AsyncExitStack()

    async def __aenter__(self) -> "Fleets":
        """Nothing runs yet."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop what runs."""
        await self._held.aclose()

    @asynccontextmanager
    async def serving(self, made: Problem, placement: Placement) -> AsyncIterator[str]:
        """The address of a gateway whose fleet follows the placement."""
        engine = {"kind": "emulated", "num_layers": 1, "num_kv_heads": 1, "max_num_seqs": 256}
        with tempfile.TemporaryDirectory(prefix="hexgen2-") as folder:
            config = self._config(Path(folder), made, placement, "127.0.0.1", engine=engine, tokenizer=self.model)
            async with Fleet(config, Path(folder) / "run") as fleet:
                fleet.hurry.set()
                yield fleet.grpc_address

    def _config(self, folder: Path, made: Problem, placement: Placement, host: str, **fields: Any) -> FleetConfig:
        workload = made.workload
        prompt, output = self.setting.workloads[workload.name]
        work: Mapping[str, Any] = {
            "name": workload.name,
            "prompt_tokens": prompt,
            "output_tokens": output,
            "slo": {"tpot_s": self.setting.tpot_s},
        }
        files = {
            "plan": to_yaml(placement),
            "cluster": yaml.safe_dump(dict(self.setting.cluster)),
            "workload": yaml.safe_dump(work),
        }
        for name, text in files.items():
            (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
        addresses = dict.fromkeys(("listen", "http_listen", "coordinator"), f"{host}:0")
        paths = {name: str(folder / f"{name}.yaml") for name in files}
        return FleetConfig.model_validate({"kv": {"transport": "tcp"}, "drain_s": 2, **addresses, **paths, **fields})


class OneFleet(Fleets):
    """vLLM on every machine, started once: roles and routes are applied, as to a fleet that serves."""

    def __init__(self, setting: Setting, model: Path) -> None:
        super().__init__(setting, model)
        self._fleet: Fleet | None = None

    @asynccontextmanager
    async def serving(self, made: Problem, placement: Placement) -> AsyncIterator[str]:
        """Likewise."""
        fleet = self._fleet = self._fleet or await self._started(made)
        await apply_plan(fleet.coordinator_address, to_json(_by_machine(placement)), APPLY_TIMEOUT_S)
        await asyncio.sleep(SETTLE_S)
        yield fleet.grpc_address

    async def _started(self, made: Problem) -> Fleet:
        folder = Path(self._held.enter_context(tempfile.TemporaryDirectory(prefix="hexgen2-")))
        machines = [machine.name for machine in made.cluster.machines]
        # All alike whatever their role, with more memory than any way to use them needs.
        engine = {
            "kind": "vllm",
            "model": self.model,
            "dtype": on_cpu.DTYPE,
            "max_model_len": 512,
            "max_num_seqs": 64,
            "max_num_batched_tokens": 512,
            "kv_cache_bytes": 768 * MIB,
        }
        pools = {"transport": "tcp", "send_bytes": 256 * MIB, "staging_bytes": 256 * MIB}
        config = self._config(
            folder,
            made,
            by_hand(made, dict.fromkeys(machines, "colocated")),
            on_cpu.HUB,
            engine=engine,
            kv=pools,
            start_timeout_s=START_TIMEOUT_S,
        )
        fleet = await self._held.enter_async_context(Fleet(config, folder / "run", on_cpu.places()))
        fleet.hurry.set()
        return fleet


def _by_machine(placement: Placement) -> Placement:
    """Replicas by the names of their machines, as the fleet was started with."""
    names = {each.id: each.stages[0].machine for each in placement.replicas}
    return placement.model_copy(
        update={
            "replicas": tuple(each.model_copy(update={"id": names[each.id]}) for each in placement.replicas),
            "routes": tuple(
                each.model_copy(update={"prefill": names[each.prefill], "decode": names[each.decode]})
                for each in placement.routes
            ),
        }
    )
