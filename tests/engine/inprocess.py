"""vLLM in the test's own process, with KV agents that keep pieces in a dictionary."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from hexgen2.config import KvConfig, VllmEngineConfig
from hexgen2.engine import vllm_env
from hexgen2.engine.base import EngineRequest, Sampling
from hexgen2.kv.wire import KvShape, RankSlice, num_chunks


@dataclass
class Store:
    """What every agent of a test has been given, and what it did."""

    held: set[str] = field(default_factory=set)
    pieces: dict[str, dict[tuple[int, int], torch.Tensor]] = field(default_factory=dict)
    num_tokens: dict[str, int] = field(default_factory=dict)
    loaded: list[str] = field(default_factory=list)
    announced: list[tuple[str, int]] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    puts: int = 0

    def hold(self, transfer_id: str, num_tokens: int) -> str:
        self.held.add(transfer_id)
        self.pieces[transfer_id] = {}
        self.num_tokens[transfer_id] = num_tokens
        return transfer_id


@dataclass
class FakeAgent:
    """The engine's side of ``hexgen2.kv.agent.KvAgent``."""

    store: Store
    shape: KvShape
    rank_slice: RankSlice
    _fresh: list[tuple[str, int]] = field(default_factory=list)
    closed: bool = False

    def is_sending(self, transfer_id: str) -> bool:
        return transfer_id in self.store.held

    def put(self, transfer_id: str, layer: int, chunk: int, piece: torch.Tensor) -> None:
        if transfer_id not in self.store.held:
            return
        assert piece.is_contiguous()
        assert (layer, chunk) not in self.store.pieces[transfer_id], "a piece is sent once"
        self.store.pieces[transfer_id][layer, chunk] = piece.clone()
        self.store.puts += 1
        self._fresh.append((transfer_id, chunk))

    def flush(self) -> None:
        self.store.announced += self._fresh
        self._fresh.clear()

    def staged(self, transfer_id: str) -> "Staged | None":
        if transfer_id not in self.store.held:
            return None
        return Staged(self.store.num_tokens[transfer_id], self.store.pieces[transfer_id])

    def loaded(self, transfer_id: str) -> None:
        self.store.loaded.append(transfer_id)

    def not_loaded(self, transfer_id: str) -> None:
        assert transfer_id not in self.store.loaded

    def close(self) -> None:
        self.closed = True


@dataclass
class Staged:
    num_tokens: int
    pieces: Mapping[tuple[int, int], torch.Tensor]

    def layer(self, layer: int) -> torch.Tensor:
        return torch.cat([self.pieces[layer, chunk] for chunk in range(num_chunks(self.num_tokens))], dim=2)


@dataclass
class Answer:
    token_ids: list[int]
    finish_reason: str | None
    num_cached_tokens: int


@contextmanager
def engine(store: Store, config: VllmEngineConfig, role: str, **overrides: object) -> Iterator["InProcess"]:
    """``role``: "prefill", "decode", or "bare" for vLLM as it is. ``overrides``: of vLLM's own arguments.

    One at a time: vLLM keeps its connector and its process groups in globals.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    vllm_env.prepare(1, cpu=True)
    from vllm import EngineArgs
    from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown
    from vllm.v1.engine.llm_engine import LLMEngine

    from hexgen2.engine import vllm_connector
    from hexgen2.engine.vllm_args import engine_args

    def make_agent(_socket: Path, rank_slice: RankSlice, shape: KvShape, _transport: object, **_: object) -> FakeAgent:
        return FakeAgent(store, shape, rank_slice)

    def count(_socket: Path, values: Sequence[tuple[str, int]]) -> None:
        for name, value in values:
            store.counts[name] = store.counts.get(name, 0) + value

    kv = KvConfig(transport="tcp")
    args = engine_args(config, kv, "prefill" if role == "prefill" else "decode", Path("unused"), cpu=True)
    if role == "bare":
        del args["kv_transfer_config"]
    args |= overrides
    with (
        patch.object(vllm_connector, "KvAgent", make_agent),
        patch.object(vllm_connector, "make_transports", lambda *_: None),
        patch.object(vllm_connector, "count", count),
    ):
        llm = LLMEngine.from_engine_args(EngineArgs(**args))
        try:
            yield InProcess(llm)
        finally:
            llm.engine_core.shutdown()
            ensure_kv_transfer_shutdown()


class InProcess:
    """A few verbs over LLMEngine."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm
        self._ids = 0
        self._answers: dict[str, Answer] = {}
        self.steps = 0

    def add(
        self,
        prompt: Sequence[int],
        max_tokens: int = 1,
        *,
        send: str | None = None,
        load: str | None = None,
        sampling: Sampling | None = None,
    ) -> str:
        from hexgen2.engine.vllm_args import sampling_params

        self._ids += 1
        request = EngineRequest(
            request_id=f"r{self._ids}",
            prompt_token_ids=tuple(prompt),
            sampling=sampling or Sampling(max_tokens=max_tokens, temperature=0.0, ignore_eos=True),
            send_transfer=send,
            load_transfer=load,
        )
        self._llm.add_request(request.request_id, {"prompt_token_ids": list(prompt)}, sampling_params(request))
        self._answers[request.request_id] = Answer([], None, 0)
        return request.request_id

    def step(self) -> None:
        self.steps += 1
        for output in self._llm.step():
            answer = self._answers[output.request_id]
            answer.token_ids += output.outputs[0].token_ids
            answer.finish_reason = output.outputs[0].finish_reason
            answer.num_cached_tokens = output.num_cached_tokens

    def finish(self) -> None:
        for _ in range(10_000):
            if not self._llm.has_unfinished_requests():
                return
            self.step()
        raise AssertionError("the engine does not finish")

    def answer(self, request_id: str) -> Answer:
        return self._answers[request_id]

    def run(self, prompt: Sequence[int], max_tokens: int = 1, **kwargs: Any) -> Answer:
        request_id = self.add(prompt, max_tokens, **kwargs)
        self.finish()
        return self.answer(request_id)

    def abort(self, request_id: str) -> None:
        self._llm.abort_request([request_id])

    @property
    def scheduler(self) -> Any:
        return self._llm.engine_core.engine_core.scheduler

    @property
    def connector(self) -> Any:
        return self.scheduler.connector

    @property
    def free_blocks(self) -> int:
        return int(self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks())
