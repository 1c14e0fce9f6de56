"""What users ask of the model: a distribution of prompt and answer lengths, a rate, and how fast answers must be.

A distribution is a table of equally treated weighted points, quantile by quantile of a trace: frozen figures, no trace.
"""

from functools import cached_property

from pydantic import BaseModel, ConfigDict, Field, model_validator


class LengthClass(BaseModel):
    """A point of the distribution: ``weight`` of all requests have so many prompt and answer tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt_tokens: int = Field(ge=1)
    output_tokens: int = Field(ge=1)
    weight: float = Field(gt=0)


class Workload(BaseModel):
    """Lengths, rate and limits. Weights sum to one (made so when built)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = "workload"
    lengths: tuple[LengthClass, ...] = Field(min_length=1)
    max_prompt_tokens: int = Field(0, ge=0, description="longest prompt that must be taken; 0: that of the table")
    max_total_tokens: int = Field(0, ge=0, description="likewise, prompt and answer")
    rate: float | None = Field(None, gt=0, description="requests per second that are asked; None: as many as possible")
    ttft_s: float | None = Field(None, gt=0, description="limit of the time to first token")
    tpot_s: float | None = Field(None, gt=0, description="limit of the time per output token after the first")

    @model_validator(mode="after")
    def _normalise(self) -> "Workload":
        total = sum(point.weight for point in self.lengths)
        if abs(total - 1.0) > 1e-9:
            scaled = tuple(point.model_copy(update={"weight": point.weight / total}) for point in self.lengths)
            object.__setattr__(self, "lengths", scaled)
        return self

    def within(self, max_model_len: int) -> "Workload":
        """What a model of such a context can be asked: who asks for more is refused. A table that says nothing of its
        longest stands for any model: the built-in ones are planned for as if each had such a context.
        """
        return self.up_to(max_model_len - 1, max_model_len) if self.max_total_tokens else self

    def up_to(self, prompt_tokens: float, total_tokens: float) -> "Workload":
        """With nothing longer that must be taken."""
        longest = int(min(self.longest_prompt_tokens, prompt_tokens)), int(min(self.longest_tokens, total_tokens))
        if longest == (self.longest_prompt_tokens, self.longest_tokens):
            return self
        # Built, not copied: what is remembered would be copied, too.
        given = {name: getattr(self, name) for name in type(self).model_fields}
        return Workload(**given | {"max_prompt_tokens": longest[0], "max_total_tokens": longest[1]})

    @cached_property
    def mean_prompt_tokens(self) -> float:
        """E[s]."""
        return sum(point.weight * point.prompt_tokens for point in self.lengths)

    @cached_property
    def mean_output_tokens(self) -> float:
        """E[o]."""
        return sum(point.weight * point.output_tokens for point in self.lengths)

    @cached_property
    def mean_decode_tokens(self) -> float:
        """E[o - 1]: prefill makes the first token."""
        return self.mean_output_tokens - 1.0

    @cached_property
    def mean_context_tokens(self) -> float:
        """E[o (s + o/2)] / E[o]: the context of a request met in decode, which long answers fill for longer."""
        total = sum(p.weight * p.output_tokens * (p.prompt_tokens + p.output_tokens / 2) for p in self.lengths)
        return total / self.mean_output_tokens

    @cached_property
    def longest_prompt_tokens(self) -> int:
        """That must be taken, as the next."""
        return self.max_prompt_tokens or max(point.prompt_tokens for point in self.lengths)

    @cached_property
    def longest_tokens(self) -> int:
        """Prompt and answer."""
        return self.max_total_tokens or max(point.prompt_tokens + point.output_tokens for point in self.lengths)
