"""Workers over real vLLM engines and real KV agents, joined without gRPC."""

import secrets
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass

from hexgen2.config import KvConfig, VllmEngineConfig, WorkerConfig
from hexgen2.engine.base import EngineOutput, SampledToken, Sampling
from hexgen2.engine.vllm import VllmEngine
from hexgen2.engine.vllm_args import Role
from hexgen2.kv.codecs import NONE
from hexgen2.kv.handoff import FetchMessage, FirstToken
from hexgen2.worker.aio import PageQueue
from hexgen2.worker.decode import DecodeJob, DecodeWorker
from hexgen2.worker.loading import Loading, loading
from hexgen2.worker.prefill import PrefillJob, PrefillWorker
from hexgen2.worker.receive import KvSummary, RemoteKv

START_TIMEOUT_S = 120.0


@asynccontextmanager
async def running(config: VllmEngineConfig, kv: KvConfig, role: Role) -> AsyncIterator[Loading]:
    """An engine with its agents."""
    async with loading(WorkerConfig(role=role, engine=config, kv=kv)) as loaded:
        await loaded.start()
        yield loaded


@dataclass
class Answer:
    """One request's whole answer; ``kv`` is absent when nothing was handed over."""

    tokens: list[SampledToken]
    finish_reason: str | None
    prefill_cached: int = 0
    decode_cached: int = 0
    kv: KvSummary | None = None

    @property
    def token_ids(self) -> list[int]:
        return [token.token_id for token in self.tokens]


@dataclass
class Pair:
    """One prefill and one decode worker."""

    prefill_engine: VllmEngine
    decode_engine: VllmEngine
    prefill_memory: PageQueue
    decode_memory: PageQueue
    prefill: PrefillWorker
    decode: DecodeWorker

    async def hand_over(self, prompt: list[int], sampling: Sampling, codec: str = NONE) -> Answer:
        """As the gateway does: both at once, prefill's call ended when decode has verified."""
        token = secrets.token_bytes(16)
        transfer_id = secrets.token_hex(8)
        ids = tuple(prompt)
        answer = Answer([], None)
        prefill = self.prefill.run(PrefillJob(f"p{transfer_id}", transfer_id, token, ids, sampling, True, codec))
        async with aclosing(prefill) as made:
            async for event in made:
                if isinstance(event, FirstToken):
                    answer.tokens.append(event.token)
                    answer.prefill_cached = event.cached_tokens
                    answer.finish_reason = event.finish_reason
                    break
            if answer.finish_reason is not None:
                return answer
            remote = RemoteKv(transfer_id, token, "", codec)
            decode = self.decode.run(DecodeJob(f"d{transfer_id}", ids, sampling, remote))
            async with aclosing(decode) as outputs:
                async for output in outputs:
                    if isinstance(output, KvSummary):
                        answer.kv = output
                        await made.aclose()
                    else:
                        take(answer, output)
        return answer

    async def first(self, prompt: list[int], sampling: Sampling) -> SampledToken:
        """By prefill's engine alone: what it says next."""
        job = PrefillJob(secrets.token_hex(8), "", b"", tuple(prompt), sampling, False)
        async with aclosing(self.prefill.run(job)) as made:
            async for event in made:
                if isinstance(event, FirstToken):
                    return event.token
        raise AssertionError("prefill said nothing")

    async def colocated(self, prompt: list[int], sampling: Sampling) -> Answer:
        """By decode's engine alone."""
        answer = Answer([], None)
        job = DecodeJob(secrets.token_hex(8), tuple(prompt), sampling, None)
        async with aclosing(self.decode.run(job)) as outputs:
            async for output in outputs:
                assert isinstance(output, EngineOutput)
                take(answer, output)
        return answer


def take(answer: Answer, output: EngineOutput) -> None:
    answer.tokens += output.tokens
    answer.decode_cached += output.cached_tokens
    answer.finish_reason = output.finish_reason or answer.finish_reason


def joined(first: Loading, second: Loading) -> Pair:
    """The first prefills for the second."""
    assert isinstance(first.engine, VllmEngine)
    assert isinstance(second.engine, VllmEngine)
    assert first.pools is not None
    assert second.pools is not None
    prefill = PrefillWorker(first.engine, first.ranks, first.pools.send)

    def fetch(remote: RemoteKv, resume: bool) -> AsyncGenerator[FetchMessage, None]:
        return prefill.fetch(remote.transfer_id, remote.token, resume=resume)

    decode = DecodeWorker(second.engine, second.ranks, second.pools.staging, fetch)
    return Pair(first.engine, second.engine, first.pools.send, second.pools.staging, prefill, decode)


@asynccontextmanager
async def pair(prefill: VllmEngineConfig, decode: VllmEngineConfig, kv: KvConfig) -> AsyncIterator[Pair]:
    """Both, one after the other."""
    async with running(prefill, kv, "prefill") as first, running(decode, kv, "decode") as second:
        yield joined(first, second)
