"""Whom the gateway serves: API keys, and the limits of each.

Limits are kept by name and live in this process: several gateways each allow the whole of them.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

from hexgen2 import metrics
from hexgen2.errors import LimitExceeded, PermissionDenied, Unauthenticated
from hexgen2.reload import Reloaded
from hexgen2.security.api_keys import ApiKey, fingerprint, read_keys

_MINUTE_S = 60.0


@dataclass(slots=True)
class Account:
    """What one key is using. ``allowance`` requests may come at once; it grows back over a minute."""

    running: int = 0
    allowance: float = 0.0
    counted_s: float | None = None

    def take(self, key: ApiKey, now_s: float) -> None:
        """Count one request that begins. Raises LimitExceeded, and counts nothing, when it is one too many."""
        limit = key.max_concurrent_requests
        if limit is not None and self.running >= limit:
            raise LimitExceeded(f"{self.running} requests of the key {key.name!r} are running, which is its limit")
        rate = key.requests_per_minute
        if rate is not None:
            if self.counted_s is None:
                self.allowance = rate
            else:
                grown = (now_s - self.counted_s) * rate / _MINUTE_S
                self.allowance = min(rate, self.allowance + grown)
            self.counted_s = now_s
            if self.allowance < 1:
                wait_s = (1 - self.allowance) * _MINUTE_S / rate
                raise LimitExceeded(f"the key {key.name!r} may ask {rate} times a minute", wait_s)
            self.allowance -= 1
        self.running += 1


class Keys:
    """The keys of ``file``, read again when it changes. Without one everybody is served, and nobody has limits."""

    def __init__(self, file: Path | None, clock: Callable[[], float] = monotonic) -> None:
        """Raises ConfigError when the file cannot be used."""
        self._clock = clock
        self._accounts: dict[str, Account] = {}
        self._keys = None if file is None else Reloaded((file,), lambda: _by_fingerprint(file))

    def check(self, authorization: str | None) -> ApiKey | None:
        """The key in an ``Authorization`` header; None where none is needed.

        Raises:
            Unauthenticated: there is none, or it is not known.
            PermissionDenied: it is disabled.
        """
        if self._keys is None:
            return None
        scheme, _, key = (authorization or "").strip().partition(" ")
        if not key or scheme.lower() != "bearer":
            metrics.API_REQUESTS.labels("", "no_key").inc()
            raise Unauthenticated("an API key is needed, as `Authorization: Bearer KEY`")
        known = self._keys.current().get(fingerprint(key.strip()))
        if known is None:
            metrics.API_REQUESTS.labels("", "wrong_key").inc()
            raise Unauthenticated("the API key is not known here")
        if known.disabled:
            metrics.API_REQUESTS.labels(known.name, "disabled").inc()
            raise PermissionDenied(f"the API key {known.name!r} is disabled")
        return known

    @contextmanager
    def admitted(self, authorization: str | None) -> Iterator[ApiKey | None]:
        """``check``, and the key's limits for the length of a request. Raises LimitExceeded too."""
        key = self.check(authorization)
        if key is None:
            yield None
            return
        account = self._accounts.setdefault(key.name, Account())
        try:
            account.take(key, self._clock())
        except LimitExceeded:
            metrics.API_REQUESTS.labels(key.name, "limited").inc()
            raise
        metrics.API_REQUESTS.labels(key.name, "admitted").inc()
        try:
            yield key
        finally:
            account.running -= 1


def max_body_bytes(key: ApiKey | None, limit: int) -> int:
    """Of a request with this key, where the gateway's own limit is ``limit``."""
    return limit if key is None or key.max_body_bytes is None else min(limit, key.max_body_bytes)


def _by_fingerprint(file: Path) -> Mapping[str, ApiKey]:
    return {key.sha256: key for key in read_keys(file)}
