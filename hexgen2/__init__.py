"""HexGen-2: plan and serve large language models on GPUs that differ."""

__version__ = "0.1.0"
