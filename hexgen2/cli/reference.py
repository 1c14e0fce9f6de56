"""The references in docs/, made from what they are of: configuration fields and protos.

`python -m hexgen2.cli.reference` writes them.
"""

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from hexgen2.cli.fleet_config import FleetConfig
from hexgen2.cli.options import ROLE, leaves
from hexgen2.config import CoordinatorConfig, GatewayConfig, TlsConfig, WorkerConfig
from hexgen2.config_flags import flag_name

ROOT = Path(__file__).resolve().parents[2]

#: Commands, the fields that they take, and what they are.
COMMANDS: Mapping[str, tuple[type[BaseModel], str]] = {
    "hexgen2 up": (FleetConfig, "A fleet on this machine."),
    "hexgen2 gateway": (GatewayConfig, "Clients' way in, by gRPC and OpenAI-compatible HTTP."),
    "hexgen2 coordinator": (CoordinatorConfig, "Who is in the fleet, and the plan."),
    "hexgen2 prefill, decode, flexible": (WorkerConfig, "A worker; its role is the command's name."),
}

#: What is read from the environment, and what for.
ENVIRONMENT: Mapping[str, str] = {
    "HEXGEN2_HOME": "where models, traces, logs and run files are kept; default `~/.cache/hexgen2`",
    "HEXGEN2_API_KEY": "the API key that `hexgen2 generate` shows",
    "HEXGEN2_LOG_LEVEL": "`DEBUG`, `INFO` (default), `WARNING` or `ERROR`",
    "HEXGEN2_TLS": "the folder of certificates that commands show (`--tls`)",
    "UCX_NET_DEVICES, UCX_TLS": "which devices and transports UCX may use",
    "OTEL_EXPORTER_OTLP_ENDPOINT": "where spans go instead of to files; OpenTelemetry's other variables count as well",
}

#: What is served over HTTP, where, and what it is.
ENDPOINTS: Mapping[tuple[str, str], str] = {
    ("gateway", "POST /v1/chat/completions"): "an answer to a conversation, whole or as server-sent events",
    ("gateway", "POST /v1/completions"): "an answer to a prompt, likewise",
    ("gateway", "GET /v1/models"): "the model that is served",
    ("gateway", "GET /v1/models/{name:path}"): "the same, if it has that name",
    ("gateway", "GET /health"): "200 while a request could be served, else 503 with the reason; needs no key",
    ("gateway", "GET /metrics"): "Prometheus metrics",
    ("coordinator's page", "GET /"): "the fleet, to look at",
    ("coordinator's page", "GET /state.json"): "the same for programs",
    ("coordinator's page", "GET /page.js"): "what keeps the page up to date",
    ("coordinator's page", "GET /page.css"): "what it looks like",
    ("workers and coordinator", "GET /metrics"): "Prometheus metrics, on `metrics_listen`",
}

REQUIRED = "**required**"

_MADE = "<!-- Made by `make docs` from the code: change that, not this. -->\n"


def configuration() -> str:
    """docs/configuration.md."""
    parts = [
        "# Configuration\n",
        _MADE,
        "Every field of every process: in a YAML file (`--config FILE`), or as a flag, which wins over the file. "
        "In a file, fields with a dot are nested (`kv.transport` is `transport` under `kv`). What is unknown, outside "
        "its limits or of another type is refused at the start, with file, line and field.\n",
        "| variable of the environment | what for |\n|---|---|",
        *(f"| `{name}` | {told} |" for name, told in ENVIRONMENT.items()),
        "",
    ]
    for command, (cls, told) in COMMANDS.items():
        parts += [
            f"## {command}\n",
            f"{told}\n",
            "| field | flag | default | limits | what it is |\n|---|---|---|---|---|",
        ]
        rows = [_row(place, field) for place, field in leaves(cls) if place[-1] != ROLE]
        # A fleet without a model takes the default one.
        parts += [row.replace(REQUIRED, "the default model's") if cls is FleetConfig else row for row in rows]
        parts.append("")
    return "\n".join(parts)


def _row(place: tuple[str | int, ...], field: FieldInfo) -> str:
    default = REQUIRED if field.is_required() else _default(field)
    cells = (
        f"`{'.'.join(map(str, place))}`",
        f"`{flag_name(place)}`",
        default,
        _limits(field),
        field.description or "",
    )
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True, validated_data={})
    return "" if value is None or value == "" else f"`{value}`"


