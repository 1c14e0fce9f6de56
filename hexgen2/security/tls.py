"""The certificates of this process: read from their files, and read again when these change, without a restart.

A connection that stands keeps what it began with; the next one uses what the files hold then. Files that do not belong
together (half written, a key of another certificate) change nothing.
"""

import os
from dataclasses import dataclass, field

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from hexgen2 import metrics
from hexgen2.config import TlsConfig
from hexgen2.errors import ConfigError
from hexgen2.reload import Reloaded
from hexgen2.security.callers import Caller, callers_of


@dataclass(frozen=True, slots=True)
class Material:
    """What one reading of the files gave: PEM, checked to belong together."""

    ca: bytes
    cert: bytes
    key: bytes = field(repr=False)
    not_after_s: float
    callers: frozenset[Caller]


class TlsFiles:
    """See the module. May be asked from any thread."""

    def __init__(self, config: TlsConfig) -> None:
        """Read the files. Raises ConfigError when they cannot be used."""
        self.config = config
        self._material = Reloaded((config.ca, config.cert, config.key), self._read)

    def current(self) -> Material:
        """The newest that could be used; the same object while nothing has changed."""
        return self._material.current()

    def _read(self) -> Material:
        config = self.config
        try:
            ca, cert, key = (path.read_bytes() for path in (config.ca, config.cert, config.key))
        except OSError as error:
            raise ConfigError(f"tls: {error.filename}: {error.strerror}") from error
        try:
            x509.load_pem_x509_certificates(ca)
        except ValueError as error:
            raise ConfigError(f"tls.ca: {config.ca}: no PEM certificates: {error}") from error
        try:
            leaf = x509.load_pem_x509_certificates(cert)[0]
        except ValueError as error:
            raise ConfigError(f"tls.cert: {config.cert}: no PEM certificate: {error}") from error
        try:
            public = load_pem_private_key(key, None).public_key()
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise ConfigError(f"tls.key: {config.key}: no PEM key without a pass phrase: {error}") from error
        if public != leaf.public_key():
            raise ConfigError(f"tls.key: {config.key} is not the key of {config.cert}")
        if os.name == "posix" and config.key.stat().st_mode & 0o007:
            raise ConfigError(f"tls.key: {config.key} may be read by everybody; chmod 600 it")
        not_after_s = leaf.not_valid_after_utc.timestamp()
        metrics.TLS_CERTIFICATE_NOT_AFTER.set(not_after_s)
        return Material(ca, cert, key, not_after_s, callers_of(uris_of(leaf)))


def load_tls(config: TlsConfig | None) -> TlsFiles | None:
    """The files of a process that has any. Raises ConfigError when they cannot be used."""
    return None if config is None else TlsFiles(config)


def uris_of(certificate: x509.Certificate) -> tuple[str, ...]:
    """The URIs among its alternative names."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ()
    return tuple(names.get_values_for_type(x509.UniformResourceIdentifier))
