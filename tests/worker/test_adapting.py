"""An engine's limits follow its requests' times, and the emulated engine keeps to them."""

import asyncio
from contextlib import aclosing

import pytest

from hexgen2.batching import Limits, Pace, Targets
from hexgen2.config import EmulatedEngineConfig, KvConfig, WorkerConfig
from hexgen2.engine.base import Adaptable, EngineRequest, Sampling
from hexgen2.worker.adapting import Adapting
from hexgen2.worker.aio import owned
from hexgen2.worker.loading import loading
from tests.eventually import eventually_async

CONFIG = EmulatedEngineConfig(num_layers=1, num_kv_heads=1, decode_step_base_s=0.0, decode_step_per_request_s=0.0)
WORKER = WorkerConfig(role="decode", engine=CONFIG, kv=KvConfig(transport="tcp"))


@pytest.mark.timeout(60)
async def test_an_emulated_engine_keeps_to_its_limits_and_slow_tokens_lower_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with loading(WORKER) as loaded:
        await loaded.start()
        engine = loaded.engine
        assert isinstance(engine, Adaptable)
        engine.limit(Limits(2, 64))
        seen: list[int] = []

        async def ask(number: int) -> None:
            request = EngineRequest(f"r{number}", (1, 2, 3), Sampling(max_tokens=5, ignore_eos=True))
            async with aclosing(engine.generate(request)) as outputs:
                async for _ in outputs:
                    seen.append(engine.num_requests()[0])

        async with asyncio.TaskGroup() as tasks:
            for number in range(6):
                tasks.create_task(ask(number))
        assert max(seen) == 2

        limits: list[Limits] = []
        monkeypatch.setattr(engine, "limit", limits.append)
        pace = Pace()
        adapting = Adapting(Targets(tpot_s=0.01), pace, interval_s=0.01)
        adapting.follow(engine)
        async with owned(adapting.run()):

            async def lowered() -> bool:
                pace.gap(1.0, 1)
                return bool(limits)

            await eventually_async(lowered)
        assert limits[0].max_num_seqs < engine.bounds[1].max_num_seqs


async def test_without_targets_nothing_is_followed() -> None:
    async with loading(WORKER) as loaded:
        adapting = Adapting(Targets(), Pace())
        adapting.follow(loaded.engine)
        async with asyncio.timeout(10):
            await adapting.run()
