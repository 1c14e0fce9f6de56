"""What is known of a model from its Hugging Face folder: shape, limits, identity. Pure but for reading the folder."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

from hexgen2.errors import ConfigError
from hexgen2.kv.wire import ITEM_BYTES, KvShape

#: Of each weight file: so many evenly spaced samples of so many bytes go into the model's hash.
SAMPLES = 64
SAMPLE_BYTES = 4096

#: A safetensors header is a few megabytes at most; a larger one is not a header.
MAX_HEADER_BYTES = 100 << 20


class _Hash(Protocol):
    def update(self, data: bytes, /) -> None: ...


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A model as served. ``sha256`` names config and weights: two replicas with the same hash have the same model."""

    name: str
    sha256: bytes
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    #: Of weights and KV as served.
    dtype: str

    @property
    def kv_shape(self) -> KvShape:
        """KV of the whole model."""
        return KvShape(self.num_layers, self.num_kv_heads, self.head_dim, self.dtype)


def load_model(folder: Path, dtype: str = "auto") -> ModelSpec:
    """Read what ``folder`` says of its model, to be served in ``dtype`` ("auto": the folder's own).

    Raises:
        ConfigError: the folder is not one, lacks config.json or weights, or holds a model that cannot be served.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such model folder (`hexgen2 model prepare` makes the default one)")
    path = folder / "config.json"
    config = read_json(path)
    # Models of several modalities keep the language model's part apart.
    text = config.get("text_config", config)
    if not isinstance(text, Mapping):
        raise ConfigError(f"{path}: text_config: not a mapping")
    if "kv_lora_rank" in text:
        raise ConfigError(f"{path}: kv_lora_rank: models with latent attention (MLA) are not supported yet")
    num_heads = _count(path, text, "num_attention_heads")
    # Both may be absent or null; then transformers has the same defaults.
    grouped, wide = text.get("num_key_value_heads") is not None, text.get("head_dim") is not None
    return ModelSpec(
        name=folder.resolve().name,
        sha256=fingerprint(folder),
        num_layers=_count(path, text, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=_count(path, text, "num_key_value_heads") if grouped else num_heads,
        head_dim=_count(path, text, "head_dim") if wide else _count(path, text, "hidden_size") // num_heads,
        vocab_size=_count(path, text, "vocab_size"),
        max_position_embeddings=_count(path, text, "max_position_embeddings"),
        dtype=_dtype(path, config, text) if dtype == "auto" else _known_dtype("dtype", dtype),
    )


def fingerprint(folder: Path) -> bytes:
    """SHA-256 that names the model in ``folder``; reads at most 256 KiB and the header of each weight file.

    Covered: config.json, and of each safetensors file its name, its size, its header (every tensor's name, dtype,
    shape and place) and 64 evenly spaced samples of 4 KiB, or all of it when it is no larger than these. So another
    model, size, precision, quantisation or training run is seen (it changes nearly every weight), and so is a file that
    is missing or cut short. A few weights changed between the samples are not: this tells models apart, it is no
    proof against tampering.
    """
    digest = sha256((folder / "config.json").read_bytes())
    for path in weight_files(folder):
        try:
            size = path.stat().st_size
            digest.update(f"\0{path.name}\0{size}\0".encode())
            _sample(path, size, digest)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    return digest.digest()


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of a model, sorted: those its index names, or all when it has none."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ConfigError(f"{index}: weight_map: missing or empty")
        paths = tuple(folder / name for name in sorted({str(name) for name in weight_map.values()}))
    else:
        paths = tuple(sorted(folder.glob("*.safetensors")))
    if not paths:
        raise ConfigError(f"{folder}: no *.safetensors weight files")
    if missing := [path.name for path in paths if not path.is_file()]:
        raise ConfigError(f"{folder}: weight files missing: {', '.join(missing)}")
    return paths


def _sample(path: Path, size: int, digest: _Hash) -> None:
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if not 2 <= header_bytes <= min(size - 8, MAX_HEADER_BYTES):
            raise ConfigError(f"{path}: not a safetensors file, or cut short")
        digest.update(file.read(header_bytes))
        data_bytes = size - 8 - header_bytes
        if data_bytes <= SAMPLES * SAMPLE_BYTES:
            digest.update(file.read())
            return
        start = file.tell()
        for number in range(SAMPLES):
            file.seek(start + number * (data_bytes - SAMPLE_BYTES) // (SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))


def read_json(path: Path) -> Mapping[str, Any]:
    """A JSON object in a file. Raises ConfigError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: not a JSON object")
    return value


def _count(path: Path, config: Mapping[str, Any], field: str) -> int:
    value = config.get(field)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{path}: {field}: {'missing' if value is None else f'{value!r} is not a positive number'}")
    return value


def _dtype(path: Path, config: Mapping[str, Any], text: Mapping[str, Any]) -> str:
    # Newer writers say dtype, older ones torch_dtype; without either a model is in float32, as transformers has it.
    for part in (text, config):
        for field in ("dtype", "torch_dtype"):
            if part.get(field) is not None:
                return _known_dtype(f"{path}: {field}", part[field])
    return "float32"


def _known_dtype(where: str, value: object) -> str:
    name = str(value).removeprefix("torch.")
    if name not in ITEM_BYTES:
        raise ConfigError(f"{where}: {value!r} is not one of auto, {', '.join(ITEM_BYTES)}")
    return name
