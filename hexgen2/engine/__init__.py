"""Engines: one Protocol, vLLM and an emulated one."""
