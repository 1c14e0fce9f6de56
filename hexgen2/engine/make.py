"""The engine that a worker's configuration asks for. Imports the heavy one only when it is asked for."""

from pathlib import Path

from hexgen2.config import EmulatedEngineConfig, WorkerConfig
from hexgen2.engine.base import Engine
from hexgen2.kv.choose import transport_name


def make_engine(config: WorkerConfig, agent_socket: Path) -> tuple[Engine, int]:
    """The engine, not yet started, and how many ranks (and so KV agents) it has.

    Raises:
        ConfigError: its KV cannot travel as configured, or its model cannot be served.
    """
    engine = config.engine
    # Before anything heavy is loaded.
    transport_name(config.kv, config.tls)
    if isinstance(engine, EmulatedEngineConfig):
        from hexgen2.engine.emulated import EmulatedEngine

        return EmulatedEngine(engine, config.kv, agent_socket, config.tls), engine.tensor_parallel_size
    from hexgen2.engine.vllm import VllmEngine

    num_ranks = engine.tensor_parallel_size * engine.pipeline_parallel_size
    return VllmEngine(engine, config.kv, config.role, agent_socket, config.tls), num_ranks
