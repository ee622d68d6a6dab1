"""What was published, for a test to look at: what is captured, else what is in the stream.

:func:`assert_published` and its like compare it with what a test expects, and say where it differs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from . import events, jsontext, subjects
from .deadletter import original_of
from .exceptions import ConfigurationError, EventError, NotConnectedError
from .extension import JetStream
from .headers import Headers
from .testing_apps import jetstream_in
from .testing_capture import Captured, Published

__all__ = ("assert_published", "published_events", "refute_published")

#: How many of the published events a failed assertion shows.
_SHOWN = 20

#: What is compared with: a value, a dict that may leave keys out, a type, or a predicate.
Expected = Any


def published_events(
    event_type: str | None = None, *, jetstream: Any = None, uncommitted: bool = False, **like: Any
) -> list[Published]:
    """What was published, oldest first: what is captured, else what the stream has of this app.

    Args:
        event_type: a type, or a pattern as handlers have them: ``order.*``.
        jetstream: an app or its JetStream; default the current app's.
        uncommitted: with what was added to the outbox and not committed, for tests whose database
            is rolled back at the end.
        like: see :func:`assert_published`.

    Raises:
        ConfigurationError: there is no capture, and no server to be asked.
    """
    return [one for one in _seen(jetstream, uncommitted) if not _why_not(one, event_type, like)]


def assert_published(
    event_type: str | None = None,
    payload: Expected = ...,
    *,
    count: int | None = None,
    jetstream: Any = None,
    uncommitted: bool = False,
    **like: Any,
) -> list[Published]:
    """Fails where no such event was published (or not ``count`` of them); says what was.

    Args:
        event_type: a type, or a pattern as handlers have them: ``order.*``.
        payload: a dict whose keys the payload must have with these values, at any depth (others
            may be there); a type, or a predicate; or any other value, which it must equal.
        count: exactly so many; default one or more.
        jetstream: an app or its JetStream; default the current app's.
        uncommitted: as for :func:`published_events`.
        like: in the same way ``subject``, ``headers``, and the fields of an event:
            ``resource_id="1"``.

    Returns:
        The events that are like it.

    Raises:
        AssertionError: there are none, or not so many.
        TypeError: an event has no such field.
    """
    __tracebackhide__ = True
    if payload is not ...:
        like["payload"] = payload
    seen = _seen(jetstream, uncommitted)
    found = [one for one in seen if not _why_not(one, event_type, like)]
    if (len(found) != count) if count is not None else not found:
        wanted = "was not published" if count is None else f"was published {len(found)} times"
        wanted += "" if count is None else f", not {count}"
        text = f"{_described(event_type, like)} {wanted}"
        raise AssertionError(f"{text}\n{_account(jetstream, seen, event_type, like)}")
    return found


def refute_published(
    event_type: str | None = None,
    payload: Expected = ...,
    *,
    jetstream: Any = None,
    uncommitted: bool = False,
    **like: Any,
) -> None:
    """Fails where such an event was published; arguments as for :func:`assert_published`.

    Raises:
        AssertionError: there is one.
    """
    __tracebackhide__ = True
    if payload is not ...:
        like["payload"] = payload
    seen = _seen(jetstream, uncommitted)
    if any(not _why_not(one, event_type, like) for one in seen):
        text = f"{_described(event_type, like)} was published"
        raise AssertionError(f"{text}\n{_account(jetstream, seen, event_type, like)}")


def _seen(jetstream: Any, uncommitted: bool) -> list[Published]:
    jetstream = jetstream_in(jetstream)
    captured: Captured | None = vars(jetstream).get("_captured")
    if captured is not None:
        return captured.everything if uncommitted else list(captured)
    return _in_stream(jetstream)


def _in_stream(jetstream: JetStream) -> list[Published]:
    """What the stream has of this app's events, from the first on; not its dead letters."""
    if jetstream.connected:
        with contextlib.suppress(NotConnectedError):
            return jetstream.connection.run(_read, jetstream, timeout=10)
    raise ConfigurationError(
        "nothing is captured, and there is no server to be asked what was published: use "
        "capture_events(), or a server's fixture (jetstream), around what publishes"
    )


