"""What a replica that registers must say of itself for others to name, dial and use it. Pure."""

import re

from hexgen2.address import parse_address
from hexgen2.errors import ConfigError, InvalidRequest
from hexgen2.plan import Replica, ReplicaState

MAX_ID_CHARS = 64

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]*")


def check_replica(replica: Replica, state: ReplicaState) -> None:
    """Raise InvalidRequest for a replica that nobody could dial or name, or that is READY without a model."""
    if not _ID.fullmatch(replica.replica_id) or len(replica.replica_id) > MAX_ID_CHARS:
        raise InvalidRequest(
            "replica.replica_id",
            f"{replica.replica_id[:80]!r} is not 1 to {MAX_ID_CHARS} letters, digits or any of . _ : -",
        )
    try:
        host, port = parse_address(replica.address, what="replica.address")
    except ConfigError as error:
        field, _, message = str(error).partition(": ")
        raise InvalidRequest(field, message) from None
    if not port:
        raise InvalidRequest("replica.address", f"{replica.address!r} has no port")
    if host in ("0.0.0.0", "::"):
        raise InvalidRequest(
            "replica.address", f"{replica.address!r} is where it listens, not where others dial: set advertise"
        )
    if not replica.incarnation:
        raise InvalidRequest("replica.incarnation", "is empty")
    # A worker that starts does not know its model yet.
    if state is ReplicaState.READY and not replica.model_sha256:
        raise InvalidRequest("replica.model_sha256", "is empty")
    if state is ReplicaState.READY and replica.max_model_len < 1:
        raise InvalidRequest("replica.max_model_len", "0 is less than 1")


def compatible(version: str, other: str) -> bool:
    """Whether two versions of the software speak one protocol: they may differ in the last number alone.

    So a fleet can be upgraded host by host.
    """
    return bool(version) and version.split(".")[:-1] == other.split(".")[:-1]
