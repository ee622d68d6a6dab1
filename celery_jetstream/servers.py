"""The servers: where they are and how to log in there, checked, and shown without credentials.

Receives ``jetstream_nats_urls`` and ``jetstream_nats_options`` as a user wrote them; hands on
what ``nats.connect()`` takes, and texts that may stand in a message or a log line. Pure: it
connects to nobody.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any
from urllib.parse import urlsplit

from .readers import Reader, flag, items, nearest, seconds, text, whole

__all__ = ("masked_url", "nats_options", "nats_urls", "shown_options", "shown_urls")


# ── where ────────────────────────────────────────────────────────────────────


def nats_urls(value: object) -> tuple[str, ...]:
    """Return the URLs of a list, or of text with commas; scheme and port may be left out."""
    if not (urls := tuple(map(_url, items(value)))):
        raise ValueError("must name one server or more")
    if len({url.startswith("ws") for url in urls}) > 1:
        raise ValueError("ws:// and wss:// cannot be mixed with nats:// and tls://")
    return urls


def _url(value: object) -> str:
    """Return a URL with its scheme, and with a port where NATS has a default for it."""
    given = text(value)
    try:
        url = urlsplit(given if "://" in given else f"nats://{given}")
        host, port = url.hostname, url.port
    except ValueError:
        hint = "a user or password with one of , / : @ ? # belongs in jetstream_nats_options"
        raise ValueError(f"the port must be a number up to 65535 ({hint})") from None
    is_ws = url.scheme in ("ws", "wss")
    if not is_ws and url.scheme not in ("nats", "tls"):
        raise ValueError("the scheme must be nats, tls, ws or wss")
    extra = url.query or url.fragment or (url.path.strip("/") and not is_ws)
    if not host or port == 0 or extra or " " in given:
        raise ValueError("each must be scheme://host:port, or scheme://user:password@host:port")
    default = "" if port or is_ws else ":4222"
    return f"{url.scheme}://{url.netloc.removesuffix(':')}{default}{url.path if is_ws else ''}"


def shown_urls(value: object) -> str:
    """Return the ``repr`` of one or more URLs, right or wrong, without credentials."""
    if isinstance(value, (list, tuple)):
        return repr(tuple(map(masked_url, value)))
    return repr(masked_url(value))


def masked_url(url: object) -> str:
    """Return scheme, host and port; where it is no URL, nothing that may be a password."""
    if not isinstance(url, str):
        return f"<{type(url).__name__}>"
    scheme = "".join(re.findall(r"\A\s*[A-Za-z]+://", url))
    _, at, place = url.removeprefix(scheme).rpartition("@")
    place = re.split("[/?#]", place)[0]
    host, colon, port = place.partition(":")
    if colon and not host.startswith("[") and not re.fullmatch("[0-9]{0,5}", port):
        place = f"{host}:***"
    return f"{scheme}{'***@' if at else ''}{place}"


# ── how ──────────────────────────────────────────────────────────────────────


def _secret(value: object) -> object:
    if not isinstance(value, str) and not callable(value):
        raise ValueError("must be text, or a callable that returns it")
    return value


def _tls(value: object) -> object:
    if not hasattr(value, "wrap_bio"):  # to import ssl is to import socket
        raise ValueError("must be an ssl.SSLContext, such as ssl.create_default_context()")
    return value


_PLAIN_OPTIONS: dict[str, Reader] = {
    **dict.fromkeys(("dont_randomize", "tls_handshake_first"), flag),
    **dict.fromkeys(("connect_timeout", "drain_timeout", "flush_timeout"), seconds("0.1s", "1h")),
    **dict.fromkeys(("inbox_prefix", "name", "tls_hostname"), text),
    "max_outstanding_pings": whole(1, 1000),
    "pending_size": whole(0, 2**40),
    "ping_interval": seconds("0.1s", "24h"),
    "tls": _tls,
}
_MASKED_OPTIONS: dict[str, Reader] = {
    **dict.fromkeys(("user", "password", "token"), _secret),
    **dict.fromkeys(("nkeys_seed", "nkeys_seed_str", "user_credentials"), lambda value: value),
    **dict.fromkeys(("signature_cb", "user_jwt_cb", "ws_connection_headers"), lambda value: value),
}
_OPTIONS = _PLAIN_OPTIONS | _MASKED_OPTIONS
_SUPERVISED = re.compile(
    "servers|allow_reconnect|max_reconnect_attempts|reconnect_time_wait|no_echo|verbose|pedantic"
    "|reconnect_to_server_handler|.*_cb"
)


def nats_options(value: object) -> Mapping[str, Any]:
    """Return keyword arguments for ``nats.connect()``, each read by its own reader."""
    if not isinstance(value, Mapping):
        raise ValueError("must be a dict of keyword arguments for nats.connect()")
    return MappingProxyType(
        {key: _option(key, option) for key, option in value.items() if option is not None}
    )


def _option(key: object, value: object) -> object:
    if key not in _OPTIONS:
        if _SUPERVISED.fullmatch(str(key)):
            raise ValueError(f"{key}: the connection supervisor sets this; leave it out")
        near = nearest(str(key), _OPTIONS)
        hint = f"did you mean {near}?" if near else f"the options are {', '.join(sorted(_OPTIONS))}"
        raise ValueError(f"{key} is not an option that can be set; {hint}")
    try:
        return _OPTIONS[str(key)](value)
    except ValueError as error:
        raise ValueError(f"{key} {error}") from None


def shown_options(value: object) -> str:
    """Return the ``repr`` of options, right or wrong, without credentials."""
    if isinstance(value, Mapping):
        return repr({key: value[key] if key in _PLAIN_OPTIONS else "***" for key in value})
    return f"<{type(value).__name__}>"
