"""Follows what a worker's requests see and sets its engine's limits by it. ``hexgen2.batching`` decides."""

import asyncio

import structlog

from hexgen2 import metrics
from hexgen2.batching import Batching, Pace, Targets
from hexgen2.engine.base import Adaptable, Engine

#: How often limits are looked at.
INTERVAL_S = 0.5

log = structlog.get_logger(__name__)


class Adapting:
    """Of one worker, whose tokens ``pace`` is told of; without targets nothing is ever changed."""

    def __init__(self, targets: Targets, pace: Pace, interval_s: float = INTERVAL_S) -> None:
        self._targets = targets
        self._pace = pace
        self._interval_s = interval_s
        self._engine: asyncio.Future[Engine] = asyncio.get_running_loop().create_future()

    def follow(self, engine: Engine) -> None:
        """The engine runs: its limits may be changed from now on."""
        self._engine.set_result(engine)

    async def run(self) -> None:
        """Until cancelled, or until there is nothing to follow."""
        engine = await self._engine
        if self._targets == Targets() or not isinstance(engine, Adaptable):
            return
        least, most = engine.bounds
        batching = Batching(self._targets, most, most, least)
        log.info("adapting", tpot_s=self._targets.tpot_s, ttft_s=self._targets.ttft_s, max_num_seqs=most.max_num_seqs)
        while True:
            metrics.MAX_NUM_SEQS.set(batching.limits.max_num_seqs)
            metrics.MAX_NUM_BATCHED_TOKENS.set(batching.limits.max_num_batched_tokens)
            await asyncio.sleep(self._interval_s)
            before, after = batching.limits, batching.next(self._pace.take(*engine.num_requests()))
            if after != before:
                engine.limit(after)
