import json
from pathlib import Path

import pytest

from hexgen2.errors import ConfigError
from hexgen2.kv.wire import KvShape
from hexgen2.model import load_model
from tests.models import make_tiny_llama


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_tiny_llama(tmp_path / "tiny", num_layers=3, num_heads=6, num_kv_heads=2, head_dim=32)


def edit_config(folder: Path, **fields: object) -> None:
    """Set fields of config.json; None removes the field."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


def test_a_model_is_read_from_its_folder(folder: Path) -> None:
    model = load_model(folder, "bfloat16")
    assert (model.name, model.vocab_size, model.max_position_embeddings) == ("tiny", 259, 2048)
    assert model.kv_shape == KvShape(num_layers=3, num_kv_heads=2, head_dim=32, dtype="bfloat16")
    assert model.kv_shape.bytes_per_token == 2 * 3 * 2 * 32 * 2


def test_auto_is_the_dtype_that_the_folder_names(folder: Path) -> None:
    edit_config(folder, dtype=None, torch_dtype="float16")
    assert load_model(folder, "auto").dtype == "float16"


def test_absent_head_fields_take_the_defaults_of_transformers(folder: Path) -> None:
    edit_config(folder, head_dim=None, num_key_value_heads=None)
    model = load_model(folder)
    assert (model.num_kv_heads, model.head_dim) == (6, 32)


def test_the_same_files_have_the_same_hash_wherever_they_lie(folder: Path, tmp_path: Path) -> None:
    again = make_tiny_llama(tmp_path / "again", num_layers=3, num_heads=6, num_kv_heads=2, head_dim=32)
    assert load_model(folder).sha256 == load_model(again).sha256


def test_other_weights_have_another_hash(folder: Path, tmp_path: Path) -> None:
    other = make_tiny_llama(tmp_path / "other", num_layers=3, num_heads=6, num_kv_heads=2, head_dim=32, seed=1)
    assert load_model(folder).sha256 != load_model(other).sha256


@pytest.mark.parametrize("offset", [0, -1])
def test_the_first_and_the_last_weight_count(folder: Path, offset: int) -> None:
    before = load_model(folder).sha256
    path = folder / "model.safetensors"
    raw = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    raw[start if offset == 0 else -1] ^= 1
    path.write_bytes(raw)
    assert load_model(folder).sha256 != before


def test_another_configuration_has_another_hash(folder: Path) -> None:
    before = load_model(folder).sha256
    edit_config(folder, rms_norm_eps=1e-6)
    assert load_model(folder).sha256 != before


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such model folder"):
        load_model(tmp_path / "absent")


def test_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"config\.json: no such file"):
        load_model(folder)


def test_config_that_is_not_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json: not JSON"):
        load_model(folder)


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"no \*\.safetensors"):
        load_model(folder)


def test_a_file_that_the_index_names_is_missing(folder: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=r"missing: model-00002\.safetensors"):
        load_model(folder)


def test_a_weight_file_that_is_cut_short(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ConfigError, match="cut short"):
        load_model(folder)


@pytest.mark.parametrize("value", [None, 0, -1, "30", True, 1.5])
def test_a_bad_field_is_named(folder: Path, value: object) -> None:
    edit_config(folder, num_hidden_layers=value)
    with pytest.raises(ConfigError, match=r"config\.json: num_hidden_layers: "):
        load_model(folder)


def test_unknown_dtypes_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="'int8' is not one of auto, float32"):
        load_model(folder, "int8")


def test_latent_attention_is_refused(folder: Path) -> None:
    edit_config(folder, kv_lora_rank=512)
    with pytest.raises(ConfigError, match="kv_lora_rank"):
        load_model(folder)
