"""The readers of settings: what a user may write for a duration, a number, a name, a list.

A *reader* takes what a user wrote and returns the value to use, or raises :class:`ValueError`
with the rule that was broken, never with the value: the caller knows what may be shown of it.
A reader takes its own result too. Pure; only :func:`error_classes` imports, what it is told to.
"""

from __future__ import annotations

import builtins
import difflib
import re
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

from kombu.utils.imports import symbol_by_name

from .exceptions import SubjectError

__all__ = (
    "FLAGS",
    "Reader",
    "backoff",
    "choice",
    "database_url",
    "duration",
    "error_classes",
    "factory",
    "flag",
    "identifier",
    "items",
    "masked",
    "name",
    "nearest",
    "no_dlq_action",
    "seconds",
    "text",
    "whole",
)

Reader = Callable[[Any], Any]

FLAGS = dict.fromkeys(("true", "1", "yes", "on"), True) | dict.fromkeys(
    ("false", "0", "no", "off"), False
)
"""The words for True and False, in lower case."""

_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?|\.[0-9]+)\s*(ms|[smhd])?")
_UNITS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}


def duration(value: object) -> float:
    """Return a duration in seconds.

    Args:
        value: a number of seconds, a timedelta, or text such as ``"500ms"``, ``"1.5s"``,
            ``"5m"``, ``"1h"``, ``"2d"`` or ``"30"``.

    Raises:
        ValueError: it is no duration, or negative, or not finite.
    """
    if isinstance(value, timedelta):
        value = value.total_seconds()
    elif isinstance(value, str) and (parts := _DURATION.fullmatch(value.strip())):
        value = float(parts[1]) * _UNITS[parts[2] or "s"]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError("must be seconds as a number or timedelta, or text with ms, s, m, h or d")
    if not 0 <= value < 1e12:  # nor is NaN between them
        raise ValueError("must be a finite number of seconds, not below 0")
    return float(value)


def error_classes(value: object) -> tuple[type[Exception], ...]:
    """Return the exception classes of a list that holds classes and dotted names.

    Raises:
        ValueError: a name cannot be imported, or something is no exception class.
    """
    return tuple(map(_error_class, items(value)))


def _error_class(item: object) -> type[Exception]:
    found = item
    if isinstance(item, str):
        try:
            found = symbol_by_name(item) if re.search("[.:]", item) else getattr(builtins, item)
        except Exception as error:  # importing runs code, which may raise anything
            raise ValueError(f"{item} cannot be imported ({type(error).__name__})") from None
    if not (isinstance(found, type) and issubclass(found, Exception)):
        raise ValueError("each must be a subclass of Exception, or the dotted name of one")
    return found


def items(value: object) -> tuple[Any, ...]:
    """Return the items of a list, a tuple, or text with commas."""
    if isinstance(value, str):
        return tuple(item for part in value.split(",") if (item := part.strip()))
    if isinstance(value, (list, tuple)):
        return tuple(value)
    raise ValueError("must be a list, or text with commas")


def seconds(least: str, most: str) -> Reader:
    """Make the reader of a duration between two, both included."""
    low, high = duration(least), duration(most)

    def read(value: object) -> float:
        if not low <= (found := duration(value)) <= high:
            raise ValueError(f"must be between {least} and {most}")
        return found

    return read


def whole(least: int, most: int, hint: str = "") -> Reader:
    """Make the reader of a whole number between two, both included."""

    def read(value: object) -> int:
        if isinstance(value, str) and value.strip().isdecimal():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise ValueError(f"must be a whole number between {least} and {most}{hint}")
        return value

    return read


def flag(value: object) -> bool:
    """Return True or False, or what a word of ``FLAGS`` says."""
    if (found := FLAGS.get(str(value).strip().lower())) is None:
        raise ValueError("must be True or False")
    return found


def text(value: object) -> str:
    """Return text without the blanks around it."""
    if not isinstance(value, str) or not value.strip() or not value.isprintable():
        raise ValueError("must be text that is not blank, without control characters")
    return value.strip()


