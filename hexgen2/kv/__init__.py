"""The KV hand-off: what is moved, who holds it, how it travels."""
