"""Reads a YAML file into a configuration class; every problem is told with file, line, field and the likely fix."""

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from hexgen2.errors import ConfigError

C = TypeVar("C", bound=BaseModel)

#: Where a value stands: field names and list indices, outermost first.
Place = tuple[str | int, ...]


def load(path: Path, cls: type[C]) -> C:
    """Read ``path`` as a ``cls``.

    Raises:
        ConfigError: one line for each problem, as ``file:line: field: what is wrong``.
    """
    data, lines = read(path)
    return build(cls, data, lambda place: f"{path}:{line_of(lines, place)}: {dotted(place)}: ")


def read(path: Path) -> tuple[dict[str, Any], Mapping[Place, int]]:
    """The mapping in a YAML file, and the line of each field. Raises ConfigError."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text") from error
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{at}: not YAML: {getattr(error, 'problem', None) or error}") from error
    if data is None:
        return {}, {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path}:1: expected fields (`name: value`), found {type(data).__name__}")
    lines: dict[Place, int] = {}
    for place, line in _walk(root, ()):
        if place in lines:
            raise ConfigError(f"{path}:{line}: {dotted(place)}: given twice, first in line {lines[place]}")
        lines[place] = line
    return data, lines


def build(cls: type[C], data: Mapping[str, Any], where: Callable[[Place], str]) -> C:
    """Validate ``data``; ``where`` says, for a place, how a line about it begins. Raises ConfigError."""
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        problems = (_explain(cls, data, detail) for detail in error.errors(include_url=False))
        raise ConfigError("\n".join(f"{where(place)}{text}" for place, text in problems)) from None


def line_of(lines: Mapping[Place, int], place: Place) -> int:
    """The line of a place, or of the nearest one around it that the file has."""
    while place and place not in lines:
        place = place[:-1]
    return lines.get(place, 1)


def dotted(place: Place) -> str:
    """``("engine", "model")`` as ``engine.model``."""
    return ".".join(map(str, place))


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """The likely fix of a name that is not known."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.7)
    return f"did you mean `{close[0]}`?" if close else f"there are: {', '.join(known)}"


def _walk(node: yaml.Node | None, place: Place) -> Iterator[tuple[Place, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = (*place, key.value)
            yield inner, key.start_mark.line + 1
            yield from _walk(value, inner)
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            yield (*place, number), value.start_mark.line + 1
            yield from _walk(value, (*place, number))


def _explain(cls: type[BaseModel], data: Mapping[str, Any], detail: ErrorDetails) -> tuple[Place, str]:
    """Where a problem is and what it is, in one line."""
    place, models = _locate(cls, data, detail["loc"])
    match detail["type"]:
        case "extra_forbidden":
            known = sorted({field for model in models for field in model.model_fields})
            return place, f"no such field; {did_you_mean(str(place[-1]), known)}"
        case "missing":
            return place, "missing"
        case "union_tag_not_found":
            return (*place, "kind"), "missing"
        case "union_tag_invalid":
            context = detail.get("ctx", {})
            return (*place, "kind"), f"'{context.get('tag')}' is not one of {context.get('expected_tags')}"
        case "value_error":
            return place, detail["msg"].removeprefix("Value error, ")
    return place, f"{detail['input']!r} {detail['msg'].removeprefix('Input ')}"


def _locate(
    cls: type[BaseModel], data: Mapping[str, Any], loc: tuple[int | str, ...]
) -> tuple[Place, tuple[type[BaseModel], ...]]:
    """pydantic's location without the tags of unions, and the classes that may stand around its last part."""
    models: tuple[type[BaseModel], ...] = (cls,)
    place: Place = ()
    value: Any = data
    for index, part in enumerate(loc):
        tagged = tuple(model for model in models if isinstance(part, str) and _tag(model) == part)
        last = index == len(loc) - 1
        if tagged and not last and not (isinstance(value, Mapping) and part in value):
            models = tagged
            continue
        place = (*place, part)
        value = value.get(part) if isinstance(value, Mapping) else None
        if not last and isinstance(part, str):
            annotations = [model.model_fields[part].annotation for model in models if part in model.model_fields]
            models = tuple(found for annotation in annotations for found in _models_in(annotation))
    return place, models


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)


def _tag(model: type[BaseModel]) -> str | None:
    """The value of ``kind`` that names a member of a union."""
    field = model.model_fields.get("kind")
    if field is None or get_origin(field.annotation) is not Literal:
        return None
    return str(get_args(field.annotation)[0])
