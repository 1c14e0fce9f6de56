"""Request fields of the OpenAI and vLLM APIs beyond those that are served: what each may be. Pure.

A field is never silently ignored when it would change the answer: it is refused by name.
"""

from collections.abc import Mapping
from typing import Any

from hexgen2.errors import InvalidRequest

#: For the caller's own book-keeping or for a provider's billing and caching: no influence on the answer.
HARMLESS = frozenset(
    {
        "metadata",
        "parallel_tool_calls",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "session_id",
        "spaces_between_special_tokens",
        "store",
        "user",
    }
)

#: Fields that are accepted with these values, which ask for what is done anyway (null always does).
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "allowed_token_ids": (),
    "audio": (),
    "bad_words": ([],),
    "best_of": (1,),
    "cache_salt": (),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "documents": ([],),
    "echo": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "guided_json": (),
    "include_reasoning": (True,),
    "include_stop_str_in_output": (False,),
    "kv_transfer_params": (),
    "length_penalty": (1, 1.0),
    "logit_bias": ({},),
    "logits_processors": ([],),
    "mm_processor_kwargs": (),
    "modalities": (["text"],),
    "moderation": (),
    "n": (1,),
    "priority": (0,),
    "prompt_logprobs": (),
    "reasoning_effort": ("none",),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "structured_outputs": (),
    "suffix": ("",),
    "thinking_token_budget": (),
    "tool_choice": ("none",),
    "tools": ([],),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
    "vllm_xargs": ({},),
    "watermarking": (False,),
    "web_search_options": (),
}


def check_others(fields: Mapping[str, Any], neutral: Mapping[str, tuple[Any, ...]] = NEUTRAL, path: str = "") -> None:
    """Raise InvalidRequest for the first field that is unknown, or known and asks for what is not served."""
    for name, value in fields.items():
        if name in HARMLESS:
            continue
        if name not in neutral:
            raise InvalidRequest(f"{path}{name}"[:200], "is not a known field")
        # 1 == True in Python, not in JSON.
        if value is not None and not any(type(value) is type(each) and value == each for each in neutral[name]):
            allowed = " or ".join((*(repr(each).lower() for each in neutral[name]), "null"))
            raise InvalidRequest(f"{path}{name}", f"is not supported here; only {allowed} is accepted")
