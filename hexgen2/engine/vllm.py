"""vLLM behind the ``Engine`` protocol: its core in a process of its own, its ranks with it or in further ones.

vLLM is told tokens and answers tokens; which KV to send or load it learns from the request (``vllm_connector``). vLLM
makes no spans of ours: callers time what they see.
"""

import asyncio
import multiprocessing
from collections.abc import AsyncGenerator, Iterable, Set
from contextlib import aclosing
from logging import ERROR, WARNING
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import structlog
from pydantic import ValidationError

from hexgen2.batching import Limits
from hexgen2.config import KvConfig, TlsConfig, VllmEngineConfig
from hexgen2.engine.admission import Admission
from hexgen2.engine.base import EngineOutput, EngineRequest, FinishReason, Logprob, SampledToken
from hexgen2.engine.vllm_args import Role, engine_args, invalid, sampling_params, served_dtype
from hexgen2.engine.vllm_env import adopt_logging, is_cpu, prepare
from hexgen2.engine.vllm_network import choose
from hexgen2.errors import ConfigError, EngineFailed, HexgenError, InvalidRequest
from hexgen2.model import ModelSpec, load_model

#: How long the engine's processes may take to clean up before they are killed; no request runs any more.
STOP_TIMEOUT_S = 5.0
#: A start that is given up is looked at so often.
ABANDON_AGAIN_S = 1.0
#: Told where vLLM chooses by itself; nothing depends on it.
MAX_NUM_BATCHED_TOKENS = 8192

log = structlog.get_logger(__name__)

_FINISH = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH}


class VllmEngine:
    """See the module. One per process: vLLM is configured through the environment."""

    def __init__(
        self, config: VllmEngineConfig, kv: KvConfig, role: Role, agent_socket: Path, tls: TlsConfig | None = None
    ) -> None:
        """``agent_socket``: where the service listens for its ranks' KV agents, before ``start``.

        Raises:
            ConfigError: the model folder cannot be served.
        """
        self._config = config
        self._cpu = is_cpu()
        self.model: ModelSpec = load_model(config.model, served_dtype(config, self._cpu))
        self.max_model_len = config.max_model_len or self.model.max_position_embeddings
        self._args = engine_args(config, kv, role, agent_socket, cpu=self._cpu, tls=tls)
        self._llm: Any = None
        self._in_flight = 0
        # vLLM's own limits are fixed when it starts: lower ones are kept by letting fewer requests in.
        tokens = self._args.get("max_num_batched_tokens") or MAX_NUM_BATCHED_TOKENS
        self._most = Limits(config.max_num_seqs, tokens)
        self._admission = Admission(config.max_num_seqs)
        self._stats = _Stats()

    async def start(self) -> None:
        """Load the model. Returns when every rank is up and its agent has said hello.

        Raises:
            EngineFailed: vLLM did not start.
            ConfigError: vLLM cannot serve this model in this way.
        """
        prepare(self._config.omp_num_threads, cpu=self._cpu)
        if self._config.nnodes > 1:
            choose(self._config.master_addr, self._config.master_port)
        others = set(multiprocessing.active_children())
        starting = asyncio.get_running_loop().run_in_executor(None, self._build)
        try:
            self._llm = await asyncio.shield(starting)
        except asyncio.CancelledError:
            await self._abandon(starting, others)
            raise
        self.max_model_len = self._llm.model_config.max_model_len
        if self._config.max_model_len is None and self.max_model_len < self.model.max_position_embeddings:
            log.warning(
                "context_shortened",
                max_model_len=self.max_model_len,
                of=self.model.max_position_embeddings,
            )

    async def _abandon(self, starting: asyncio.Future[Any], others: Set[BaseProcess]) -> None:
        """End a start that is under way, which hears of nothing and may wait half an hour for other machines: end its
        processes, as they come, until it gives up.
        """
        while not starting.done():
            for child in multiprocessing.active_children():
                if child not in others:
                    child.terminate()
            await asyncio.wait((starting,), timeout=ABANDON_AGAIN_S)
        if starting.exception() is None:
            self._llm = starting.result()
            await self.stop()

    def _build(self) -> Any:
        adopt_logging(ERROR)  # what it says of Triton while it is imported is about GPUs
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        try:
            args = AsyncEngineArgs(**self._args)
            llm = AsyncLLM.from_engine_args(args, stat_loggers=[self._stats.factory])
        except ValueError as error:
            raise ConfigError(f"vLLM cannot serve {self._config.model}: {_one_line(error)}") from error
        except RuntimeError as error:
            raise EngineFailed(f"vLLM did not start: {_one_line(error)} (see the log above)") from error
        adopt_logging(WARNING)
        return llm

    async def generate(self, request: EngineRequest) -> AsyncGenerator[EngineOutput, None]:
        """Run one request; closing the iterator, or cancelling what iterates, aborts it in the engine."""
        self._check(request)
        from vllm.inputs import tokens_input

        params = sampling_params(request)
        # All KV of a transfer is loaded: an engine that prefills as well must find none of it in its prefix cache.
        prompt = tokens_input(list(request.prompt_token_ids), cache_salt=request.load_transfer)
        first = True
        self._in_flight += 1
        try:
            async with (
                self._admission.inside(),
                aclosing(self._llm.generate(prompt, params, request.request_id)) as outputs,
            ):
                async for output in outputs:
                    yield _output(output, request.sampling.logprobs, output.num_cached_tokens if first else 0)
                    first = False
        except HexgenError:
            raise
        except Exception as error:
            raise _translate(error) from error
        finally:
            self._in_flight -= 1

    def _check(self, request: EngineRequest) -> None:
        """What vLLM does not check when it has no tokenizer, and would die of."""
        if self._llm is None:
            raise EngineFailed("the engine is not running")
        prompt = request.prompt_token_ids
        if not prompt:
            raise InvalidRequest("prompt_token_ids", "must not be empty")
        if len(prompt) >= self.max_model_len:
            raise InvalidRequest(
                "prompt_token_ids", f"{len(prompt)} tokens; at most {self.max_model_len - 1} leave room for an answer"
            )
        limit = self.model.vocab_size
        bad = [t for t in (*prompt, *request.sampling.stop_token_ids) if not 0 <= t < limit]
        if bad:
            raise InvalidRequest("prompt_token_ids", f"token {bad[0]} is not in the vocabulary of {limit}")
        if request.sampling.json_schema is not None and self._args["skip_tokenizer_init"]:
            raise InvalidRequest("sampling.json_schema", "this replica has no tokenizer to hold an answer to a schema")

    async def check_health(self) -> None:
        """Raise EngineFailed when the engine is dead."""
        if self._llm is None:
            raise EngineFailed("the engine is not running")
        try:
            await self._llm.check_health()
        except Exception as error:
            raise _translate(error) from error

    def num_requests(self) -> tuple[int, int]:
        """Requests running and waiting, the latter with those on their way to the engine."""
        running = min(self._stats.num_running, self._in_flight)
        return running, self._in_flight - running

    @property
    def bounds(self) -> tuple[Limits, Limits]:
        """See ``base.Adaptable``. Tokens of a step stay as vLLM was started with."""
        return Limits(1, self._most.max_num_batched_tokens), self._most

    def limit(self, limits: Limits) -> None:
        """See ``base.Adaptable``."""
        self._admission.limit = limits.max_num_seqs

    @property
    def kv_cache_usage(self) -> float:
        """Share of the engine's blocks in use after the last step, 0 to 1."""
        return self._stats.kv_cache_usage

    async def stop(self) -> None:
        """Stop every process of the engine. Idempotent."""
        llm, self._llm = self._llm, None
        if llm is not None:
            if llm.output_handler is not None and not self._in_flight:
                # Else it takes the end for a failure, and logs it as one. Requests that still run need to hear of it.
                llm.output_handler.cancel()
            await asyncio.to_thread(llm.shutdown, STOP_TIMEOUT_S)
            # Its finaliser would do it again, and fail when it runs as late as the interpreter's end.
            llm.shutdown = lambda timeout=None: None


