"""Text to tokens and back. No torch, no transformers."""
