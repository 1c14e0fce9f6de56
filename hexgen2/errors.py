"""The one tree of errors. Each names the gRPC status it becomes at the edge (``rpc.interceptors``).

Messages are for people: they name the field, the value seen and the limit.
"""


class HexgenError(Exception):
    """Base of every error that a caller may see. ``status`` is a ``grpc.StatusCode`` name."""

    status = "INTERNAL"
    #: KV or a transfer that is not what it should be: logged by the server that ends the call, once.
    is_refusal = False


class InvalidRequest(HexgenError):
    """A value outside its limits. ``field`` is its path in the request, e.g. ``sampling.top_p``."""

    status = "INVALID_ARGUMENT"

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.is_refusal = field.startswith(("transfer.", "remote_kv."))


class ConfigError(HexgenError):
    """A configuration, cluster or plan file that cannot be used; names file, line and field."""

    status = "INVALID_ARGUMENT"


class ModelNotFound(HexgenError):
    """The request names a model that is not served here."""

    status = "NOT_FOUND"


class TraceNotFound(HexgenError):
    """No trace of that id is kept, or several begin so."""

    status = "NOT_FOUND"


class Unauthenticated(HexgenError):
    """No API key, or one that is not known here."""

    status = "UNAUTHENTICATED"


class PermissionDenied(HexgenError):
    """The caller is known, and may not do this."""

    status = "PERMISSION_DENIED"


class TransferNotFound(HexgenError):
    """No such transfer is held here (any more), or the token is not its token."""

    status = "NOT_FOUND"
    is_refusal = True


class TransferEnded(HexgenError):
    """The transfer was here and is over: its KV is given up, its id and token are used up."""

    status = "FAILED_PRECONDITION"
    is_refusal = True


class TransferRefused(HexgenError):
    """What was offered is not what was asked for: another model, prompt, shape, dtype or codec."""

    status = "FAILED_PRECONDITION"
    is_refusal = True


class KvTooLarge(HexgenError):
    """The KV of this prompt is larger than the whole pool."""

    status = "FAILED_PRECONDITION"
    is_refusal = True


class KvCorrupt(HexgenError):
    """Bytes that do not match their digest. They were not served."""

    status = "DATA_LOSS"
    is_refusal = True


class ReplicaConflict(HexgenError):
    """A worker registers with an id or address that another one, which is alive, has."""

    status = "FAILED_PRECONDITION"


class ReplicaMismatch(HexgenError):
    """A worker that does not fit the fleet: another model, version, role or clock. Says what differs, what to do."""

    status = "FAILED_PRECONDITION"


class Overloaded(HexgenError):
    """A bounded queue is full. ``retry_after_s`` reaches the client as Retry-After."""

    status = "RESOURCE_EXHAUSTED"

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class LimitExceeded(Overloaded):
    """The caller's own limit, not the system's: others are still served."""


class Unavailable(HexgenError):
    """A peer is gone, stopping or not there yet; another try, elsewhere or later, may succeed."""

    status = "UNAVAILABLE"


class StaleEpoch(HexgenError):
    """The request was routed by a plan that is no longer in force."""

    status = "ABORTED"


class DeadlineExceeded(HexgenError):
    """The caller's deadline passed first."""

    status = "DEADLINE_EXCEEDED"


class EngineFailed(HexgenError):
    """The engine reported an error or died."""

    status = "UNAVAILABLE"
