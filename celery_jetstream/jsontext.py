"""JSON text: strictly read, strictly written, and Python's values made JSON's on the way.

Receives bytes and hands on plain values (dict, list, str, int, float, bool, None), or receives
nearly any value and hands on bytes. What JSON has not is refused in both directions; a value
that cannot be written is named by its path: ``payload.items[3].price``. Pure.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from datetime import date, time
from decimal import Decimal
from enum import Enum
from types import NoneType
from typing import Any
from uuid import UUID

from .exceptions import DecodeError, EncodeError, kind_of, shown

__all__ = ("MAX_DEPTH", "plain", "read", "write")

MAX_DEPTH = 200
"""Levels of objects and arrays in a text (RFC 8259 §9 lets a reader set such a limit)."""

_CONTAINERS = {dict, list}
_PLAIN_TYPES = {dict, list, str, int, float, bool, NoneType}


def read(body: bytes) -> Any:
    """Return the value of a text.

    Raises:
        DecodeError: with reason ``malformed_json``: it is not UTF-8 or not JSON, has NaN or
            Infinity, or more than ``MAX_DEPTH`` levels.
    """
    try:
        value = _DECODER.decode(body.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DecodeError(f"the body is not JSON: {error}", reason="malformed_json") from error
    brackets = body.count(b"{") + body.count(b"[")  # nothing is nested deeper than that
    if brackets > MAX_DEPTH and not _is_plain(value):
        reason = f"the body is nested deeper than {MAX_DEPTH} levels"
        raise DecodeError(reason, reason="malformed_json")
    return value


def write(value: object) -> bytes:
    r"""Write a value as compact UTF-8 text, converted as :func:`plain` does.

    NUL is legal and kept (``\u0000``; PostgreSQL's ``jsonb`` refuses it, which is why rows hold
    bytes).

    Raises:
        EncodeError: it holds what JSON has not.
    """
    if _is_plain(value):
        try:
            return _ENCODER.encode(value).encode()
        except ValueError:
            pass  # NaN, a lone surrogate, a number of more than 4300 digits: the walk finds it
    return _ENCODER.encode(_plain(value, "", 0)).encode()


def plain(value: object, path: str) -> Any:
    """Return ``value`` in JSON's types; ``path`` is how messages call it.

    Dates and times become ISO-8601 text, ``Decimal`` and ``UUID`` text, an ``Enum`` its value, a
    tuple an array, a dataclass or a pydantic model an object. A value that has those types
    already is returned as it is, and only :func:`write` looks at its numbers and texts.

    Raises:
        EncodeError: it holds what JSON has not (NaN, bytes, a set, a key that is neither text
            nor integer, a lone surrogate, more than ``MAX_DEPTH`` levels); the message and the
            error's ``path`` lead there.
    """
    return value if _is_plain(value) else _plain(value, path, 0)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)
_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _is_plain(value: object) -> bool:
    """Tell, level by level, whether a value has JSON's types only and is not nested too deep.

    Much cheaper than :func:`_plain`, and nearly always the answer is yes. A container met twice
    on one level is looked at once, so that cycles end at ``MAX_DEPTH``.
    """
    level: list[Any] = [[value]]
    for _ in range(MAX_DEPTH + 1):
        deeper: dict[int, Any] = {}
        for node in level:
            children = node.values() if type(node) is dict else node
            kinds = set(map(type, children))
            if not kinds <= _PLAIN_TYPES or (type(node) is dict and set(map(type, node)) - {str}):
                return False
            if kinds & _CONTAINERS:
                deeper.update(
                    (id(child), child) for child in children if type(child) in _CONTAINERS
                )
        if not deeper:
            return True
        level = list(deeper.values())
    return False


def _plain(value: object, path: str, depth: int) -> Any:
    """Return ``value`` in JSON's types, every value checked.

    Raises:
        EncodeError: with the path to the first value that JSON has not.
    """
    value = _convert(value, path)
    if not isinstance(value, (dict, list)):
        return value
    if depth >= MAX_DEPTH:
        raise _refused(path, f"is nested deeper than {MAX_DEPTH} levels, or contains itself")
    if isinstance(value, list):
        return [_plain(item, f"{path}[{i}]", depth + 1) for i, item in enumerate(value)]
    plain = {
        _plain_key(key, path): _plain(item, _join(path, key), depth + 1)
        for key, item in value.items()
    }
    if len(plain) < len(value):
        raise _refused(path, "has an integer and a text key that read alike")
    return plain


def _plain_key(key: object, path: str) -> str:
    if isinstance(key, bool) or not isinstance(key, (str, int)):
        raise _refused(path, f"has a key of type {kind_of(key)} ({shown(key)}); use text")
    return str(_convert(key, _join(path, key)))


def _convert(value: object, path: str) -> Any:
    """Turn the outermost layer of ``value`` into one of JSON's types."""
    match value:
        case Enum():
            return _convert(value.value, path)
        case None | str() | int() | float():
            return _checked_scalar(value, path)
        case Mapping():
            return dict(value)
        case list() | tuple():
            return list(value)
        case date() | time() | UUID():
            return _as_text(value)
        case Decimal() if value.is_finite():
            return str(value)
    record = _as_record(value)
    if record is None:
        raise _refused(path, f"is {shown(value)} of type {kind_of(value)}, which JSON has not")
    return record


def _as_text(value: date | time | UUID) -> str:
    text = str(value) if isinstance(value, UUID) else value.isoformat()
    return f"{text[:-6]}Z" if text.endswith("+00:00") else text


def _as_record(value: object) -> Any:
    """Return a dataclass or a pydantic model (told by its method) as an object, else ``None``."""
    if isinstance(value, type):
        return None
    if is_dataclass(value):
        return {item.name: getattr(value, item.name) for item in fields(value)}
    dump = getattr(value, "model_dump", None)
    return dump(mode="json") if callable(dump) else None


def _checked_scalar(value: str | float | None, path: str) -> str | float | None:
    try:
        _ENCODER.encode(value).encode()
    except ValueError as error:
        raise _refused(path, f"cannot be written: {error}") from error
    return value


def _join(path: str, key: object) -> str:
    if not isinstance(key, str) or not key.isidentifier():
        return f"{path}[{key!r}]"
    return f"{path}.{key}" if path else key


def _refused(path: str, reason: str) -> EncodeError:
    where = path if len(path) <= 200 else f"{path[:197]}..."
    return EncodeError(f"{where or 'the envelope'} {reason}", path=path)
