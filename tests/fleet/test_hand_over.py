"""Hand-overs between processes with emulated engines: replicas lost on the way, no room, and what is told of it."""

import asyncio
import signal
from pathlib import Path

import httpx
import pytest

from hexgen2.cli.fleet_config import FleetConfig
from hexgen2.config import EmulatedEngineConfig
from hexgen2.engine.base import Sampling
from hexgen2.traces import find
from tests.eventually import eventually_async
from tests.fleet.harness import Running, metric, running
from tests.models import make_tiny_llama
from tests.worker.pair import expected_tokens

#: A prompt of this length is read in four seconds, and its KV is most of the send buffer.
NUM_TOKENS = 1024
ENGINE = EmulatedEngineConfig(prefill_tokens_per_s=256.0, max_num_batched_tokens=64, vocab_size=259)
PROMPT = [3 + i % 250 for i in range(NUM_TOKENS)]
SAMPLING = Sampling(max_tokens=4, temperature=0.0, ignore_eos=True)


def config(folder: Path, **fields: object) -> FleetConfig:
    kv = {"transport": "tcp", "send_bytes": 10 * 65536, "staging_bytes": 1 << 20, "max_queued": 0}
    return FleetConfig.model_validate(
        {"engine": ENGINE.model_dump(), "tokenizer": make_tiny_llama(folder / "tiny"), "kv": kv} | fields
    )


async def fetching(fleet: Running) -> str:
    """The decode replica that has had an offer, holds staging, and has not verified: prefill is still at work."""
    found: list[str] = []

    async def look() -> bool:
        for replica in fleet.plan.replicas:
            if replica.replica_id.startswith("decode") and await metric(
                replica, "hexgen2:kv_pool_bytes_used", "staging"
            ):
                found.append(replica.replica_id)
        return bool(found)

    await eventually_async(look)
    return found[0]


async def test_a_full_send_buffer_a_decode_killed_on_the_way_and_what_is_told_of_it(tmp_path: Path) -> None:
    async with running(config(tmp_path, prefill=1, decode=2)) as fleet:
        right = expected_tokens(ENGINE, PROMPT, 4)
        asked = asyncio.create_task(fleet.ask(PROMPT, SAMPLING))
        lost = await fetching(fleet)

        # The send buffer is held and its line is of no length: who comes now hears when to come again.
        async with httpx.AsyncClient(base_url=f"http://{fleet.fleet.http_address}", timeout=60) as http:
            refused = await http.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 4})
            assert refused.status_code == 503, refused.text
            assert int(refused.headers["retry-after"]) >= 1
            too_large = await http.post("/v1/completions", json={"prompt": [*PROMPT, *PROMPT], "max_tokens": 4})
            assert too_large.status_code == 400
            assert "has 2048 tokens; the limit is 1280" in too_large.json()["error"]["message"]

        fleet.fleet[lost].send(signal.SIGKILL)
        answer = await asked
        assert answer.tokens == right
        other = next(r for r in fleet.plan.replicas if r.replica_id.startswith("decode") and r.replica_id != lost)
        assert answer.last.timing.decode_replica_id == other.replica_id
        prefill = fleet.plan.replica("prefill-0")
        # One prefill, and it was enough.
        assert await metric(prefill, "hexgen2:kv_transfers_total", 'state="send_released"') == 1
        assert await metric(other, "hexgen2:kv_transfers_total", 'state="recv_loaded"') == 1
        moved = NUM_TOKENS * 512
        assert await metric(prefill, "hexgen2:kv_bytes_total", "offered") == moved
        assert await metric(other, "hexgen2:kv_bytes_total", "received") == moved
        assert await metric(other, "hexgen2:kv_bandwidth_bytes_per_second_sum") > 0
        assert await metric(other, "hexgen2:kv_pool_bytes_total", "staging") == 1 << 20
        for name in (
            "kv_digest_failures_total",
            "kv_refetches_total",
            "kv_quarantine_bytes",
            "recomputed_tokens_total",
        ):
            assert await metric(other, f"hexgen2:{name}") == 0

        async def told() -> bool:
            names = {span.name for span in find(answer.last.timing.trace_id).spans}
            return {
                "prefill.queue",
                "prefill.engine",
                "kv.fetch",
                "decode.queue",
                "kv.route",
                "kv.verify",
                "kv.load",
            } <= names

        await eventually_async(told)
        spans = {span.name: span for span in find(answer.last.timing.trace_id).spans}
        assert spans["kv.verify"].parent_id == spans["kv.fetch"].span_id
        assert spans["kv.verify"].attributes["hexgen2.kv.bytes"] == moved
        assert spans["kv.route"].parent_id == spans["kv.fetch"].span_id
        assert spans["kv.route"].attributes["hexgen2.kv.bytes"] == moved
        assert spans["kv.load"].start_ns >= spans["kv.fetch"].start_ns


@pytest.mark.slow
@pytest.mark.parametrize("side", ["decode", "prefill"])
async def test_a_replica_that_is_stopped_is_found_and_the_request_goes_on(tmp_path: Path, side: str) -> None:
    """By keepalive, within a minute; the client's own deadline is two."""
    right = expected_tokens(ENGINE, PROMPT, 4)
    # Long enough that it is stopped on the way however busy the machine is.
    slow = ENGINE.model_copy(update={"prefill_tokens_per_s": 64.0}).model_dump()
    async with running(config(tmp_path, prefill=2, decode=2, engine=slow)) as fleet:
        asked = asyncio.create_task(fleet.ask(PROMPT, SAMPLING))
        stopped = await fetching(fleet)
        if side == "prefill":
            busy = [
                r
                for r in ("prefill-0", "prefill-1")
                if await metric(fleet.plan.replica(r), "hexgen2:kv_pool_bytes_used", "send")
            ]
            (stopped,) = busy
        fleet.fleet[stopped].send(signal.SIGSTOP)
        try:
            answer = await asked
        finally:
            fleet.fleet[stopped].send(signal.SIGCONT)
        assert answer.tokens == right
        timing = answer.last.timing
        assert stopped not in (timing.prefill_replica_id, timing.decode_replica_id)
