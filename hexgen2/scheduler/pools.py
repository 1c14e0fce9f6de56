"""How much of decode's memory staging takes: KV is in it while it is made, travels, and is taken in by the engine."""

from typing import Any

from hexgen2.kv.wire import CHUNK_TOKENS

#: The hand-off's memory that the cost model has set aside already, per GPU: ``KvConfig.send_bytes``.
RESERVED_BYTES = 256 << 20
#: Prompts that staging holds beyond what the planned flow keeps in it: arrivals come in bunches.
SPARE_PROMPTS = 2
#: Of an engine's KV beyond the longest request: a block that is never used, one that is rounded down, and the page that
#: the pool of the role that a replica has not has at least.
SPARE_TOKENS = 3 * CHUNK_TOKENS
#: Steps of decode that KV is held in staging for: the one under way, and its own.
STEPS_HELD = 2


def staging_tokens(mean_prompt_tokens: float, held_prompts: Any) -> Any:
    """Of staging that ``held_prompts`` are in on average (Little's law), and room for a few more, in whole pages."""
    return (SPARE_PROMPTS + held_prompts) * (mean_prompt_tokens + CHUNK_TOKENS)
