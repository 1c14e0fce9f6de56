"""The emulated engine: continuous batching with chunked prefill, tokens from ``emulated_kv``, times from figures or,
for planned GPUs, from the scheduler's cost model.

Its KV travels through the same agents and transports as vLLM's. Greedy only: temperature and its like are ignored.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from math import ceil, inf
from pathlib import Path

import numpy as np
import torch

from hexgen2.batching import Limits
from hexgen2.config import EmulatedEngineConfig, KvConfig, TlsConfig
from hexgen2.engine.base import EngineOutput, EngineRequest, FinishReason, Logprob, SampledToken
from hexgen2.engine.emulated_kv import MASK, kv_values, next_token, prefix_hashes, read_kv, restored
from hexgen2.engine.planned_cost import load_planned_cost
from hexgen2.errors import EngineFailed, InvalidRequest
from hexgen2.kv.agent import KvAgent
from hexgen2.kv.choose import make_transports, transport_name
from hexgen2.kv.codecs import NONE
from hexgen2.kv.layout import rank_slices
from hexgen2.kv.wire import chunk_span, complete_chunks
from hexgen2.model import ModelSpec
from hexgen2.simulator.step_times import Figures, Step, StepTimes

#: What makes two emulated models the same; the rest is only how fast they are.
_IDENTITY = {"name", "num_layers", "num_kv_heads", "head_dim", "vocab_size"}
#: A step that should be over already is caught up with, as far as this; a longer standstill is none of the engine's.
MAX_BEHIND_S = 0.05
#: A step takes in no fewer tokens of prompts, however slow it is.
LEAST_TOKENS = 16
_TORCH_DTYPE = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(slots=True)
class _Running:
    """One request: ``num_computed`` of ``token_ids`` have KV, and that KV sums to ``checksum``."""

    request: EngineRequest
    token_ids: list[int]
    outputs: asyncio.Queue[EngineOutput | EngineFailed] = field(default_factory=asyncio.Queue)
    hashes: np.ndarray[tuple[int], np.dtype[np.uint64]] = field(default_factory=lambda: np.empty(0, np.uint64))
    num_computed: int = 0
    num_cached: int = 0
    num_output: int = 0
    num_sent_chunks: int = 0
    checksum: int = 0
    done: bool = False
    #: Its step is in a later part of the pipeline.
    in_pipeline: bool = False

    @property
    def num_missing(self) -> int:
        """Tokens to compute before the next can be sampled."""
        return len(self.token_ids) - self.num_computed


class EmulatedEngine:
    """See the module; implements ``base.Engine``."""

    def __init__(
        self, config: EmulatedEngineConfig, kv: KvConfig, agent_socket: Path, tls: TlsConfig | None = None
    ) -> None:
        self.model = ModelSpec(
            name=config.name,
            sha256=sha256(config.model_dump_json(include=_IDENTITY).encode()).digest(),
            num_layers=config.num_layers,
            num_heads=config.num_kv_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            vocab_size=config.vocab_size,
            max_position_embeddings=config.max_model_len,
            dtype=config.dtype,
        )
        self.max_model_len = config.max_model_len
        self.num_ranks = config.tensor_parallel_size
        self._config = config
        self._kv = kv
        self._tls = tls
        self._agent_socket = agent_socket
        self._slices = rank_slices([config.num_layers], config.num_kv_heads, config.tensor_parallel_size)
        self._agents: list[KvAgent] = []
        self._waiting: deque[_Running] = deque()
        self._running: list[_Running] = []
        self._work = asyncio.Event()
        # Steps that are past the slowest part, and when they are through the last.
        self._in_pipeline: list[tuple[float, list[tuple[_Running, int]]]] = []
        self._clock = 0.0
        self._times: StepTimes
        if config.cost_file is None:
            self._times = Figures(
                1 / config.prefill_tokens_per_s, config.decode_step_base_s, config.decode_step_per_request_s
            )
            self._kv_tokens, self._max_num_seqs, self._num_lanes = inf, config.max_num_seqs, 1
        else:
            cost = load_planned_cost(config.cost_file)
            self._times, self._kv_tokens = cost.times, cost.kv_tokens
            self._max_num_seqs, self._num_lanes = cost.max_num_seqs * cost.num_lanes, cost.num_lanes
            # As vLLM's: what KV memory holds.
            self.max_model_len = min(config.max_model_len, int(self._kv_tokens))
            self._config = config = config.model_copy(update={"max_num_batched_tokens": cost.max_num_batched_tokens})
        self._most = self._limits = Limits(self._max_num_seqs, config.max_num_batched_tokens)
        self._loop: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start one agent per rank and the step loop."""
        kv = self._kv
        for rank_slice in self._slices:
            agent = await asyncio.to_thread(
                KvAgent,
                self._agent_socket,
                rank_slice,
                self.model.kv_shape,
                make_transports(transport_name(kv, self._tls), kv.host, kv.devices, self._tls),
                device=torch.device("cpu"),
                send_bytes=kv.send_bytes,
                staging_bytes=kv.staging_bytes,
                landing_bytes=kv.landing_bytes,
                stall_s=kv.stall_s,
            )
            self._agents.append(agent)
        self._loop = asyncio.create_task(self._run())

    async def generate(self, request: EngineRequest) -> AsyncGenerator[EngineOutput, None]:
        """See ``base.Engine``."""
        room = self.max_model_len - len(request.prompt_token_ids)
        if room < 1:
            raise InvalidRequest("prompt", f"{len(request.prompt_token_ids)} tokens; the limit is {room - 1}")
        await self.check_health()
        running = _Running(request, list(request.prompt_token_ids))
        self._waiting.append(running)
        self._work.set()
        try:
            while True:
                output = await running.outputs.get()
                if isinstance(output, EngineFailed):
                    raise output
                yield output
                if output.finish_reason is not None:
                    return
        finally:
            running.done = True

    async def check_health(self) -> None:
        """Raise EngineFailed when the step loop has ended."""
        if self._loop is None or self._loop.done():
            raise EngineFailed("the emulated engine is not running")

    def num_requests(self) -> tuple[int, int]:
        """Running and waiting."""
        return len(self._running), len(self._waiting)

    @property
    def bounds(self) -> tuple[Limits, Limits]:
        """See ``base.Adaptable``."""
        return Limits(1, min(LEAST_TOKENS, self._most.max_num_batched_tokens)), self._most

    def limit(self, limits: Limits) -> None:
        """See ``base.Adaptable``."""
        self._limits = limits

    async def stop(self) -> None:
        """Cancel what runs and stop the agents."""
        if self._loop is not None:
            self._loop.cancel()
            with suppress(asyncio.CancelledError):
                await self._loop
            self._loop = None
        for agent in self._agents:
            await asyncio.to_thread(agent.close)
        self._agents.clear()

    async def _run(self) -> None:
        try:
            while True:
                if not self._waiting and not self._running:
                    self._work.clear()
                    await self._work.wait()
                    self._clock = asyncio.get_running_loop().time()
                await self._step()
        except asyncio.CancelledError:
            raise
        except Exception as error:
            # The top of a task: whoever waits is told, and check_health tells the rest.
            for running in (*self._running, *self._waiting):
                running.outputs.put_nowait(EngineFailed(f"emulated engine: {error!r}"))
            raise

    async def _step(self) -> None:
        loop = asyncio.get_running_loop()
        for due, batch in [entry for entry in self._in_pipeline if entry[0] <= loop.time()]:
            self._in_pipeline.remove((due, batch))
            self._finish(batch)
        self._running = [r for r in self._running if not r.done]
        held = sum(len(running.token_ids) for running in self._running)
        while self._waiting and len(self._running) < self._limits.max_num_seqs:
            held += len(self._waiting[0].token_ids) + 1
            if self._running and held > self._kv_tokens:
                break
            running = self._waiting.popleft()
            if not running.done:
                self._load(running)
                self._running.append(running)
        if not self._running:
            return
        batch = self._choose()
        if not batch:
            # All of them are further on in the pipeline.
            await asyncio.sleep(max(0.0, min(due for due, _ in self._in_pipeline) - loop.time()))
            self._clock = loop.time()
            return
        parts = self._times.parts(_step_of(batch))
        # From the planned end of the step before, so that what this process itself takes is not added.
        self._clock = max(self._clock, loop.time() - MAX_BEHIND_S) + max(parts)
        if len(parts) > 1:
            self._in_pipeline.append((self._clock + sum(parts) - max(parts), batch))
            for running, _ in batch:
                running.in_pipeline = True
        await asyncio.sleep(max(0.0, self._clock - loop.time()))
        if len(parts) == 1:
            self._finish(batch)

    def _choose(self) -> "list[tuple[_Running, int]]":
        """Requests of the next step and how many tokens of each: decode first; of a pipeline's lanes, one."""
        budget = self._limits.max_num_batched_tokens
        free = [running for running in self._running if not running.in_pipeline]
        most = ceil(len(self._running) / self._num_lanes)
        batch: list[tuple[_Running, int]] = []
        for running in sorted(free, key=lambda r: r.num_missing > 1)[:most]:
            take = min(budget, running.num_missing)
            if take:
                batch.append((running, take))
                budget -= take
        return batch

    def _finish(self, batch: "list[tuple[_Running, int]]") -> None:
        """The step has passed the last part: its KV and tokens are there."""
        for running, take in batch:
            running.in_pipeline = False
            if not running.done:
                self._compute(running, take)
                if running.num_missing == 0:
                    self._sample(running)
        for agent in self._agents:
            agent.flush()

    def _load(self, running: _Running) -> None:
        """Take the KV of the hand-over, every byte of it, from staging."""
        transfer = running.request.load_transfer
        if transfer is None:
            return
        staged = [agent.staged(transfer) for agent in self._agents]
        if None in staged:
            running.done = True
            running.outputs.put_nowait(EngineFailed(f"no verified KV for transfer {transfer}"))
            for agent, kv in zip(self._agents, staged, strict=True):
                if kv is not None:
                    agent.not_loaded(transfer)
            return
        # A set: where ranks hold the same heads, equal copies count once and unequal ones spoil the tokens.
        checksums: set[tuple[int, int, int]] = set()
        for agent, rank_slice, kv in zip(self._agents, self._slices, staged, strict=True):
            if kv is None:
                continue
            for layer in rank_slice.layers:
                values = kv.layer(layer).float().numpy()
                if kv.codec != NONE:
                    values = restored(values)
                checksum = read_kv(np.ascontiguousarray(values).view(np.uint8), layer, rank_slice.kv_heads, 0)
                checksums.add((layer, rank_slice.first_kv_head, checksum))
            running.num_computed = running.num_cached = kv.num_tokens
            agent.loaded(transfer)
        running.checksum = sum(checksum for _, _, checksum in checksums)

    def _compute(self, running: _Running, num_tokens: int) -> None:
        """KV of the next ``num_tokens`` tokens: read for the checksum, sent where it completes a chunk."""
        first, stop = running.num_computed, running.num_computed + num_tokens
        known = len(running.hashes)
        if known < len(running.token_ids):
            more = prefix_hashes(running.token_ids[known:], int(running.hashes[-1]) if known else 0)
            running.hashes = np.concatenate([running.hashes, more])
        heads = range(self.model.num_kv_heads)
        for layer in range(self.model.num_layers):
            # As float32 whatever the dtype: engines that differ in it are the same model.
            kv = kv_values(running.hashes[first:stop], layer, heads, self.model.head_dim)
            running.checksum += read_kv(kv.view(np.uint8), layer, heads, first)
        running.num_computed = stop
        transfer = running.request.send_transfer
        if transfer is not None:
            self._send(running, transfer)

    def _send(self, running: _Running, transfer: str) -> None:
        total = len(running.request.prompt_token_ids)
        chunk, complete = running.num_sent_chunks, complete_chunks(running.num_computed, total)
        if complete <= chunk:
            return
        first, stop = chunk_span(chunk, total)[0], chunk_span(complete - 1, total)[1]
        for agent, rank_slice in zip(self._agents, self._slices, strict=True):
            for layer in rank_slice.layers:
                piece = self._kv_tensor(running.hashes[first:stop], layer, rank_slice.kv_heads)
                agent.put(transfer, layer, chunk, piece)
        running.num_sent_chunks = complete

    def _kv_tensor(self, hashes: np.ndarray[tuple[int], np.dtype[np.uint64]], layer: int, heads: range) -> torch.Tensor:
        return torch.from_numpy(kv_values(hashes, layer, heads, self.model.head_dim)).to(_TORCH_DTYPE[self.model.dtype])

    def _sample(self, running: _Running) -> None:
        sampling = running.request.sampling
        token = next_token(running.checksum & MASK, running.num_computed, self.model.vocab_size)
        running.token_ids.append(token)
        running.num_output += 1
        finish = None
        if token in sampling.stop_token_ids and running.num_output > sampling.min_tokens:
            finish = FinishReason.STOP
        elif running.num_output >= sampling.max_tokens or len(running.token_ids) >= self.max_model_len:
            finish = FinishReason.LENGTH
        asked = sampling.logprobs is not None
        sampled = SampledToken(token, 0.0, (Logprob(token, 0.0, 1),)) if asked else SampledToken(token)
        running.outputs.put_nowait(EngineOutput((sampled,), finish, running.num_cached))
        running.done = finish is not None


def _step_of(batch: "list[tuple[_Running, int]]") -> Step:
    """What a step computes, as its cost is told."""
    prompts = [(running, take) for running, take in batch if running.num_output == 0]
    decoding = [running for running, _ in batch if running.num_output]
    tokens = sum(take for _, take in prompts)
    return Step(
        prompt_tokens=tokens,
        attended=sum(take * (running.num_computed + take / 2) for running, take in prompts),
        shared_tokens=tokens - prompts[0][1] if len(prompts) > 1 else 0,
        num_prompts=len(prompts),
        num_decoding=len(decoding),
        context_tokens=sum(running.num_computed for running in decoding),
        num_sampled=len(decoding) + sum(take == running.num_missing for running, take in prompts),
    )
