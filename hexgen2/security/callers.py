"""Who may call what: the roles that a certificate can name, and the methods that each may call. Pure.

A certificate names its roles as URIs among its alternative names: ``hexgen2://role/worker``.
"""

from collections.abc import Iterable
from enum import StrEnum

from hexgen2.errors import PermissionDenied

_URI = "hexgen2://role/"


class Caller(StrEnum):
    """A role of whoever holds a certificate."""

    GATEWAY = "gateway"
    COORDINATOR = "coordinator"
    WORKER = "worker"
    #: Asks the gateway, and sees the fleet's state.
    CLIENT = "client"
    #: And may change the fleet.
    ADMIN = "admin"


#: Roles that listen; the others' certificates cannot be used by a server.
SERVERS = frozenset({Caller.GATEWAY, Caller.COORDINATOR, Caller.WORKER})

_ASKS = frozenset({Caller.CLIENT, Caller.ADMIN})
_SEES = _ASKS | {Caller.GATEWAY}

_MAY_CALL = {
    "/hexgen2.v1.Gateway/Generate": _ASKS,
    "/hexgen2.v1.Prefill/Prefill": frozenset({Caller.GATEWAY}),
    "/hexgen2.v1.Prefill/FetchKv": frozenset({Caller.WORKER}),
    "/hexgen2.v1.Decode/Decode": frozenset({Caller.GATEWAY}),
    "/hexgen2.v1.Coordinator/Report": frozenset({Caller.WORKER}),
    "/hexgen2.v1.Coordinator/ReportGateway": frozenset({Caller.GATEWAY}),
    "/hexgen2.v1.Coordinator/ApplyPlan": frozenset({Caller.ADMIN}),
    "/hexgen2.v1.Coordinator/Preempt": frozenset({Caller.ADMIN}),
    "/hexgen2.v1.Coordinator/GetPlan": _SEES,
    "/hexgen2.v1.Coordinator/WatchPlan": _SEES,
}
#: Of a method that is not listed: what changes the fleet is an administrator's.
_OTHERWISE = frozenset({Caller.ADMIN})


def uri(caller: Caller) -> str:
    """As it stands in a certificate."""
    return _URI + caller


def callers_of(uris: Iterable[str]) -> frozenset[Caller]:
    """The roles among a certificate's URIs; what names none is passed over."""
    names = {each.removeprefix(_URI) for each in uris if each.startswith(_URI)}
    return frozenset(each for each in Caller if each in names)


def check_call(method: str, callers: frozenset[Caller]) -> None:
    """Raise PermissionDenied unless one of ``callers`` may call ``method`` (``/package.Service/Method``)."""
    allowed = _MAY_CALL.get(method, _OTHERWISE)
    if callers.isdisjoint(allowed):
        raise PermissionDenied(
            f"{method} is for {_names(allowed)} only; the caller's certificate says: {_names(callers) or 'no role'}"
        )


def _names(callers: Iterable[Caller]) -> str:
    return ", ".join(sorted(callers))
