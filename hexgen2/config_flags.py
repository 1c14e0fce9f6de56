"""The flags that give a process its configuration: the inverse of ``cli.options``, for files that start processes."""

from typing import Any

from pydantic import BaseModel

from hexgen2.config import TlsConfig

#: A place in a configuration: field names, outermost first.
Place = tuple[str, ...]


def flag_name(place: tuple[str | int, ...]) -> str:
    """``("engine", "max_num_seqs")`` is ``--max-num-seqs``, ``("kv", "transport")`` is ``--kv-transport``."""
    if place == ("engine", "kind"):
        return "--engine"
    if place[0] == "engine" and len(place) > 1:
        place = place[1:]
    return "--" + "-".join(map(str, place)).replace("_", "-")


def flags_of(config: BaseModel) -> list[str]:
    """Flags of the fields that differ from their defaults; the role is the command's name, not a flag."""
    flags: list[str] = []
    for place, value in _changed(config, ()):
        if place != ("role",):
            flags += [flag_name(place), str(value)]
    return flags


def _changed(config: BaseModel, place: Place) -> list[tuple[Place, Any]]:
    found: list[tuple[Place, Any]] = []
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        here = (*place, name)
        if isinstance(value, TlsConfig):
            folder = value.ca.parent
            if value != TlsConfig.model_validate(folder):
                raise ValueError(
                    f"tls: no flag says that {value.ca}, {value.cert} and {value.key} are not of one folder"
                )
            found.append((here, folder))
        elif isinstance(value, BaseModel):
            found += _changed(value, here)
        # The engine's kind is always said: it decides which flags there are.
        elif value != field.default or here == ("engine", "kind"):
            found.append((here, value))
    return found
