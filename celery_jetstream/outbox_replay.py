"""Replay: kept events are published again, for a JetStream that has lost what it had stored."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from typing import Any

from sqlalchemy import Row, and_, func, literal_column, select

from . import readers
from .flusher import PER_ROW, PUBLISH_TIMEOUT, Flusher, message_of
from .outbox_changes import BATCH, Progress
from .outbox_filter import Filter
from .outcomes import Message, PublishResult, Verdict
from .sqltypes import db_now

__all__ = ("HEADER", "Moment", "Replay", "ReplayResult")

logger = logging.getLogger(__name__)

#: The header that tells a replayed message: when the replay began.
HEADER = "x-replay"
#: A time, or (a duration as settings have it) so long ago.
Moment = datetime | float | str


@dataclass(frozen=True)
class ReplayResult:
    """How far a replay came.

    Attributes:
        sent: events that JetStream has stored (``dry_run``: would be sent).
        refused: events that it will not store, or whose row is damaged; they were passed over.
        last_id: all that was asked for up to this row's id has been done; go on with ``after=``.
        error: why it ended before the end; None where it came there.
        token: what the ``Nats-Msg-Id`` of this replay end in.
    """

    sent: int = 0
    refused: int = 0
    last_id: int = 0
    error: str | None = None
    token: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


class Replay:
    """One replay.

    Args:
        flusher: whose database and connection are used; its breaker is left alone.
        chosen: the filter.
        since: rows that were sent since then (``finished_at``).
        until: and until then.
        after: and have a higher id.
        rate: events a second at the most.
        stop: asked between batches whether to end early.
    """

    def __init__(
        self,
        flusher: Flusher,
        chosen: Filter,
        *,
        since: Moment,
        until: Moment | None,
        after: int,
        rate: float | None,
        stop: Callable[[], bool],
    ) -> None:
        self._flusher = flusher
        self._database = flusher.database
        self._table = flusher.database.tables.outbox
        self._filter = chosen
        self._rate = rate
        self._stop = stop
        self._size = BATCH if rate is None else max(1, min(BATCH, int(rate / 4)))
        columns = self._table.c
        sent = columns.status == literal_column("'sent'")
        window = [sent, columns.finished_at >= _moment("since", since)]
        if until is not None:
            window.append(columns.finished_at <= _moment("until", until))
        self._window = and_(*window, *chosen.conditions(flusher.database.tables))
        self._ids = select(func.min(columns.id), func.max(columns.id)).where(*window)
        self._result = ReplayResult(last_id=after, token=secrets.token_hex(4))
        self._mark = ""

    def run(self, progress: Progress | None = None) -> ReplayResult:
        """Publishes all, in the order of their ids; ends early with ``error`` in an outage."""
        total = self.count() if progress else 0
        start, done = time.monotonic(), 0
        for last, rows in self._pages():
            if self._stop():
                return replace(self._result, error="stopped")
            if not self._mark:
                self._mark = self._now().strftime("%Y-%m-%dT%H:%M:%S.%fZ")
            if not self._publish(rows):
                break
            self._result = replace(self._result, last_id=last)
            done += len(rows)
            if progress:
                progress(done, total)
            self._keep_pace(start, done)
        return self._result

    def count(self) -> int:
        """How many there are."""
        return sum(len(rows) for _, rows in self._pages(content=False))

    def _pages(self, *, content: bool = True) -> Iterator[tuple[int, Sequence[Row[Any]]]]:
        """The last id of each page, and those of its rows that are to be sent."""
        columns, after = self._table.c, self._result.last_id
        with self._database.statements() as connection:
            first, last = connection.execute(self._ids).one()
        if first is None:
            return
        after = max(after, first - 1)
        wanted = [columns.id, columns.event_id, columns.event_type]
        if content:
            wanted += [columns.subject, columns.ordering_key, columns.headers, columns.body]
        query = select(*wanted).where(self._window, columns.id <= last)
        query = query.order_by(columns.id).limit(self._size if content else BATCH)
        while True:
            with self._database.statements() as connection:
                page = connection.execute(query.where(columns.id > after)).all()
            if not page:
                return
            after = page[-1].id
            yield after, [row for row in page if self._filter.admits(row.event_type)]

    def _now(self) -> datetime:
        with self._database.statements() as connection:
            now: datetime = connection.scalars(select(db_now())).one()
        return now.astimezone(timezone.utc)

    # -- one page --------------------------------------------------------------------------------

    def _publish(self, rows: Sequence[Row[Any]]) -> bool:
        """Whether all of them are done; what is refused is passed over, and its key goes on."""
        todo = [(row, message) for row in rows if (message := self._message(row))]
        while todo:
            results = self._send(todo)
            again = []
            for pair, result in zip(todo, results, strict=True):
                if result.success:
                    self._count(sent=1)
                elif result.verdict is Verdict.REFUSED:
                    self._refuse(result.event_id, result.error)
                elif result.verdict is Verdict.BEHIND:
                    again.append(pair)
                else:
                    self._result = replace(self._result, error=result.error)
            if self._result.error:
                return False
            todo = again
        return True

    def _send(self, todo: Sequence[tuple[Row[Any], Message]]) -> list[PublishResult]:
        keys = [
            f"{row.subject}\0{row.ordering_key}" if row.ordering_key else None for row, _ in todo
        ]
        timeout = PUBLISH_TIMEOUT + PER_ROW * len(todo)
        flusher = self._flusher
        messages = [message for _, message in todo]
        return flusher.connection.run(flusher.publisher.attempt, messages, keys, timeout)

    def _message(self, row: Row[Any]) -> Message | None:
        try:
            message = message_of(row)
        except Exception as error:  # whatever somebody made of the row
            self._refuse(row.event_id, str(error))
            return None
        # the stream may know the event's own id still, and would drop it
        message.headers["Nats-Msg-Id"] = f"{row.event_id}.replay-{self._result.token}"
        message.headers[HEADER] = self._mark
        return message

    def _refuse(self, event_id: str, error: str | None) -> None:
        fields = {"event_id": event_id}
        logger.error("event %s of the outbox cannot be replayed: %s", event_id, error, extra=fields)
        self._count(refused=1)

    def _count(self, sent: int = 0, refused: int = 0) -> None:
        result = self._result
        self._result = replace(result, sent=result.sent + sent, refused=result.refused + refused)

    def _keep_pace(self, start: float, done: int) -> None:
        while self._rate and not self._stop():
            ahead = start + done / self._rate - time.monotonic()
            if ahead <= 0:
                return
            time.sleep(min(ahead, 0.1))


def _moment(name: str, value: Moment) -> Any:
    """A time, or SQL for so long ago by the database's clock."""
    if isinstance(value, datetime):
        if value.tzinfo is None:
            raise ValueError(f"{name} is {value!r}; give a datetime with its offset")
        return value
    try:
        return db_now(-readers.duration(value))
    except ValueError as error:
        raise ValueError(f"{name} is {value!r}: {error}") from None
