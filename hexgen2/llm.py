"""A model as a planner sees it: shapes, bytes and operations; from a catalog name or a Hugging Face config.json.

Sizes follow the real matrices (grouped-query heads, gated or plain MLP, experts), not the 12 H^2 of the paper's
section 3, which is 6 % low for Llama-2.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from hexgen2 import catalog
from hexgen2.config_file import build, did_you_mean, dotted
from hexgen2.errors import ConfigError
from hexgen2.model import read_json

#: Bytes of one element, with the scales that a quantised format keeps beside its values.
BYTES: Mapping[str, float] = {
    "float32": 4.0,
    "bfloat16": 2.0,
    "float16": 2.0,
    "fp8": 1.0,
    "int8": 1.0,
    "int4": 0.53125,  # groups of 128 with a 16-bit scale and zero
}

DType = Literal["float32", "bfloat16", "float16", "fp8", "int8", "int4"]
KvDType = Literal["float32", "bfloat16", "float16", "fp8", "int8"]

#: Model types whose MLP has two matrices instead of three.
PLAIN_MLP = frozenset({"opt", "gpt2", "gpt_neox", "falcon", "bloom"})

#: Of a config.json's quantisation methods: what their weights are kept in.
QUANT = {"gptq": "int4", "awq": "int4", "fp8": "fp8", "compressed-tensors": "fp8"}


class Llm(BaseModel):
    """A decoder-only transformer. ``weight_dtype`` and ``kv_dtype`` are as served; activations have two bytes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    repository: str = Field("", description="where the shapes come from")
    num_layers: int = Field(ge=1)
    hidden_size: int = Field(ge=1)
    num_heads: int = Field(ge=1)
    num_kv_heads: int = Field(ge=1)
    head_dim: int = Field(ge=1)
    intermediate_size: int = Field(ge=1, description="of one expert where there are several")
    vocab_size: int = Field(ge=1)
    max_position_embeddings: int = Field(ge=1)
    gated_mlp: bool = True
    tie_word_embeddings: bool = False
    num_experts: int = Field(1, ge=1)
    num_experts_per_token: int = Field(1, ge=1)
    weight_dtype: DType = "bfloat16"
    kv_dtype: KvDType = "bfloat16"

    @model_validator(mode="after")
    def _check(self) -> "Llm":
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads: {self.num_heads} is no multiple of num_kv_heads {self.num_kv_heads}")
        if self.num_experts_per_token > self.num_experts:
            raise ValueError(f"num_experts_per_token: {self.num_experts_per_token} of {self.num_experts} experts")
        return self

    @property
    def weight_bytes_per_element(self) -> float:
        """Of the layers' matrices; embedding and head stay in 16 bits when these are quantised."""
        return BYTES[self.weight_dtype]

    @property
    def attention_elements(self) -> int:
        """Elements of one layer's attention matrices (query, key, value, output)."""
        return self.hidden_size * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)

    @property
    def expert_elements(self) -> int:
        """Elements of one expert's matrices, or of the layer's MLP."""
        return (3 if self.gated_mlp else 2) * self.hidden_size * self.intermediate_size

    @property
    def layer_bytes(self) -> float:
        """Weights of one layer, all experts."""
        router = self.num_experts * self.hidden_size if self.num_experts > 1 else 0
        elements = self.attention_elements + self.num_experts * self.expert_elements + router
        return elements * self.weight_bytes_per_element

    @property
    def embedding_bytes(self) -> float:
        """Weights of the embedding; the output head has as many."""
        return self.vocab_size * self.hidden_size * max(2.0, min(4.0, self.weight_bytes_per_element))

    @property
    def weight_bytes(self) -> float:
        """Weights of the whole model on one GPU (tied embeddings once)."""
        return self.num_layers * self.layer_bytes + self.embedding_bytes * (1 if self.tie_word_embeddings else 2)

    @property
    def kv_bytes_per_token_layer(self) -> float:
        """Keys and values of one token in one layer, all heads."""
        return 2 * self.num_kv_heads * self.head_dim * BYTES[self.kv_dtype]

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of one token in all layers."""
        return int(self.num_layers * self.kv_bytes_per_token_layer)

    def allows_tensor_parallel_size(self, size: int) -> bool:
        """Whether every matrix divides: query heads by ``size``, KV heads by it or it by them, MLP columns by it."""
        kv_divides = self.num_kv_heads % size == 0 or size % self.num_kv_heads == 0
        return self.num_heads % size == 0 and kv_divides and self.intermediate_size % size == 0


def find(name_or_path: str | Path, *, weight_dtype: str | None = None, kv_dtype: str | None = None) -> Llm:
    """A model by catalog name, or from a Hugging Face ``config.json`` or the folder that holds it.

    ``weight_dtype`` and ``kv_dtype`` replace what it is published in (KV follows 16-bit weights otherwise).

    Raises:
        ConfigError: neither a name nor a file, or a config that says too little; names file and field.
    """
    path = Path(name_or_path)
    if path.is_dir():
        path = path / "config.json"
    if path.suffix == ".json" or path.is_file():
        fields, where = _from_config(path), str(path)
    else:
        fields, where = _from_catalog(str(name_or_path)), f"model {name_or_path}"
    if weight_dtype is not None:
        fields["weight_dtype"] = weight_dtype
    if kv_dtype is not None:
        fields["kv_dtype"] = kv_dtype
    return build(Llm, fields, lambda place: f"{where}: {dotted(place)}: " if place else f"{where}: ")


def _from_catalog(name: str) -> dict[str, Any]:
    models = catalog.table("models")["models"]
    known = {key.casefold(): key for key in models}
    key = known.get(name.casefold())
    if key is None:
        raise ConfigError(
            f"model: no `{name}` in the catalog, nor a config.json there; {did_you_mean(name, list(models))}"
        )
    return {"name": key, **models[key]}


def _from_config(path: Path) -> dict[str, Any]:
    config = read_json(path)
    text = config.get("text_config", config)
    if not isinstance(text, dict):
        raise ConfigError(f"{path}: text_config: not a mapping")
    _refuse_unknown_kinds(path, text)
    kind = str(text.get("model_type", ""))
    heads, hidden = _count(path, text, "num_attention_heads"), _count(path, text, "hidden_size")
    experts = next((text[key] for key in ("num_local_experts", "num_experts", "n_routed_experts") if text.get(key)), 1)
    ffn = next((key for key in ("moe_intermediate_size", "intermediate_size", "ffn_dim") if text.get(key)), None)
    dtype = _dtype(path, config, text)
    return {
        "name": path.parent.resolve().name if path.name == "config.json" else path.stem,
        "repository": str(config.get("_name_or_path", "")),
        "num_layers": _count(path, text, "num_hidden_layers"),
        "hidden_size": hidden,
        "num_heads": heads,
        "num_kv_heads": _count(path, text, "num_key_value_heads") if text.get("num_key_value_heads") else heads,
        "head_dim": _count(path, text, "head_dim") if text.get("head_dim") else hidden // heads,
        "intermediate_size": _count(path, text, ffn or "intermediate_size"),
        "vocab_size": _count(path, text, "vocab_size"),
        "max_position_embeddings": _count(path, text, "max_position_embeddings"),
        "gated_mlp": kind not in PLAIN_MLP,
        "tie_word_embeddings": bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", kind == "opt"))),
        "num_experts": experts,
        "num_experts_per_token": text.get("num_experts_per_tok", 1),
        "weight_dtype": dtype,
        "kv_dtype": "bfloat16" if BYTES[dtype] < 2 else dtype,
    }


def _refuse_unknown_kinds(path: Path, config: Mapping[str, Any]) -> None:
    """What would make these sizes wrong in silence."""
    if "kv_lora_rank" in config:
        raise ConfigError(f"{path}: kv_lora_rank: models with latent attention (MLA) are not supported yet")
    for field in ("shared_expert_intermediate_size", "n_shared_experts", "mlp_only_layers"):
        if config.get(field):
            raise ConfigError(f"{path}: {field}: layers beside the experts are not supported yet")
    if config.get("is_encoder_decoder"):
        raise ConfigError(f"{path}: is_encoder_decoder: only decoder models are supported")
    if other := sorted(
        {str(kind) for kind in config.get("layer_types") or ()} - {"full_attention", "sliding_attention"}
    ):
        raise ConfigError(f"{path}: layer_types: {', '.join(other)}: only attention layers are supported")


def _count(path: Path, config: Mapping[str, Any], field: str) -> int:
    value = config.get(field)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{path}: {field}: {'missing' if value is None else f'{value!r} is not a positive number'}")
    return value


def _dtype(path: Path, config: Mapping[str, Any], text: Mapping[str, Any]) -> str:
    quantised = config.get("quantization_config") or text.get("quantization_config")
    if isinstance(quantised, Mapping):
        method = str(quantised.get("quant_method", ""))
        if method not in QUANT:
            raise ConfigError(
                f"{path}: quantization_config.quant_method: '{method}'; {did_you_mean(method, list(QUANT))}"
            )
        bits = quantised.get("bits")
        return "int8" if QUANT[method] == "int4" and bits == 8 else QUANT[method]
    for part in (text, config):
        for field in ("dtype", "torch_dtype"):
            if part.get(field) is not None:
                name = str(part[field]).removeprefix("torch.")
                if name not in BYTES:
                    raise ConfigError(f"{path}: {field}: '{name}'; {did_you_mean(name, list(BYTES))}")
                return name
    return "float32"
