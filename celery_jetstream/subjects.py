"""The subject grammar: names are checked here before anything else is built from them.

Receives application names, event types and patterns; hands on subjects, names and answers
about wildcards. Pure: it never asks the server.

A *subject* is text of tokens joined by dots. In a *pattern* a token may be ``*`` (any one
token), and the last may be ``>`` (one or more tokens, never none). NATS sees a wildcard only
where it is a whole token and takes ``a*`` literally; here that is refused, since nobody means
it. Rules are those of nats-server (``IsValidSubject``, ``isValidName``), a little stricter.

Every refusal is a :class:`~celery_jetstream.exceptions.SubjectError` that names the role of
the value, the value and the rule.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from .exceptions import SubjectError, shown

__all__ = (
    "MAX_LENGTH",
    "consume_subject",
    "covered",
    "dead_letter_subject",
    "durable_name",
    "fault",
    "matches",
    "overlap",
    "publish_subject",
    "specificity",
    "validate_app_name",
    "validate_pattern",
    "validate_stream_name",
    "validate_subject",
    "validate_token",
)

MAX_LENGTH = 255
"""Characters in a subject; bytes in a stream's or a consumer's name (the server's own limit)."""

_TOKEN = re.compile(r"[A-Za-z0-9_-]+")
_DLQ = "dlq"


def publish_subject(app_name: str, destination_app: str) -> str:
    """Name where ``app_name`` publishes its events for ``destination_app``.

    Raises:
        SubjectError: a name is not a legal token, or the subject is longer than 255 characters.
    """
    source = validate_app_name(app_name, "app_name")
    destination = validate_app_name(destination_app, "destination_app")
    return validate_subject(f"{source}.sync.{destination}")


def consume_subject(app_name: str, destination_app: str) -> str:
    """Name where ``app_name`` receives: the subject on which ``destination_app`` publishes."""
    return publish_subject(destination_app, app_name)


def dead_letter_subject(app_name: str) -> str:
    """Name where the dead letters of ``app_name``, as the one that handles, are kept."""
    return validate_subject(f"{validate_app_name(app_name)}.sync.{_DLQ}")


def durable_name(app_name: str, source: str | None = None) -> str:
    """Name a durable consumer that all bridges of ``app_name`` share.

    Args:
        app_name: the app that receives.
        source: the app that it receives from, where that has a consumer of its own beside the
            first.
    """
    end = "" if source is None else f"-{validate_app_name(source)}"
    return validate_token(f"{validate_app_name(app_name)}-workers{end}", "durable name")


def validate_token(value: str, what: str) -> str:
    """Return ``value`` if it can stand as one token of our subjects.

    Args:
        value: ASCII letters, digits, ``-`` and ``_``; 1 to 255 of them.
        what: the role of the value, for the message: ``"app_name"``.

    Raises:
        SubjectError: it cannot.
    """
    if not isinstance(value, str) or not _TOKEN.fullmatch(value) or len(value) > MAX_LENGTH:
        raise _refusal(what, value, "use 1 to 255 letters, digits, '-' and '_'")
    return value


def validate_app_name(value: str, what: str = "app_name") -> str:
    """Return ``value`` if an application may be called so: a token, but not ``dlq``.

    An application called ``dlq`` would publish into everybody's dead letters.

    Raises:
        SubjectError: it may not.
    """
    if validate_token(value, what) == _DLQ:
        raise _refusal(what, value, "'dlq' is the dead-letter subject's last token")
    return value


def validate_stream_name(value: str) -> str:
    r"""Return ``value`` if a stream may be called so; the server makes a directory of it.

    Raises:
        SubjectError: it is empty, longer than 255 bytes, or contains whitespace, control
            characters or one of ``. * > / \``.
    """
    if (
        not isinstance(value, str)
        or not _is_clean(value, forbidden=".*>/\\")
        or not 1 <= len(value.encode()) <= MAX_LENGTH
    ):
        rule = r"use 1 to 255 bytes without whitespace, control characters and . * > \ /"
        raise _refusal("stream name", value, rule)
    return value


def validate_subject(subject: str) -> str:
    """Return ``subject`` if an event may be published to it: concrete, and not the server's.

    Raises:
        SubjectError: it has wildcards, empty tokens, whitespace or control characters, more
            than 255 characters, or begins with ``$`` (``$JS``, ``$SYS``, ``$KV``: the server's
            API) or ``_INBOX`` (replies).
    """
    if reason := fault(subject):
        raise _refusal("subject", subject, reason)
    if subject.startswith(("$", "_INBOX")):
        raise _refusal("subject", subject, "'$...' and '_INBOX...' belong to the server")
    return subject


def validate_pattern(pattern: str) -> str:
    """Return ``pattern`` if it is a legal event-type pattern, or a subject of a stream.

    Raises:
        SubjectError: ``*`` or ``>`` is part of a token, ``>`` is not last, or what
            :func:`validate_subject` says of the tokens.
    """
    if reason := fault(pattern, wildcards=True):
        raise _refusal("pattern", pattern, reason)
    return pattern


def fault(value: object, *, wildcards: bool = False) -> str | None:
    """Say what is wrong with a text of dotted tokens, or ``None`` if nothing is.

    Args:
        value: a subject, an event type or a pattern.
        wildcards: whether ``*`` and a last ``>`` are legal tokens.
    """
    if not isinstance(value, str):
        return "it must be text"
    if len(value) > MAX_LENGTH:
        return f"it has {len(value)} characters, more than {MAX_LENGTH}"
    if not _is_clean(value):
        return "whitespace and control characters are not allowed"
    tokens = value.split(".")
    if not all(tokens):
        return "tokens between the dots must not be empty"
    if wildcards:
        if tokens[-1] == ">":
            tokens.pop()
        tokens = [token for token in tokens if token != "*"]
    if any("*" in token or ">" in token for token in tokens):
        if wildcards:
            return "'*' must be a whole token, and '>' a whole token and the last"
        return "wildcards are not allowed"
    return None


def matches(pattern: str, subject: str) -> bool:
    """Tell whether a concrete ``subject`` (or event type) falls under ``pattern``.

    As in NATS, ``a.>`` matches ``a.b`` and ``a.b.c`` but not ``a``. Neither is validated: an
    event type that came from outside is compared as it is.
    """
    wanted, tokens = pattern.split("."), subject.split(".")
    if wanted[-1] == ">":
        wanted.pop()
        if len(tokens) <= len(wanted):
            return False
        tokens = tokens[: len(wanted)]
    return len(wanted) == len(tokens) and all(
        want in ("*", token) for want, token in zip(wanted, tokens, strict=True)
    )


def covered(subject: str, patterns: Iterable[str]) -> bool:
    """Tell whether a concrete ``subject`` falls under one of the ``patterns``."""
    return any(matches(pattern, subject) for pattern in patterns)


def overlap(a: str, b: str) -> bool:
    """Tell whether some subject falls under both patterns.

    Two streams whose subjects overlap are refused by the server (error 10065), and so are two
    consumers of one work queue (10100).
    """
    left, right = a.split("."), b.split(".")
    for one, other in zip(left, right, strict=False):
        if ">" in (one, other):
            return True
        if one != other and "*" not in (one, other):
            return False
    return len(left) == len(right)


def specificity(pattern: str) -> tuple[int, ...]:
    """Return a sort key that puts the most specific pattern first: ``min(found, key=...)``.

    Tokens are compared from the left, and a literal comes before ``*``, and ``*`` before
    ``>``: ``order.created`` < ``order.*`` < ``order.>`` < ``*.created`` < ``>``. A pattern that
    matches a part of what another matches comes before it. A tie says only that wildcards
    stand at the same places; among patterns that match one subject there is none, except
    between equal patterns.
    """
    return tuple({"*": 1, ">": 2}.get(token, 0) for token in pattern.split("."))


def _is_clean(text: str, forbidden: str = "") -> bool:
    """Tell whether no character of ``text`` is blank, unprintable or ``forbidden``."""
    # of all that is blank, only the space counts as printable
    return text.isprintable() and not any(map(text.__contains__, f" {forbidden}"))


def _refusal(what: str, value: object, rule: str) -> SubjectError:
    return SubjectError(f"{what} {shown(value)} is not legal: {rule}", subject=value)
