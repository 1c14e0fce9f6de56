"""Makes small random Llama models in Hugging Face form: real files, a real tokenizer, milliseconds to run."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
EOS_TOKEN_ID = 2

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tiny_llama(
    folder: Path,
    *,
    num_layers: int = 4,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 32,
    max_position_embeddings: int = 2048,
    vocab_size: int | None = None,
    seed: int = 0,
) -> Path:
    """Write a random model whose tokens are the 256 bytes and three special ones; return ``folder``.

    ``head_dim`` must be one that vLLM's CPU attention takes (32, 64, 80, 96, ...). ``vocab_size`` may be larger than
    the tokenizer's. The same arguments give the same bytes. Weights are wider than an initialiser's, so that the answer
    depends visibly on every part of the KV.
    """
    folder.mkdir(parents=True, exist_ok=True)
    num_known = _save_tokenizer(folder)
    vocab_size = vocab_size or num_known
    hidden, intermediate = num_heads * head_dim, 2 * num_heads * head_dim
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": max_position_embeddings,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "tie_word_embeddings": False,
        "vocab_size": vocab_size,
        "bos_token_id": 1,
        "eos_token_id": EOS_TOKEN_ID,
        "pad_token_id": EOS_TOKEN_ID,
    }
    _save_json(folder / "config.json", config)
    _save_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": EOS_TOKEN_ID})
    random = np.random.default_rng(seed)

    def matrix(rows: int, columns: int, gain: float = 1.0) -> np.ndarray[Any, np.dtype[np.float32]]:
        return np.asarray(random.standard_normal((rows, columns)) * (gain / columns**0.5), np.float32)

    ones = np.ones(hidden, np.float32)
    weights = {
        "model.embed_tokens.weight": matrix(vocab_size, hidden, gain=hidden**0.5),
        "model.norm.weight": ones,
        "lm_head.weight": matrix(vocab_size, hidden, gain=3.0),
    }
    for number in range(num_layers):
        layer = f"model.layers.{number}."
        weights |= {
            layer + "input_layernorm.weight": ones,
            layer + "post_attention_layernorm.weight": ones,
            layer + "self_attn.q_proj.weight": matrix(num_heads * head_dim, hidden, gain=2.0),
            layer + "self_attn.k_proj.weight": matrix(num_kv_heads * head_dim, hidden, gain=2.0),
            layer + "self_attn.v_proj.weight": matrix(num_kv_heads * head_dim, hidden, gain=2.0),
            layer + "self_attn.o_proj.weight": matrix(hidden, num_heads * head_dim, gain=2.0),
            layer + "mlp.gate_proj.weight": matrix(intermediate, hidden),
            layer + "mlp.up_proj.weight": matrix(intermediate, hidden),
            layer + "mlp.down_proj.weight": matrix(hidden, intermediate),
        }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _save_tokenizer(folder: Path) -> int:
    """A byte-level tokenizer without merges, as tokenizer.json and its companions; returns the vocabulary's size."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = (*SPECIAL_TOKENS, *alphabet)
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    _save_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": SPECIAL_TOKENS[1],
            "eos_token": SPECIAL_TOKENS[EOS_TOKEN_ID],
            "pad_token": SPECIAL_TOKENS[EOS_TOKEN_ID],
        },
    )
    return tokenizer.get_vocab_size()


def _save_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
