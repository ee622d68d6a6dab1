"""What was published, for a test to look at: captured instead of sent, or read from the stream.

:func:`capture_events` lets the library do all it does with an event (build, check, size, signals,
the row in your transaction) but for the last step: nothing goes to a server. Without a capture
the assertions read what is in the stream.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import events, jsontext, subjects, tasks
from .events import Event
from .exceptions import ConfigurationError, EventError, NotConnectedError
from .extension import JetStream
from .headers import Headers
from .outcomes import Message, PublishResult, Verdict
from .testing_apps import jetstream_in

__all__ = (
    "Captured",
    "Published",
    "assert_published",
    "capture_events",
    "published_events",
    "refute_published",
)

_PUBLISH = tasks.publish_event.name
#: How many of the published events a failed assertion shows.
_SHOWN = 20

#: What is compared with: a value, a dict that may leave keys out, a type, or a predicate.
Expected = Any


@dataclass(frozen=True)
class Published:
    """One published event.

    Attributes:
        event: as its receiver would see it; ``event.headers`` are the message's.
        subject: where it went.
        queued: it was written to the outbox.
        committed: so was its transaction; always, for what was published at once.
    """

    event: Event
    subject: str
    queued: bool = False
    committed: bool = True

    @property
    def event_type(self) -> str:
        """The event's."""
        return self.event.event_type

    @property
    def payload(self) -> Any:
        """The event's, plain JSON values."""
        return self.event.payload


@dataclass(eq=False)
class _Note:
    message: Message
    queued: bool
    committed: bool

    def published(self) -> Published:
        event = events.decode(self.message.body, self.message.headers)
        return Published(event, self.message.subject, self.queued, self.committed)


class Captured(Sequence[Published]):
    """What was published while :func:`capture_events` was on, in order; grows until its end.

    What was written to an outbox is in it from its commit on.
    """

    def __init__(self, jetstream: JetStream) -> None:
        self._jetstream = jetstream
        self._around: Captured | None = vars(jetstream).get("_captured")
        self._lock = threading.Lock()
        self._notes: list[_Note] = []
        self._sequence = itertools.count(1)
        self._ids: set[str] = set()

    @property
    def uncommitted(self) -> list[Published]:
        """What was written to the outbox in a transaction that has not committed (or never did)."""
        return [one for one in self._all() if not one.committed]

    def _all(self) -> list[Published]:
        with self._lock:
            return [note.published() for note in self._notes]

    def _committed(self) -> list[Published]:
        return [one for one in self._all() if one.committed]

    def __len__(self) -> int:
        return len(self._committed())

    def __getitem__(self, index: Any) -> Any:
        return self._committed()[index]

    def __repr__(self) -> str:
        return f"<Captured {', '.join(one.event_type for one in self) or 'nothing'}>"

    # -- in the place of the library's own ---------------------------------------------------------

    def _send(self, messages: list[Message], timeout: float) -> list[PublishResult]:
        self._jetstream._before(messages)
        results = [self._stored(message) for message in messages]
        self._jetstream._after(messages, results)
        return results

    async def _asend(self, messages: list[Message], timeout: float) -> list[PublishResult]:
        return self._send(messages, timeout)

    def _stored(self, message: Message) -> PublishResult:
        if self._around is not None:
            self._around._stored(message)
        with self._lock:
            duplicate = message.event_id in self._ids
            if not duplicate:
                self._ids.add(message.event_id)
                self._notes.append(_Note(message, queued=False, committed=True))
            return PublishResult(
                True,
                message.event_id,
                message.subject,
                self._jetstream.config.stream_name,
                next(self._sequence),
                duplicate,
                verdict=Verdict.STORED,
            )

    def _written(self, rows: Iterable[Mapping[str, Any]], committed: bool) -> Callable[..., None]:
        """Notes rows of the outbox; returns what is to be called after their commit."""
        new = [_Note(_message_of(row), queued=True, committed=committed) for row in rows]
        with self._lock:
            self._notes += new

        def commit(delay: float = 0.0) -> None:
            with self._lock:  # from here on in the order of the commits
                self._notes = [note for note in self._notes if note not in new] + new
                for note in new:
                    note.committed = True

        return commit


