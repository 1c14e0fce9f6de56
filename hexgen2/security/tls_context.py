"""TLS for plain sockets (HTTP, KV over TCP): Python's contexts, made anew when the files have changed."""

import ssl
from collections.abc import Callable

from hexgen2.errors import ConfigError
from hexgen2.security.callers import Caller, callers_of
from hexgen2.security.tls import Material, TlsFiles


class Contexts:
    """The context for the next connection. ``make`` builds one from what the files hold."""

    def __init__(self, files: TlsFiles, make: Callable[[TlsFiles], ssl.SSLContext]) -> None:
        """Raises ConfigError when the files cannot be used."""
        self._files = files
        self._make = make
        self._material: Material | None = None
        self._context: ssl.SSLContext | None = None
        try:
            self.current()
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"tls: {files.config.cert}: {error}") from error

    def current(self) -> ssl.SSLContext:
        """The newest that could be made."""
        material = self._files.current()
        if material is not self._material:
            try:
                self._context, self._material = self._make(self._files), material
            except (OSError, ssl.SSLError):
                # The files have changed since they were read; the next connection will find them whole.
                if self._context is None:
                    raise
        assert self._context is not None
        return self._context


def https_context(files: TlsFiles, *, client_certs: bool) -> ssl.SSLContext:
    """For a server that can be given one context only: each handshake is moved on to the newest. TLS 1.2 and later."""

    def make(files: TlsFiles) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(files.config.cert, files.config.key)
        if client_certs:
            context.load_verify_locations(files.config.ca)
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    contexts = Contexts(files, make)
    outer = make(files)

    def renew(connection: ssl.SSLSocket | ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
        connection.context = contexts.current()

    # Called for clients that name no server, too.
    outer.sni_callback = renew
    return outer


def peer_context(files: TlsFiles, *, server: bool) -> ssl.SSLContext:
    """For connections between our own processes: TLS 1.3, both sides show certificates of our authority."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(files.config.cert, files.config.key)
    context.load_verify_locations(files.config.ca)
    context.verify_mode = ssl.CERT_REQUIRED
    if server:
        # Nobody resumes a connection, and tickets would be read by nobody.
        context.num_tickets = 0
    return context


def callers_at(connection: ssl.SSLSocket) -> frozenset[Caller]:
    """The roles in the certificate that the other side of an established connection has shown."""
    names = (connection.getpeercert() or {}).get("subjectAltName", ())
    return callers_of(str(name[1]) for name in names if name[0] == "URI")
