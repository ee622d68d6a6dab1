"""Which server is tried next: those of the settings, and those that their cluster names.

Receives URLs and what a session learnt; hands on the order of one round. Pure: it connects to
nobody.
"""

from __future__ import annotations

import ipaddress
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from .servers import nats_urls

__all__ = ("Rotation", "Server")


@dataclass(frozen=True)
class Server:
    """One to be tried.

    Attributes:
        url: With the credentials of the settings.
        tls_name: What its certificate must name, where that is not the URL's host.
    """

    url: str
    tls_name: str | None = None

    @property
    def host(self) -> str:
        """What its certificate must name."""
        return self.tls_name or urlsplit(self.url).hostname or ""

    @property
    def address(self) -> str:
        """``host:port``."""
        return urlsplit(self.url).netloc.rpartition("@")[2]

    def peer(self, address: str) -> Server:
        """Another of its cluster: the same scheme, credentials and, for a bare IP, certificate.

        Raises:
            ValueError: that is no address.
        """
        scheme, _, rest = self.url.partition("://")
        credentials, at, _ = rest.rpartition("@")
        (url,) = nats_urls([f"{scheme}://{credentials}{at}{address}"])
        is_bare = _is_ip(urlsplit(url).hostname or "") and not _is_ip(self.host)
        return Server(url, self.host if is_bare else None)


class Rotation:
    """The servers of the settings, for ever, and those that the newest session's INFO named.

    A peer that the cluster no longer names is forgotten. Peers of websockets are left out: the
    servers name addresses of the other protocol.
    """

    def __init__(self, urls: Iterable[str]) -> None:
        self._configured = [Server(url) for url in urls]
        self._discovered: list[Server] = []
        self._last: Server | None = None

    def learn(self, server: Server, reached: str, named: Sequence[str] | None) -> None:
        """A session with ``server`` is over; it was at ``reached``, and ``named`` its cluster."""
        self._last = server
        if server.url.startswith("ws"):
            return
        known = {configured.address for configured in self._configured}
        if server in self._configured:
            known.add(reached)  # the same under another name
        self._discovered = []
        for address in named or ():
            if address not in known:
                try:
                    self._discovered.append(server.peer(address))
                except ValueError:
                    continue

    def servers(self) -> list[Server]:
        """All of them, in the order of the next round: ours before those that were named.

        The one that was lost comes second, and not first: it may accept us while it hangs or shuts
        down. Nor last, since those that were named may be out of reach from here, as behind NAT,
        and each may cost a timeout.
        """
        order = [*_shuffled(self._configured), *_shuffled(self._discovered)]
        if self._last in order:
            order.remove(self._last)
            order.insert(1, self._last)
        return order


def _shuffled(servers: Sequence[Server]) -> list[Server]:
    return random.sample(servers, len(servers))


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
