"""Translates our configuration and sampling into vLLM's. Imports vLLM only to build its own types."""

from pathlib import Path
from typing import Any, Literal

from hexgen2.config import GIB, KvConfig, TlsConfig, VllmEngineConfig
from hexgen2.engine.base import EngineRequest, Sampling
from hexgen2.errors import InvalidRequest
from hexgen2.kv.choose import transport_name

Role = Literal["prefill", "decode", "flexible"]

_KV_ROLES = {"prefill": "kv_producer", "decode": "kv_consumer", "flexible": "kv_both"}

CPU_KV_CACHE_BYTES = GIB
#: A step cannot be interrupted: on a CPU larger ones would make others wait for seconds.
CPU_MAX_NUM_BATCHED_TOKENS = 256
CPU_BLOCK_SIZE = 128

#: One rank lives in the engine core's process. By its name, because vLLM on a CPU reads "uni" as "mp".
UNI_EXECUTOR = "vllm.v1.executor.uniproc_executor.UniProcExecutor"


def served_dtype(config: VllmEngineConfig, cpu: bool) -> str:
    """``auto`` is float32 on a CPU and the model's own on a GPU."""
    return "float32" if config.dtype == "auto" and cpu else config.dtype


def engine_args(
    config: VllmEngineConfig,
    kv: KvConfig,
    role: Role,
    agent_socket: Path,
    *,
    cpu: bool,
    tls: TlsConfig | None = None,
) -> dict[str, Any]:
    """Keyword arguments of ``vllm.EngineArgs``.

    Raises:
        ConfigError: a transport that is not installed.
    """
    num_ranks = config.tensor_parallel_size * config.pipeline_parallel_size
    args: dict[str, Any] = {
        "model": str(config.model),
        # Prefill never needs the tokenizer; decode does for answers bound to a JSON schema, if there is one.
        "skip_tokenizer_init": role == "prefill" or not (config.model / "tokenizer.json").exists(),
        "dtype": served_dtype(config, cpu),
        # -1: the model's own, or what KV memory holds of it.
        "max_model_len": config.max_model_len or -1,
        "max_num_seqs": config.max_num_seqs,
        "max_num_batched_tokens": config.max_num_batched_tokens,
        "tensor_parallel_size": config.tensor_parallel_size,
        "pipeline_parallel_size": config.pipeline_parallel_size,
        "distributed_executor_backend": "mp" if num_ranks > 1 else UNI_EXECUTOR,
        "block_size": config.block_size,
        "kv_cache_memory_bytes": config.kv_cache_bytes,
        "enable_chunked_prefill": True,
        # Decode takes all of a prompt's KV from prefill: a cache of its own would only hold it twice.
        "enable_prefix_caching": role != "decode",
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        "kv_transfer_config": {
            "kv_connector": "HexgenConnector",
            "kv_connector_module_path": "hexgen2.engine.vllm_connector",
            "kv_role": _KV_ROLES[role],
            "kv_load_failure_policy": "fail",
            "kv_connector_extra_config": {
                "agent_socket": str(agent_socket),
                "transport": transport_name(kv, tls),
                "tls": tls and tls.model_dump(mode="json"),
                "host": kv.host,
                "devices": kv.devices,
                "stall_s": kv.stall_s,
                "send_bytes": kv.send_bytes if role != "decode" else 0,
                "staging_bytes": kv.staging_bytes if role != "prefill" else 0,
                "landing_bytes": kv.landing_bytes if role != "prefill" else 0,
            },
        },
    }
    if config.nnodes > 1:
        for name in ("nnodes", "node_rank", "master_addr", "master_port"):
            args[name] = getattr(config, name)
    if cpu:
        args["enforce_eager"] = True
        args["block_size"] = config.block_size or CPU_BLOCK_SIZE
        args["kv_cache_memory_bytes"] = config.kv_cache_bytes or CPU_KV_CACHE_BYTES
        args["max_num_batched_tokens"] = config.max_num_batched_tokens or CPU_MAX_NUM_BATCHED_TOKENS
        if config.pipeline_parallel_size > 1:
            args["worker_cls"] = "hexgen2.engine.vllm_worker.PipelineCpuWorker"
    return {name: value for name, value in args.items() if value is not None}


def kv_transfer_params(request: EngineRequest) -> dict[str, str]:
    """What the connector reads of a request."""
    from hexgen2.engine.vllm_connector import LOAD_TRANSFER, SEND_TRANSFER

    params = {SEND_TRANSFER: request.send_transfer, LOAD_TRANSFER: request.load_transfer}
    return {name: value for name, value in params.items() if value is not None}


def sampling_params(request: EngineRequest) -> Any:
    """``vllm.SamplingParams`` of a request: tokens only, streamed as they come.

    Raises:
        InvalidRequest: a value outside its limits, with vLLM's own words.
    """
    from vllm import SamplingParams
    from vllm.exceptions import VLLMClientError
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    sampling: Sampling = request.sampling
    transfer = kv_transfer_params(request)
    try:
        return SamplingParams(
            max_tokens=sampling.max_tokens,
            min_tokens=sampling.min_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            # vLLM takes 64 bits with a sign, and -1 for no seed.
            seed=None if sampling.seed is None else sampling.seed % (1 << 63),
            ignore_eos=sampling.ignore_eos,
            stop_token_ids=list(sampling.stop_token_ids),
            logprobs=sampling.logprobs,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            repetition_penalty=sampling.repetition_penalty,
            structured_outputs=_structured(StructuredOutputsParams, sampling.json_schema),
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            extra_args={"kv_transfer_params": transfer} if transfer else None,
        )
    except (ValueError, TypeError, VLLMClientError) as error:
        raise invalid("sampling", error) from error


def invalid(field: str, error: Exception) -> InvalidRequest:
    """vLLM's complaint as ours: its first line, and the parameter it names."""
    parameter = getattr(error, "parameter", None)
    return InvalidRequest(f"{field}.{parameter}" if parameter else field, str(error).partition("\n")[0])


def _structured(kind: Any, json_schema: str | None) -> Any:
    if json_schema is None:
        return None
    return kind(json_object=True) if json_schema.strip() == "{}" else kind(json=json_schema)
