"""What befalls replicas while a simulation runs: they are lost, come back, change their role. Read from a file."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from hexgen2.config_file import load


class Happening(BaseModel):
    """One of them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    at_s: float = Field(ge=0, allow_inf_nan=False, description="seconds after the first arrival of the trace")
    what: Literal["lost", "back", "flip"]
    replica: str = Field(description="its id in the plan")
    role: Literal["prefill", "decode", "colocated"] | None = Field(None, description="the new one, of a flip")
    takes_s: float = Field(0.0, ge=0, allow_inf_nan=False, description="from drained to ready, of a flip")

    @model_validator(mode="after")
    def _check(self) -> "Happening":
        if (self.role is None) == (self.what == "flip"):
            raise ValueError("role: needed for a flip, and for nothing else")
        return self


class Happenings(BaseModel):
    """An events.yaml."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    events: tuple[Happening, ...] = ()


def load_happenings(path: Path) -> tuple[Happening, ...]:
    """Raises ConfigError with file, line and field of every problem."""
    return load(path, Happenings).events
