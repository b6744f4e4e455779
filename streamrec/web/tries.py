"""Bound the wrong tokens that an address may send."""

from __future__ import annotations

import ipaddress
import time
from collections import OrderedDict
from collections.abc import Callable

WINDOW_S = 60.0
MAX_ADDRESSES = 1_000


class Tries:
    """Counts failed tries by address, in windows of ``WINDOW_S``.

    Behind a proxy all clients have the proxy's address: a header that names another one could be forged.
    """

    def __init__(self, limit: int, now_s: Callable[[], float] = time.monotonic) -> None:
        self._limit = limit
        self._now_s = now_s
        self._failed: OrderedDict[str, tuple[float, int]] = OrderedDict()  # begin and failures of the current window

    def wait_s(self, address: str | None) -> float:
        """Return how long an address must wait until its next try; 0 if it need not."""
        begin_s, failures = self._failed.get(_network(address), (0.0, 0))
        return max(0.0, begin_s + WINDOW_S - self._now_s()) if failures >= self._limit else 0.0

    def failed(self, address: str | None) -> None:
        """Count a failed try."""
        network, now_s = _network(address), self._now_s()
        begin_s, failures = self._failed.get(network, (now_s, 0))
        if begin_s + WINDOW_S <= now_s:
            begin_s, failures = now_s, 0
        self._failed[network] = begin_s, failures + 1
        self._failed.move_to_end(network)
        while len(self._failed) > MAX_ADDRESSES:
            self._failed.popitem(last=False)


def _network(address: str | None) -> str:
    """Return what counts as one address: of IPv6, the network that one customer has."""
    try:
        found = ipaddress.ip_address((address or "").partition("%")[0])
    except ValueError:
        return address or ""
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    if mapped is not None:
        return str(mapped)
    return str(ipaddress.ip_network((found, 64), strict=False)) if found.version == 6 else str(found)