@contextlib.contextmanager
def capture_events(jetstream: Any = None) -> Iterator[Captured]:
    """Captures what is published, in any of the ways; nothing is sent, and no server is needed.

    Events are built and checked as always, and a bad one raises. ``publish``, ``publish_batch``
    and ``apublish`` answer that the event is stored; ``publish_event.delay`` and ``publish_on``
    publish at once, in the caller's thread; ``outbox.add`` writes its row in your transaction, and
    the event is captured when that commits. All threads' events are captured.

    Args:
        jetstream: an app or its JetStream; default the current app's.

    Raises:
        ConfigurationError: the settings are wrong.
    """
    jetstream = jetstream_in(jetstream)
    captured = Captured(jetstream)
    with contextlib.ExitStack() as stack:
        put = stack.enter_context
        put(_instead(jetstream, _send=captured._send, _asend=captured._asend, _captured=captured))
        put(_instead(jetstream.app.tasks[_PUBLISH], apply_async=_apply_now(jetstream.app)))
        if jetstream.config.has_database:
            put(_instead(jetstream.outbox, **_outbox_of(jetstream.outbox, captured)))
        yield captured


@contextlib.contextmanager
def _instead(target: Any, **changes: Any) -> Iterator[None]:
    """Has an object's own attributes come before its class's."""
    own = vars(target)
    before = {name: own[name] for name in changes if name in own}
    own.update(changes)
    try:
        yield
    finally:
        for name in changes:
            own.pop(name, None)
        own.update(before)


def _apply_now(app: Any) -> Callable[..., Any]:
    """In the place of ``publish_event.apply_async``: an event that is refused raises here."""

    def apply_async(args: Any = None, kwargs: Any = None, task_id: Any = None, **_: Any) -> Any:
        return app.tasks[_PUBLISH].apply(args, kwargs, task_id=task_id, throw=True)

    return apply_async


def _outbox_of(outbox: Any, captured: Captured) -> dict[str, Any]:
    """In the place of an outbox's: rows are written as always, and noted."""
    from .nudge import nudge_after_commit

    write, make_row, execute = outbox._execute, outbox._row, outbox.publish
    last = threading.local()

    def _execute(session: Any, blocks: Any) -> None:
        write(session, blocks)
        rows = [row for _, rows in blocks for row in rows]
        if rows:
            nudge_after_commit(session, captured._written(rows, committed=False))

    def _row(event: dict[str, Any]) -> Any:
        last.made = make_row(event)
        return last.made

    def publish(event_type: str, payload: Any, **event: Any) -> PublishResult:
        result: PublishResult = execute(event_type, payload, **event)
        if not result.duplicate:
            captured._written([last.made[1]], committed=True)
        return result

    return {
        "_execute": _execute,
        "_row": _row,
        "publish": publish,
        "nudge": lambda delay=0.0: None,
    }


def _message_of(row: Mapping[str, Any]) -> Message:
    headers = {**json.loads(row["headers"]), "Nats-Msg-Id": row["event_id"]}
    return Message(row["event_id"], row["subject"], row["body"], headers)


# -- looking ---------------------------------------------------------------------------------------


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
        return captured._all() if uncommitted else captured._committed()
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
        if message["subject"] != config.dead_letter_subject:
            body = base64.b64decode(message.get("data", ""))
            headers = _headers(base64.b64decode(message.get("hdrs", "")))
            found.append(Published(events.decode(body, headers), message["subject"]))


def _headers(raw: bytes) -> Headers:
    lines = (line.partition(":") for line in raw.decode().split("\r\n")[1:])
    return Headers({name: value.strip() for name, colon, value in lines if colon})


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
