"""The hand-over's memory of a planned replica: what the plan says in tokens, in bytes of its engine's KV."""

from hexgen2.config import EmulatedEngineConfig, EngineConfig, KvConfig
from hexgen2.devices import cpu_share
from hexgen2.errors import ConfigError
from hexgen2.kv.layout import rank_slices
from hexgen2.kv.wire import ITEM_BYTES, KvShape, PageLayout, num_chunks
from hexgen2.llm import Llm, find
from hexgen2.model import load_model
from hexgen2.placement import ReplicaPlan


def planned_pools(kv: KvConfig, engine: EngineConfig, replica: ReplicaPlan, model: Llm | None = None) -> KvConfig:
    """``kv`` with the plan's sizes, per rank, where the caller has set none.

    ``model``: where the engine's folder is not on this machine. Emulated engines, whose KV is small, keep at least the
    usual memory. Raises ConfigError for a model that cannot be read.
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
        dtype = "float32" if engine.dtype == "auto" and on_cpu else engine.dtype
        shape = load_model(engine.model, dtype).kv_shape if model is None else _shape(model, dtype)
        layers = [stage.num_layers for stage in replica.stages]
        slices = rank_slices(layers, shape.num_kv_heads, engine.tensor_parallel_size)
    page_bytes = max(PageLayout(shape, each).page_bytes for each in slices)
    update = {}
    for name, tokens in (("send_bytes", replica.engine.send_tokens), ("staging_bytes", replica.engine.staging_tokens)):
        if name not in kv.model_fields_set:
            planned = num_chunks(tokens) * page_bytes
            update[name] = max(planned, getattr(kv, name)) if emulated else planned
    return kv.model_copy(update=update)


def _shape(model: Llm, dtype: str) -> KvShape:
    own = model.kv_dtype if model.kv_dtype in ITEM_BYTES else "bfloat16"
    return KvShape(model.num_layers, model.num_kv_heads, model.head_dim, own if dtype == "auto" else dtype)


def catalog_model(name: str) -> Llm | None:
    """The model that a plan names, where this machine knows it."""
    try:
        return find(name)
    except ConfigError:
        return None
