"""What the code under test publishes, captured instead of sent: :func:`capture_events`.

The library does all it does with an event (build, check, size, signals, the row in your
transaction) but for the last step: nothing goes to a server.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import events, tasks
from .events import Event
from .extension import JetStream
from .outcomes import Message, PublishResult, Verdict
from .testing_apps import jetstream_in

__all__ = ("Captured", "Published", "capture_events")

_PUBLISH = tasks.publish_event.name


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
        return [one for one in self.everything if not one.committed]

    @property
    def everything(self) -> list[Published]:
        """With what is not committed."""
        with self._lock:
            return [note.published() for note in self._notes]

    def _committed(self) -> list[Published]:
        return [one for one in self.everything if one.committed]

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
        self._jetstream._after(messages, results, 0.0)
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
