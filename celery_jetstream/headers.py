"""The headers of a message: found whatever their case, checked before they are sent, counted.

Receives the headers that a message had or that a producer gives; hands on :class:`Headers`, or
text to text for the wire. Nothing here shows a value: headers carry credentials. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from .exceptions import EventError, kind_of, shown

__all__ = ("CONTROL", "TRACE_CONTEXT", "Headers", "validate_headers", "wire_size")

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
"""What a header's value must not have: CR and LF would start another header."""

TRACE_CONTEXT = ("traceparent", "tracestate", "baggage")
"""The headers that carry a trace (W3C)."""

_NAME = re.compile(r"[!-9;-~]+")


class Headers(Mapping[str, str]):
    """Message headers, found whatever the case of their names, shown as they were sent.

    NATS compares header names exactly, but producers differ: the Ruby gem sends
    ``nats-msg-id``. The repr shows names only, since values can be credentials.
    """

    __slots__ = ("_items", "_names")

    def __init__(self, items: Mapping[str, str] | None = None) -> None:
        self._items: dict[str, str] = (
            items._items if isinstance(items, Headers) else dict(items or {})
        )
        self._names: dict[str, str] | None = None  # few are ever asked for

    def __getitem__(self, name: str) -> str:
        if self._names is None:
            self._names = {name.lower(): name for name in self._items}
        return self._items[self._names[name.lower()]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __repr__(self) -> str:
        return f"<Headers {', '.join(self._items) or 'none'}>"


def validate_headers(headers: Mapping[str, object] | None) -> dict[str, str]:
    """Return a producer's headers as they go on the wire: text to text.

    Numbers become text, ``True`` becomes ``true``. No message shows a value, since headers carry
    credentials.

    Raises:
        EventError: a name is not printable ASCII without space and colon, or begins with
            ``Nats-`` (the server acts on those); a value is not text, a number or a boolean,
            has control characters (CR and LF would start another header), or begins or ends
            with whitespace (nats-py strips it).
    """
    return {
        _header_name(name): _header_value(name, value) for name, value in (headers or {}).items()
    }


def _header_name(name: object) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise EventError(
            f"header name {shown(name)} is not legal: use printable ASCII without space and ':'"
        )
    if name.lower().startswith("nats-"):
        raise EventError(
            f"header {shown(name)} is not yours to set: 'Nats-' headers are the server's"
        )
    return name


def _header_value(name: str, value: object) -> str:
    if not isinstance(value, (str, int, float)):
        raise EventError(f"header {shown(name)} is {kind_of(value)}, not text or a number")
    text = str(value).lower() if isinstance(value, bool) else str(value)
    if CONTROL.search(text):
        raise EventError(f"header {shown(name)} has control characters in its value")
    if text != text.strip():
        raise EventError(f"header {shown(name)} has a value that begins or ends with whitespace")
    return text


def wire_size(body: bytes, headers: Mapping[str, str] | None) -> int:
    """Count the bytes that the server holds against ``max_payload``: the header block and the body.

    Without headers there is no block. nats-py sends more than the server takes unchecked, and
    is closed for ever for it.
    """
    if not headers:
        return len(body)
    lines = sum(len(f"{name}: {value}\r\n".encode()) for name, value in headers.items())
    return len(body) + len(b"NATS/1.0\r\n") + lines + len(b"\r\n")
