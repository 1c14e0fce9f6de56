"""Command-line flags made from configuration fields, and the frame in which every service runs.

A field's name, type, default, limits and help text are defined once, in ``hexgen2.config``. The engine's flags have
vLLM's names (``--max-num-seqs``); those of the KV hand-off begin with ``--kv-``.
"""

import asyncio
import ctypes
import os
import signal
import sys
from collections.abc import Callable, Coroutine, Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import click
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from hexgen2.config import TlsConfig
from hexgen2.config_file import Place, build, dotted, line_of, read
from hexgen2.config_flags import flag_name
from hexgen2.errors import ConfigError, HexgenError

C = TypeVar("C", bound=BaseModel)

#: Set by a fleet for its processes: stop when the fleet's own process ends, however it ends.
DIE_WITH_PARENT = "HEXGEN2_DIE_WITH_PARENT"

#: Fields that the command itself decides.
ROLE, KIND = "role", "kind"


class Unusable(click.ClickException):
    """A configuration that cannot be used: whoever starts processes again need not try."""

    exit_code = 2


def run_service(name: str, cls: type[C], serve: Callable[[C], Coroutine[Any, Any, None]]) -> None:
    """The main program of a service: flags and file -> configuration -> ``serve`` until it returns, then exit.

    Exit status 2 for a configuration that cannot be used, 1 when the service failed; the reason goes to stderr.
    """
    service_command(name, cls, lambda config: serve_and_exit(serve(config))).main(prog_name=f"hexgen2 {name}")


def serve_and_exit(service: Coroutine[Any, Any, None]) -> None:
    """Run a service to its end, tell its error if it has one, and leave the process."""
    if os.environ.get(DIE_WITH_PARENT):
        _die_with_parent()
    status = 0
    try:
        asyncio.run(service)
    except HexgenError as error:
        click.echo(f"error: {error}", err=True)
        status = 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        status = 130
    sys.stdout.flush()
    sys.stderr.flush()
    if any(name in sys.modules for name in ("nixl", "nixl_cu12")):
        # UCX's exit handlers crash where its InfiniBand modules were loaded without a device.
        os._exit(status)
    sys.exit(status)


def service_command(
    name: str, cls: type[C], run: Callable[[C], None], summary: str = "", argument: str = ""
) -> click.Command:
    """A command with ``--config FILE`` and a flag for each field of ``cls``; flags win over the file.

    ``argument`` is the field that may be given without a flag.
    """
    places = {place: field for place, field in leaves(cls) if place[-1] != ROLE}
    names = {_parameter(place): place for place in places}
    fixed = {ROLE: name} if ROLE in cls.model_fields else {}

    def callback(config: Path | None, **values: str | None) -> None:
        given = {names[parameter]: text for parameter, text in values.items() if text is not None}
        try:
            built = merge(cls, config, given, fixed)
        except ConfigError as error:
            raise Unusable(str(error)) from error
        run(built)

    file = click.Option(
        ["--config"], type=click.Path(path_type=Path), metavar="FILE", help="YAML file with these fields; flags win."
    )
    options: list[click.Parameter] = [
        click.Option([flag_name(place), _parameter(place)], type=_kind(field.annotation), help=_help(place, field))
        for place, field in places.items()
        if place != (argument,)
    ]
    if argument:
        options.append(click.Argument([argument], required=False))
    return click.Command(name, callback=callback, params=[file, *options], help=summary or f"Run one {name} process.")


def merge(cls: type[C], config: Path | None, given: Mapping[Place, str], fixed: Mapping[str, str]) -> C:
    """The file's fields, with ``fixed`` (which it may repeat but not change) and ``given`` (from flags) over them.

    Raises:
        ConfigError: naming the file, line and field, or the flag.
    """
    data, lines = read(config) if config else ({}, {})
    for field, value in fixed.items():
        if data.setdefault(field, value) != value:
            raise ConfigError(f"{config}:{line_of(lines, (field,))}: {field}: this process can only be {value!r}")
    for place, text in given.items():
        inner = data
        for part in place[:-1]:
            inner = inner.setdefault(str(part), {})
            if not isinstance(inner, dict):
                raise ConfigError(f"{config}:{line_of(lines, place)}: {part}: expected fields (`name: value`)")
        inner[str(place[-1])] = text
    if "engine" in cls.model_fields and isinstance(engine := data.setdefault("engine", {}), dict):
        engine.setdefault(KIND, "vllm")

    def where(place: Place) -> str:
        if place in given:
            return f"{flag_name(place)}: "
        return f"{config}:{line_of(lines, place)}: {dotted(place)}: " if config else f"{flag_name(place)}: "

    return build(cls, data, where)


def leaves(cls: type[BaseModel], place: Place = ()) -> Iterator[tuple[Place, FieldInfo]]:
    """Every field that holds a plain value. Of a union's members, a field that several have appears once."""
    for name, field in cls.model_fields.items():
        inner = (*place, name)
        members = tuple(_models(field))
        if TlsConfig in members:
            # One flag: its folder.
            yield inner, field
            continue
        if not members:
            yield inner, field
        found: dict[Place, FieldInfo] = {}
        if len(members) > 1:
            kinds = tuple(str(member.model_fields[KIND].default) for member in members)
            found[*inner, KIND] = FieldInfo(annotation=Literal[kinds], default=kinds[0])  # type: ignore[arg-type]
        for member in members:
            for at, leaf in leaves(member, inner):
                found.setdefault(at, leaf)
        yield from found.items()


def _models(field: FieldInfo) -> Iterator[type[BaseModel]]:
    for part in (field.annotation, *get_args(field.annotation)):
        if isinstance(part, type) and issubclass(part, BaseModel):
            yield part


def _kind(annotation: Any) -> click.ParamType[Any]:
    """How click shows a value. pydantic alone judges it, so every kind but a choice takes any text."""
    if get_origin(annotation) is Literal:
        return click.Choice([str(choice) for choice in get_args(annotation)])
    if get_origin(annotation) in (Union, UnionType):
        return _kind(next(part for part in get_args(annotation) if part is not type(None)))
    shown = {int: "INTEGER", float: "NUMBER", Path: "PATH"}
    plain = click.types.StringParamType()
    plain.name = shown.get(annotation, "TEXT").lower()
    return plain


def _help(place: Place, field: FieldInfo) -> str:
    text = (field.description or "").strip()
    shown = text[:1].upper() + text[1:] + "." if text else ""
    if field.is_required() or field.default is None or field.default == "":
        return shown
    return f"{shown}  [default: {field.default}]".strip()


def _parameter(place: Place) -> str:
    return flag_name(place).removeprefix("--").replace("-", "_")


def _die_with_parent() -> None:
    """Ask Linux for SIGTERM when the parent ends. Elsewhere the parent's own clean-up must do."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
