"""Codecs that a plan may give its routes between machines: what each saves on the wire and what it costs."""

from collections.abc import Sequence
from dataclasses import dataclass

from hexgen2.errors import ConfigError
from hexgen2.kv.codecs import CODECS, NONE, head_bytes_per_token
from hexgen2.llm import Llm

#: Relative error of a value, on Gaussian data: of two codecs that carry as much, a plan takes the more exact.
ERRORS = {NONE: 0.0, "int8": 0.007, "fp8": 0.026, "int4": 0.117}


@dataclass(frozen=True, slots=True)
class WireCodec:
    """``ratio``: bytes on the wire over those of the KV as the engine keeps it."""

    name: str
    ratio: float
    error: float


PLAIN = WireCodec(NONE, 1.0, 0.0)


def wire_codecs(llm: Llm, names: Sequence[str]) -> tuple[WireCodec, ...]:
    """Those of ``names`` that make this model's KV smaller, after none, which is always allowed; most exact first.

    Raises:
        ConfigError: an unknown name.
    """
    for name in names:
        if name not in CODECS:
            raise ConfigError(f"KV codec: no `{name}`; there are: {', '.join(CODECS)}")
    plain = llm.kv_bytes_per_token_layer / llm.num_kv_heads
    found = [
        WireCodec(name, head_bytes_per_token(name, llm.head_dim, "bfloat16") / plain, ERRORS[name])
        for name in dict.fromkeys(names)
        if name != NONE
    ]
    return (PLAIN, *sorted((each for each in found if each.ratio < 1), key=lambda each: each.error))
