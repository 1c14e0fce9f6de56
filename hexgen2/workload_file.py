"""``workload.yaml``: its schema, and how built-in distributions, traces and mixes become a ``Workload``."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from hexgen2 import catalog
from hexgen2.config_file import Place, build, did_you_mean, dotted, line_of, read
from hexgen2.errors import ConfigError
from hexgen2.request_trace import read_trace, summarise
from hexgen2.workload import LengthClass, Workload

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Tokens = Annotated[int, Field(ge=1)]


class Source(BaseModel):
    """Where lengths come from: exactly one of a built-in distribution, a trace file, or two numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    lengths: str | None = Field(None, description="a built-in distribution: HPLD, HPHD, LPHD, LPLD ...")
    trace: Path | None = Field(None, description="a trace file, CSV or JSON lines; relative to this file")
    prompt_tokens: Tokens | None = Field(None, description="all prompts alike; with output_tokens")
    output_tokens: Tokens | None = Field(None, description="all answers alike; with prompt_tokens")

    def given(self) -> list[str]:
        """Which sources there are."""
        pair = self.prompt_tokens is not None or self.output_tokens is not None
        named = {"lengths": self.lengths is not None, "trace": self.trace is not None, "prompt_tokens": pair}
        return [name for name, there in named.items() if there]


class Share(Source):
    """A class of requests in a mix."""

    share: Positive = Field(description="of all requests; shares are taken relative to their sum")

    @model_validator(mode="after")
    def _one(self) -> "Share":
        _exactly_one(self.given(), ("lengths", "trace", "prompt_tokens"))
        return self


class Slo(BaseModel):
    """What a request may wait."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ttft_s: Positive | None = Field(None, description="time to first token")
    tpot_s: Positive | None = Field(None, description="time per output token after the first")


class WorkloadSpec(Source):
    """A workload.yaml."""

    name: str = ""
    about: str = Field("", description="a note for readers")
    mix: tuple[Share, ...] | None = Field(None, description="classes and their shares")
    max_prompt_tokens: Tokens | None = Field(
        None, description="longest prompt that replicas must hold; default: that of the trace, or of the lengths"
    )
    max_total_tokens: Tokens | None = Field(None, description="likewise, prompt and answer")
    rate: Positive | None = Field(None, description="requests per second; default: as many as the plan can serve")
    slo: Slo = Slo()

    @field_validator("mix")
    @classmethod
    def _some(cls, mix: tuple[Share, ...] | None) -> tuple[Share, ...] | None:
        if mix is not None and not mix:
            raise ValueError("no classes")
        return mix

    @model_validator(mode="after")
    def _one(self) -> "WorkloadSpec":
        given = self.given() + (["mix"] if self.mix is not None else [])
        _exactly_one(given, ("lengths", "trace", "prompt_tokens", "mix"))
        return self


def _exactly_one(given: list[str], possible: tuple[str, ...]) -> None:
    if len(given) != 1:
        raise ValueError(f"exactly one of {', '.join(possible)} is needed; given: {', '.join(given) or 'none'}")


def builtin(name: str) -> Workload:
    """A built-in workload. Raises ConfigError."""
    return Workload(name=_known(name, "workload: "), lengths=_builtin_lengths(_known(name, "workload: ")))


def find_workload(name_or_path: str | Path) -> Workload:
    """A workload from its file (YAML, or a trace itself), or by the name of a built-in one. Raises ConfigError."""
    path = Path(name_or_path)
    if path.suffix in {".yaml", ".yml"}:
        return load_workload(path)
    if path.exists() and not path.is_dir():
        lengths, longest = _of_trace(path)
        return Workload(name=path.name, lengths=lengths, max_prompt_tokens=longest[0], max_total_tokens=longest[1])
    return builtin(str(name_or_path))


def load_workload(path: Path) -> Workload:
    """Read a workload.yaml. Raises ConfigError with file, line and field of every problem."""
    data, lines = read(path)

    def where(place: Place) -> str:
        field = dotted(place)
        return f"{path}:{line_of(lines, place)}: {field}: " if field else f"{path}:1: "

    return resolve(build(WorkloadSpec, data, where), path.parent, where)


def resolve(spec: WorkloadSpec, folder: Path, where: Callable[[Place], str]) -> Workload:
    """Names and files to numbers. Traces are relative to ``folder``. Raises ConfigError."""
    if spec.mix is None:
        lengths, longest = _lengths(spec, (), folder, where)
    else:
        total = sum(part.share for part in spec.mix)
        parts = [_lengths(part, ("mix", number), folder, where) for number, part in enumerate(spec.mix)]
        lengths = tuple(
            point.model_copy(update={"weight": point.weight * share.share / total})
            for share, (points, _) in zip(spec.mix, parts, strict=True)
            for point in points
        )
        longest = max(prompt for _, (prompt, _) in parts), max(total for _, (_, total) in parts)
    default_name = spec.lengths or (spec.trace.name if spec.trace else "workload")
    given = spec.max_prompt_tokens, spec.max_total_tokens
    if any(longest) or any(given):
        table = Workload(lengths=lengths)
        longest = max(longest[0], table.longest_prompt_tokens), max(longest[1], table.longest_tokens)
    prompt = given[0] or longest[0]
    return Workload(
        name=spec.name or default_name,
        lengths=lengths,
        max_prompt_tokens=prompt,
        # A prompt that is taken has room for one token at least.
        max_total_tokens=max(given[1] or longest[1], prompt and prompt + 1),
        rate=spec.rate,
        ttft_s=spec.slo.ttft_s,
        tpot_s=spec.slo.tpot_s,
    )


#: A table, and the longest prompt and the longest request (prompt and answer) where that is not the table's.
_Lengths = tuple[tuple[LengthClass, ...], tuple[int, int]]


def _lengths(source: Source, place: Place, folder: Path, where: Callable[[Place], str]) -> _Lengths:
    if source.lengths is not None:
        return _builtin_lengths(_known(source.lengths, where((*place, "lengths")))), (0, 0)
    if source.trace is not None:
        path = folder / source.trace
        if not path.is_file():
            raise ConfigError(f"{where((*place, 'trace'))}no file {path}")
        return _of_trace(path)
    for field in ("prompt_tokens", "output_tokens"):
        if getattr(source, field) is None:
            raise ConfigError(f"{where((*place, field))}missing")
    only = LengthClass(prompt_tokens=source.prompt_tokens or 0, output_tokens=source.output_tokens or 0, weight=1.0)
    return (only,), (0, 0)


def _of_trace(path: Path) -> _Lengths:
    # Points of the table are means: the longest request of a trace is none of them, and must be taken all the same.
    requests = read_trace(path)
    longest = max(each.prompt_tokens for each in requests), max(sum(each) for each in requests)
    return summarise(requests), longest


def _known(name: str, begins: str) -> str:
    workloads = catalog.table("workloads")["workloads"]
    key = {known.casefold(): known for known in workloads}.get(name.casefold())
    if key is None:
        raise ConfigError(f"{begins}no file nor built-in workload `{name}`; {did_you_mean(name, list(workloads))}")
    return str(key)


def _builtin_lengths(name: str) -> tuple[LengthClass, ...]:
    rows = catalog.table("workloads")["workloads"][name]["lengths"]
    return tuple(LengthClass(prompt_tokens=p, output_tokens=o, weight=w) for p, o, w in rows)