class _Stats:
    """What vLLM says of itself after each step."""

    def __init__(self) -> None:
        self.num_running = 0
        self.kv_cache_usage = 0.0

    def factory(self, _vllm_config: Any, _engine_index: int = 0) -> "_Stats":
        """What vLLM calls a stat logger factory."""
        return self

    def record(self, scheduler_stats: Any, iteration_stats: Any, *_: Any, **__: Any) -> None:
        """One step."""
        if scheduler_stats is not None:
            self.num_running = scheduler_stats.num_running_reqs
            self.kv_cache_usage = scheduler_stats.kv_cache_usage

    def log_engine_initialized(self) -> None:
        """Nothing to say."""

    def log(self) -> None:
        """Nothing to say."""


def _output(output: Any, num_top: int | None, cached_tokens: int) -> EngineOutput:
    completion = output.outputs[0]
    reason = completion.finish_reason
    if reason is not None and reason not in _FINISH:
        # "error": its KV was not there to load; "abort": not by us, or nobody would listen.
        raise EngineFailed(f"vLLM ended the request: {reason}")
    logprobs = completion.logprobs if num_top is not None else None
    tokens = (
        SampledToken(token_id) if logprobs is None else _sampled(token_id, logprobs[i], num_top or 0)
        for i, token_id in enumerate(completion.token_ids)
    )
    return EngineOutput(tuple(tokens), _FINISH.get(reason), cached_tokens)


def _sampled(token_id: int, candidates: Any, num_top: int) -> SampledToken:
    ranked: Iterable[Logprob] = (Logprob(int(t), float(c.logprob), int(c.rank)) for t, c in candidates.items())
    top = tuple(sorted((c for c in ranked if c.rank <= num_top), key=lambda c: c.rank))
    return SampledToken(int(token_id), float(candidates[token_id].logprob), top)


def _translate(error: Exception) -> HexgenError:
    """vLLM's errors as ours; ours pass."""
    from vllm.exceptions import VLLMClientError

    if isinstance(error, HexgenError):
        return error
    if isinstance(error, (VLLMClientError, ValueError)):
        return invalid("sampling", error)
    cause = error.__cause__ or error
    return EngineFailed(f"vLLM failed: {type(cause).__name__}: {_one_line(cause)}")


def _one_line(error: BaseException) -> str:
    """The reason alone: pydantic adds the values it saw, which are those of every argument."""
    details = error.errors() if isinstance(error, ValidationError) else ()
    text = "; ".join(detail["msg"] for detail in details) or str(error)
    return " ".join(text.split())[:500]
