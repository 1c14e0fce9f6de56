"""The file of API keys: whom the gateway serves, and how much of it. Keys themselves are nowhere in it.

A key has 256 random bits, so its plain SHA-256 can neither be turned back nor guessed; a slow hash would protect only
keys that people choose, and cost every request.
"""

import secrets
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, field_validator

from hexgen2.config import Config
from hexgen2.config_file import build, dotted, load
from hexgen2.errors import ConfigError
from hexgen2.write_file import write_file

_PREFIX = "hx_"


class ApiKey(Config):
    """Who may ask, and how much. A limit that is not set is the gateway's own."""

    name: str = Field(pattern=r"^[A-Za-z0-9._@-]{1,64}$", description="whose key it is; shown in metrics and traces")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="of the key")
    requests_per_minute: int | None = Field(None, ge=1, le=1_000_000)
    max_concurrent_requests: int | None = Field(None, ge=1)
    max_body_bytes: int | None = Field(None, ge=1, description="of one request")
    disabled: bool = Field(False, description="known, and refused")


class ApiKeys(Config):
    """The file."""

    keys: tuple[ApiKey, ...] = ()

    @field_validator("keys")
    @classmethod
    def _check(cls, keys: tuple[ApiKey, ...]) -> tuple[ApiKey, ...]:
        for what in ("name", "sha256"):
            values = [getattr(key, what) for key in keys]
            if twice := next((each for each in values if values.count(each) > 1), None):
                raise ValueError(f"{what} {twice} is there twice")
        return keys


def fingerprint(key: str) -> str:
    """What the file has of a key."""
    return sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def read_keys(file: Path) -> tuple[ApiKey, ...]:
    """The keys in ``file``. Raises ConfigError."""
    return load(file, ApiKeys).keys


def add_key(file: Path, name: str, **limits: Any) -> str:
    """Make a key called ``name`` and put it into ``file``, which need not exist; the key, which is kept nowhere else.

    Raises:
        ConfigError: a name that is taken or not allowed, a limit that cannot be.
    """
    keys = read_keys(file) if file.exists() else ()
    key = _PREFIX + secrets.token_urlsafe(32)
    given = {field: value for field, value in limits.items() if value is not None}
    _write(file, [*keys_as_data(keys), {"name": name, "sha256": fingerprint(key)} | given])
    return key


def remove_key(file: Path, name: str) -> None:
    """Raises ConfigError when there is none of that name."""
    keys = read_keys(file)
    left = tuple(key for key in keys if key.name != name)
    if len(left) == len(keys):
        raise ConfigError(f"{file}: there is no key of the name {name!r}")
    _write(file, keys_as_data(left))


def keys_as_data(keys: Sequence[ApiKey]) -> list[dict[str, Any]]:
    """As they stand in the file."""
    return [key.model_dump(exclude_defaults=True) for key in keys]


def _write(file: Path, keys: Sequence[dict[str, Any]]) -> None:
    checked = build(ApiKeys, {"keys": keys}, lambda place: f"{dotted(place[2:]) or 'key'}: ")
    text = yaml.safe_dump({"keys": keys_as_data(checked.keys)}, sort_keys=False)
    write_file(file, text.encode(), 0o600)
