"""A small certificate authority: makes what mutual TLS between the services needs. Folders, no server.

``FOLDER/ca.pem`` and ``FOLDER/ca.key`` are the authority; ``FOLDER/NAME/`` has what one process needs: ca.pem,
cert.pem and key.pem. Keys are EC P-256, files of keys 0600. Certificates that expire soon and are renewed often take
the place of revocation lists.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePrivateKey, generate_private_key
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from hexgen2.errors import ConfigError
from hexgen2.security.callers import SERVERS, Caller, callers_of, uri
from hexgen2.security.tls import uris_of
from hexgen2.write_file import write_file

CA_DAYS = 3650
LEAF_DAYS = 30
#: Of hosts whose clocks differ.
_SKEW = timedelta(minutes=5)


@dataclass(frozen=True, slots=True)
class Issued:
    """What a certificate says. ``hosts`` are names and addresses; ``callers`` its roles."""

    name: str
    callers: tuple[Caller, ...]
    hosts: tuple[str, ...]
    not_before: datetime
    not_after: datetime
    path: Path


def init(folder: Path, name: str = "hexgen2", days: float = CA_DAYS) -> Issued:
    """Make an authority in ``folder``. Raises ConfigError when there is one."""
    if (folder / "ca.key").exists() or (folder / "ca.pem").exists():
        raise ConfigError(f"{folder}: there is a certificate authority already")
    key = generate_private_key(SECP256R1())
    subject = _subject(f"{name} certificate authority")
    usage = _key_usage(key_cert_sign=True, crl_sign=True)
    builder = _builder(subject, subject, key, days).add_extension(x509.BasicConstraints(ca=True, path_length=0), True)
    certificate = builder.add_extension(usage, True).sign(key, hashes.SHA256())
    _make_folder(folder)
    write_file(folder / "ca.key", _pem(key), 0o600)
    write_file(folder / "ca.pem", certificate.public_bytes(Encoding.PEM), 0o644)
    return read(folder / "ca.pem")


def issue(
    folder: Path, name: str, callers: Iterable[Caller], hosts: Sequence[str] = (), days: float = LEAF_DAYS
) -> Issued:
    """Make, or replace, the key and certificate ``name``. ``hosts`` are what others dial to reach it.

    A running process that uses the files takes the new ones for its next connections. May be signed by the first
    certificate of ca.pem only; others there are trusted, which is how an authority is replaced.

    Raises:
        ConfigError: no authority in ``folder``, one that has expired, a name, host or role that cannot be.
    """
    roles = tuple(sorted(set(callers)))
    if not name or not all(each.isalnum() or each in "-_." for each in name) or name.startswith("."):
        raise ConfigError(f"name: {name!r} is not of letters, digits, '-', '_' and '.'")
    if not roles:
        raise ConfigError(f"role: {name} has none")
    serves = not SERVERS.isdisjoint(roles)
    if serves and not hosts:
        raise ConfigError(f"host: {name} is a {', '.join(roles)}, which others dial: by which name or address?")
    authority, authority_key = _authority(folder)
    expires = authority.not_valid_after_utc
    if datetime.now(UTC) + timedelta(days=days) > expires:
        raise ConfigError(f"days: {days:g} is longer than the authority's own certificate lasts ({expires:%Y-%m-%d})")
    key = generate_private_key(SECP256R1())
    names = [*map(_host, hosts), *(x509.UniformResourceIdentifier(uri(each)) for each in roles)]
    purposes = [ExtendedKeyUsageOID.CLIENT_AUTH, *([ExtendedKeyUsageOID.SERVER_AUTH] if serves else [])]
    certificate = (
        _builder(_subject(name), authority.subject, key, days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), True)
        .add_extension(_key_usage(digital_signature=True), True)
        .add_extension(x509.ExtendedKeyUsage(purposes), False)
        .add_extension(x509.SubjectAlternativeName(names), False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), False)
        .sign(authority_key, hashes.SHA256())
    )
    _make_folder(folder / name)
    write_file(folder / name / "ca.pem", (folder / "ca.pem").read_bytes(), 0o644)
    # Until both are there a reader finds that they do not belong together, and keeps what it has.
    write_file(folder / name / "key.pem", _pem(key), 0o600)
    write_file(folder / name / "cert.pem", certificate.public_bytes(Encoding.PEM), 0o644)
    return read(folder / name / "cert.pem")


def renew(folder: Path, days: float = LEAF_DAYS) -> tuple[Issued, ...]:
    """Issue every certificate in ``folder`` anew, with the names, roles and hosts that it has."""
    return tuple(issue(folder, each.path.parent.name, each.callers, each.hosts, days) for each in issued(folder))


def issued(folder: Path) -> tuple[Issued, ...]:
    """The certificates made in ``folder``, without the authority's own. Raises ConfigError."""
    return tuple(read(path) for path in sorted(folder.glob("*/cert.pem")))


def read(path: Path) -> Issued:
    """What the first certificate in a PEM file says. Raises ConfigError."""
    certificate = _load(path)
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        hosts = (*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress)))
    except x509.ExtensionNotFound:
        hosts = ()
    return Issued(
        name=str(certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value),
        callers=tuple(sorted(callers_of(uris_of(certificate)))),
        hosts=hosts,
        not_before=certificate.not_valid_before_utc,
        not_after=certificate.not_valid_after_utc,
        path=path,
    )


def _load(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificates(path.read_bytes())[0]
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path}: no PEM certificate: {error}") from error


def _authority(folder: Path) -> tuple[x509.Certificate, EllipticCurvePrivateKey]:
    certificate = _load(folder / "ca.pem")
    try:
        key = load_pem_private_key((folder / "ca.key").read_bytes(), None)
    except OSError as error:
        raise ConfigError(f"{folder / 'ca.key'}: {error.strerror}") from error
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{folder / 'ca.key'}: no PEM key without a pass phrase: {error}") from error
    if not isinstance(key, EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise ConfigError(f"{folder / 'ca.key'} is not the key of the first certificate in {folder / 'ca.pem'}")
    return certificate, key


def _builder(
    subject: x509.Name, issuer: x509.Name, key: EllipticCurvePrivateKey, days: float
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + min(timedelta(0), timedelta(days=days)) - _SKEW)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
    )


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _host(host: str) -> x509.GeneralName:
    try:
        address: IPv4Address | IPv6Address = ip_address(host)
    except ValueError:
        try:
            return x509.DNSName(host)
        except ValueError as error:
            raise ConfigError(f"host: {host!r} is neither an address nor a name: {error}") from error
    return x509.IPAddress(address)


def _key_usage(
    *, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False
) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _pem(key: EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise ConfigError(f"{folder}: {error.strerror}") from error