def _limits(field: FieldInfo) -> str:
    found = [_kind(field.annotation)]
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
    for limit in field.metadata:
        found += [
            f"{sign} {value:,}" for name, sign in signs.items() if (value := getattr(limit, name, None)) is not None
        ]
        if isinstance(limit, annotated_types.MaxLen):
            found.append(f"at most {limit.max_length} characters")
    return ", ".join(filter(None, found))


def _kind(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(annotation))
    if get_origin(annotation) in (Union, UnionType):
        return _kind(next(part for part in get_args(annotation) if part is not type(None)))
    names = {int: "integer", float: "number", bool: "true or false", Path: "path", TlsConfig: "folder"}
    return names.get(annotation, "")


def api() -> str:
    """docs/api.md."""
    parts = [
        "# API\n",
        _MADE,
        "Over HTTP the gateway speaks OpenAI's API: [openai-api.md](openai-api.md) has fields, errors and limits.\n",
        "| where | endpoint | what it is |\n|---|---|---|",
        *(f"| {where} | `{endpoint}` | {told} |" for (where, endpoint), told in ENDPOINTS.items()),
        "",
        "Over gRPC clients need `hexgen2.v1.Gateway` alone; the other services are how the processes speak to each "
        "other. Every server has `grpc.health.v1.Health` and reflection. Errors are gRPC's statuses, each with one "
        "sentence that names the field and its limit. Who may call what is in [SECURITY.md](../SECURITY.md).\n",
    ]
    for name in ("gateway", "coordinator", "prefill", "decode", "types"):
        text = (ROOT / "protos" / "hexgen2" / "v1" / f"{name}.proto").read_text(encoding="utf-8")
        parts += [f"## {name}.proto\n", *_proto(text)]
    return "\n".join(parts)


_BLOCK = re.compile(r"(service|message|enum) (\w+) \{(\})?")
_RPC = re.compile(r"rpc (\w+)\((\w+)\) returns \((stream )?(\w+)\);")
_FIELD = re.compile(r"(?:(optional|repeated) )?([\w.]+(?:<.*>)?) (\w+) = (\d+)(?: \[.*\])?;")
_VALUE = re.compile(r"(\w+) = (\d+);")


def _proto(text: str) -> Iterator[str]:
    """A file in the style of ours: one statement a line, comments above what they are about."""
    comment: list[str] = []
    oneof = ""
    open_table = False
    for line in map(str.strip, text.splitlines()):
        if line.startswith("//"):
            comment.append(line.removeprefix("//").strip())
            continue
        told = " ".join(comment)
        comment.clear()
        if block := _BLOCK.match(line):
            kind, name, empty = block.groups()
            yield f"### {kind} {name}\n"
            if told:
                yield f"{told}\n"
            if not empty:
                heads = {"service": "call | takes | returns", "enum": "value | number"}.get(
                    kind, "field | type | number"
                )
                yield f"| {heads} | |\n|{'---|' * (heads.count('|') + 2)}"
                open_table = True
        elif rpc := _RPC.match(line):
            name, takes, stream, returns = rpc.groups()
            yield f"| `{name}` | `{takes}` | {'stream of ' if stream else ''}`{returns}` | {told} |"
        elif field := _FIELD.match(line):
            label, kind, name, number = field.groups()
            of = " ".join(filter(None, (label, f"`{kind}`", f"(one of `{oneof}`)" if oneof else "")))
            yield f"| `{name}` | {of} | {number} | {told} |"
        elif value := _VALUE.match(line):
            yield f"| `{value[1]}` | {value[2]} | {told} |"
        elif line.startswith("oneof "):
            oneof = line.split()[1]
        elif line == "}" and oneof:
            oneof = ""
        elif line == "}" and open_table:
            yield ""
            open_table = False


FILES: Mapping[str, Callable[[], str]] = {"configuration.md": configuration, "api.md": api}


def write(folder: Path) -> None:
    """Write all references into ``folder``."""
    for name, make in FILES.items():
        (folder / name).write_text(make(), encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs")