async def _read(jetstream: JetStream) -> list[Published]:
    config = jetstream.config
    found: list[Published] = []
    request = {"seq": 1, "next_by_subj": f"{config.app_name}.sync.*"}
    while True:
        answer = await jetstream._api(f"STREAM.MSG.GET.{config.stream_name}", request)
        if "message" not in answer:
            return found
        message = answer["message"]
        request["seq"] = message["seq"] + 1
        stored = original_of(message)
        if stored.subject != config.dead_letter_subject:
            event = events.decode(stored.body, Headers(stored.headers))
            found.append(Published(event, stored.subject))


# -- comparing -------------------------------------------------------------------------------------


def _why_not(one: Published, event_type: str | None, like: Mapping[str, Expected]) -> str:
    """Why an event is not what is looked for; "" where it is."""
    if event_type is not None and not subjects.matches(event_type, one.event_type):
        return f"event_type is {one.event_type!r}"
    for name, expected in like.items():
        if reason := _difference(expected, _value(one, name), name):
            return reason
    return ""


def _value(one: Published, name: str) -> Any:
    if name in ("subject", "queued", "committed"):
        return getattr(one, name)
    if name == "headers":
        return dict(one.event.headers)
    try:
        return one.event[name]
    except KeyError:
        raise TypeError(f"an event has no field {name!r}") from None


def _difference(expected: Expected, found: Any, path: str) -> str:
    """Where a value is not like what is expected; "" where it is."""
    if isinstance(expected, Mapping):
        if not isinstance(found, Mapping):
            return f"{path} is {found!r}"
        for key, value in expected.items():
            if key not in found:
                return f"{path} has no {key!r}"
            if reason := _difference(value, found[key], f"{path}[{key!r}]"):
                return reason
        return ""
    if isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        pairs = enumerate(zip(expected, found, strict=True))
        reasons = (_difference(one, other, f"{path}[{at}]") for at, (one, other) in pairs)
        return next(filter(None, reasons), "")
    if isinstance(expected, type):
        return "" if isinstance(found, expected) else f"{path} is {found!r}"
    if callable(expected):
        return "" if expected(found) else f"{_name(expected)} does not hold for {path}"
    return "" if expected == found or _plain(expected) == found else f"{path} is {found!r}"


def _plain(value: Any) -> Any:
    """As it is in an event: a ``Decimal``, a ``UUID``, a time have become text."""
    try:
        return jsontext.plain(value, "")
    except EventError:
        return value


def _name(expected: Any) -> str:
    is_named = callable(expected) and hasattr(expected, "__name__")
    return str(expected.__name__) if is_named else f"like {expected!r}"


def _described(event_type: str | None, like: Mapping[str, Expected]) -> str:
    wanted = [f"{name} {_name(value)}" for name, value in like.items()]
    return " with ".join([event_type or "an event", *([" and ".join(wanted)] if wanted else [])])


def _account(
    jetstream: Any, seen: list[Published], event_type: str | None, like: Mapping[str, Expected]
) -> str:
    """What was published, and why each of it is not what was looked for."""
    lines = ["published:" if seen else "nothing was published"]
    for number, one in enumerate(seen[:_SHOWN], 1):
        why = _why_not(one, event_type, like)
        lines.append(f"{number:3}. {one.event_type} {one.payload!r} to {one.subject}")
        if why and not why.startswith("event_type"):
            lines[-1] += f"\n     {why}"
    if len(seen) > _SHOWN:
        lines.append(f"… and {len(seen) - _SHOWN} more")
    captured = vars(jetstream_in(jetstream)).get("_captured")
    waiting = [] if captured is None else [o for o in captured.uncommitted if o not in seen]
    if waiting:
        lines.append("in the outbox, and not committed (uncommitted=True counts it as well):")
        lines += [f"  -  {one.event_type} {one.payload!r}" for one in waiting[:_SHOWN]]
    return "\n".join(lines)
