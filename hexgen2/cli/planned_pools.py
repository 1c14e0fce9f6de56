"""The hand-over's memory of a planned replica: what the plan says in tokens, in bytes of its engine's KV."""

from hexgen2.config import EmulatedEngineConfig, EngineConfig, KvConfig
from hexgen2.devices import cpu_share
from hexgen2.kv.layout import rank_slices
from hexgen2.kv.wire import KvShape, PageLayout, num_chunks
from hexgen2.model import load_model
from hexgen2.placement import ReplicaPlan


def planned_pools(kv: KvConfig, engine: EngineConfig, replica: ReplicaPlan) -> KvConfig:
    """``kv`` with the plan's sizes, per rank, where the caller has set none.

    Emulated engines, whose KV is small, keep at least the usual memory. Raises ConfigError for a model that cannot be
    read.
    """
    if replica.engine is None:
        return kv
    emulated = isinstance(engine, EmulatedEngineConfig)
    if isinstance(engine, EmulatedEngineConfig):
        shape = KvShape(engine.num_layers, engine.num_kv_heads, engine.head_dim, engine.dtype)
        slices = rank_slices([engine.num_layers], engine.num_kv_heads, engine.tensor_parallel_size)
    else:
        # As workers resolve `auto`: float32 on CPU cores, else the model's own.
        on_cpu = cpu_share(replica.stages[0].gpu) is not None
        shape = load_model(engine.model, "float32" if engine.dtype == "auto" and on_cpu else engine.dtype).kv_shape
        layers = [stage.num_layers for stage in replica.stages]
        slices = rank_slices(layers, shape.num_kv_heads, engine.tensor_parallel_size)
    page_bytes = max(PageLayout(shape, each).page_bytes for each in slices)
    update = {}
    for name, tokens in (("send_bytes", replica.engine.send_tokens), ("staging_bytes", replica.engine.staging_tokens)):
        if name not in kv.model_fields_set:
            planned = num_chunks(tokens) * page_bytes
            update[name] = max(planned, getattr(kv, name)) if emulated else planned
    return kv.model_copy(update=update)
