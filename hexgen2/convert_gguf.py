"""Turns a GGUF file into a Hugging Face folder of float32 weights: ``python -m hexgen2.convert_gguf GGUF FOLDER``.

A program of its own: torch and transformers take gigabytes while they work, and the caller shows progress meanwhile.
"""

import sys
from pathlib import Path

from hexgen2.engine.vllm_env import unusable_packages


def main(gguf: Path, folder: Path) -> None:
    """Write ``folder``: weights, config, generation config, tokenizer and chat template."""
    for name in unusable_packages():
        # As if it were not installed: transformers fails when it meets one that does not load.
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # Without dequantize, transformers keeps packed blocks, which it cannot save.
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    ).to(torch.float32)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.dtype = torch.float32
    # vLLM ends answers at this token; the GGUF's metadata names it only for the tokenizer.
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
