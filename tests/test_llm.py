"""Models for planning: sizes from the catalog and from config.json."""

import json
from pathlib import Path
from typing import Any

import pytest

from hexgen2 import catalog, llm
from hexgen2.errors import ConfigError

LLAMA_70B = {
    "model_type": "llama",
    "num_hidden_layers": 80,
    "hidden_size": 8192,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "intermediate_size": 28672,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "torch_dtype": "float16",
}


def config(folder: Path, **fields: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**LLAMA_70B, **fields}))
    return path


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("llama-2-7b", 6.74),
        ("llama-2-13b", 13.02),
        ("llama-2-70b", 68.98),
        ("llama-3.1-8b", 8.03),
        ("llama-3.1-70b", 70.55),
        ("opt-30b", 29.97),
        ("qwen3-8b", 8.19),
        ("qwen3-32b", 32.76),
        ("mixtral-8x7b", 46.70),
    ],
)
def test_catalog_models_have_as_many_parameters_as_they_are_known_for(name: str, billions: float) -> None:
    assert llm.find(name).weight_bytes / 2e9 == pytest.approx(billions, rel=0.005)


def test_every_catalog_model_can_be_found() -> None:
    for name in catalog.names("models"):
        assert llm.find(name).name == name


def test_kv_of_grouped_heads_is_smaller_than_that_of_a_smaller_model_without_groups() -> None:
    assert llm.find("llama-2-70b").kv_bytes_per_token == 327_680
    assert llm.find("opt-30b").kv_bytes_per_token == 1_376_256


def test_kv_follows_its_dtype_and_weights_follow_theirs() -> None:
    plain, small = llm.find("llama-2-70b"), llm.find("llama-2-70b", weight_dtype="int4", kv_dtype="fp8")
    assert small.kv_bytes_per_token * 2 == plain.kv_bytes_per_token
    assert small.layer_bytes == pytest.approx(plain.layer_bytes * 0.53125 / 2)
    assert small.embedding_bytes == plain.embedding_bytes


def test_a_config_json_gives_the_same_model_as_the_catalog(tmp_path: Path) -> None:
    found, known = llm.find(config(tmp_path)), llm.find("llama-2-70b")
    assert found.weight_bytes == known.weight_bytes
    assert found.kv_bytes_per_token == known.kv_bytes_per_token
    assert llm.find(tmp_path) == found


def test_a_config_json_with_experts_and_quantised_weights(tmp_path: Path) -> None:
    path = config(
        tmp_path,
        num_local_experts=8,
        num_experts_per_tok=2,
        quantization_config={"quant_method": "awq", "bits": 4},
    )
    found = llm.find(path)
    assert (found.num_experts, found.num_experts_per_token) == (8, 2)
    assert (found.weight_dtype, found.kv_dtype) == ("int4", "bfloat16")


def test_opt_has_two_matrices_and_one_embedding(tmp_path: Path) -> None:
    found = llm.find(config(tmp_path, model_type="opt", intermediate_size=None, ffn_dim=28672))
    assert not found.gated_mlp
    assert found.tie_word_embeddings
    assert found.intermediate_size == 28672


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hidden_layers": None}, "config.json: num_hidden_layers: missing"),
        ({"hidden_size": -1}, "config.json: hidden_size: -1 is not a positive number"),
        ({"kv_lora_rank": 512}, "config.json: kv_lora_rank: models with latent attention"),
        ({"n_shared_experts": 1}, "config.json: n_shared_experts: layers beside the experts"),
        ({"is_encoder_decoder": True}, "config.json: is_encoder_decoder: only decoder models"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "config.json: layer_types: linear_attention: only"),
        ({"torch_dtype": "float8"}, "config.json: torch_dtype: 'float8'"),
        ({"quantization_config": {"quant_method": "gguf"}}, "config.json: quantization_config.quant_method: 'gguf'"),
        ({"num_key_value_heads": 7}, "config.json: num_heads: 64 is no multiple of num_kv_heads 7"),
    ],
)
def test_a_config_that_says_too_little_is_told_by_file_and_field(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        llm.find(config(tmp_path, **fields))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_model_is_told_with_the_likely_one() -> None:
    with pytest.raises(ConfigError, match="did you mean `llama-2-70b`"):
        llm.find("llama2-70b")


def test_tensor_parallelism_must_divide_heads() -> None:
    model = llm.find("llama-2-70b")
    assert [size for size in range(1, 17) if model.allows_tensor_parallel_size(size)] == [1, 2, 4, 8, 16]