def name(check: Callable[[str], str]) -> Reader:
    """Make the reader of a name, from one of the checks of ``subjects``."""

    def read(value: str) -> str:
        if value == "":
            raise ValueError("must be set, and not empty")
        try:
            return check(value)
        except SubjectError as error:  # "<what> <value> is not legal: <rule>"
            raise ValueError(str(error).rpartition(" is not legal: ")[2]) from None

    return read


def backoff(value: object) -> tuple[float, ...]:
    """Return one duration or more."""
    if not (steps := tuple(map(seconds("0s", "24h"), items(value)))):
        raise ValueError("must hold one duration or more")
    return steps


def choice(*words: str) -> Reader:
    """Make the reader of one of some words."""

    def read(value: object) -> str:
        if value not in words:
            raise ValueError(f"must be one of {', '.join(map(repr, words))}")
        return str(value)

    return read


def identifier(value: object) -> str:
    """Return the name of a table or schema."""
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,47}", value):
        raise ValueError("must be letters, digits and '_', at most 48, not beginning with a digit")
    return value


def database_url(value: object) -> str:
    """Return a URL of SQLAlchemy's with a driver that is not asynchronous."""
    found = value if isinstance(value, str) else ""
    if hasattr(value, "render_as_string"):  # SQLAlchemy's URL
        found = value.render_as_string(hide_password=False)
    if not (scheme := re.match(r"([a-z0-9_]+)(\+[a-z0-9_]+)?://", found)):
        raise ValueError("must be a database URL")
    if scheme[1] not in ("postgresql", "mysql", "mariadb", "sqlite"):
        raise ValueError("must be of PostgreSQL, MariaDB, MySQL or SQLite")
    if scheme[2] in ("+asyncpg", "+aiosqlite", "+aiomysql", "+asyncmy", "+psycopg_async"):
        raise ValueError("its driver is asynchronous, and Celery's tasks are not")
    return found


def factory(value: object) -> Any:
    """Return something to call, or the dotted name of it, which is imported at the first use."""
    if callable(value):
        return value
    if not isinstance(value, str) or not re.fullmatch(r"[\w.]+[.:]\w+", value.strip()):
        raise ValueError("must be something to call, or its dotted name")
    return value.strip()


def no_dlq_action(value: object) -> str:
    """Return the one action there is."""
    if value != "log_and_term":
        raise ValueError("there is no such action")
    return "log_and_term"


def http_address(value: object) -> tuple[str, int]:
    """Return host and port of ``8080``, ``:8080``, ``host:port`` or ``[::1]:8080``."""
    if isinstance(value, tuple) and len(value) == 2:  # as it was read before
        value = f"[{value[0]}]:{value[1]}" if ":" in str(value[0]) else f"{value[0]}:{value[1]}"
    given = str(value).strip() if isinstance(value, (str, int)) else ""
    found = re.fullmatch(r"(?:(\[[0-9A-Fa-f:.]+\]|[\w.-]*):)?(\d{1,5})", given)
    if isinstance(value, bool) or not found or int(found[2]) > 65535:
        raise ValueError("must be a port, :port, host:port or [IPv6 address]:port")
    return (found[1] or "").strip("[]") or "127.0.0.1", int(found[2])


def masked(value: object) -> str:
    """Return the ``repr`` of a value without what may be credentials in the URLs it has."""
    text = re.sub("://.*@", "://***@", repr(value))
    text = re.sub(r"""(://[^/:\[\s]*:)(?![0-9]{1,5}[/?'"])[^/\s'"]+""", r"\1***", text)  # no port
    return re.sub(r"""(://[^\s?]*\?)[^\s'")]+""", r"\1***", text)


def nearest(name: str, names: Iterable[str]) -> str:
    """Return the one of ``names`` that was probably meant, or ``""``."""
    return "".join(difflib.get_close_matches(name, names, n=1))
