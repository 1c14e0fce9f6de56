"""Files that others read while they are replaced, and that not everybody may read."""

import os
from pathlib import Path

from hexgen2.errors import ConfigError


def write_file(path: Path, data: bytes, mode: int) -> None:
    """Whole or not at all, and never with more permissions than ``mode``. Raises ConfigError."""
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        new.unlink(missing_ok=True)
        with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
