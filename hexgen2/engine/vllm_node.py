"""Ranks of vLLM's multi-node executor on a machine that is not the first: ``python -m hexgen2.engine.vllm_node``.

What vLLM's own ``vllm serve --headless`` does for a node without an API server, with our connector in each rank.
"""

import sys
from pathlib import Path

from hexgen2.config import NodeConfig
from hexgen2.engine.vllm_args import engine_args
from hexgen2.engine.vllm_env import is_cpu, prepare
from hexgen2.engine.vllm_network import choose


def main() -> None:
    """Entry point: the node's configuration (JSON) and the socket of its KV agents; returns when a rank has ended."""
    config = NodeConfig.model_validate_json(Path(sys.argv[1]).read_text(encoding="utf-8"))
    cpu = is_cpu()
    prepare(config.engine.omp_num_threads, cpu=cpu)
    choose(config.engine.master_addr, config.engine.master_port)
    args = engine_args(config.engine, config.kv, "flexible", Path(sys.argv[2]), cpu=cpu, tls=config.tls)
    from vllm import AsyncEngineArgs
    from vllm.v1.executor.multiproc_executor import MultiprocExecutor

    vllm_config = AsyncEngineArgs(**args).create_engine_config(headless=True)
    executor = MultiprocExecutor(vllm_config, monitor_workers=False)
    executor.start_worker_monitor(inline=True)
    sys.exit("a rank has ended")


if __name__ == "__main__":
    main()
