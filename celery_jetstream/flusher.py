"""From the outbox to JetStream: claim, publish, record, for as long as there is time.

One engine for the Celery task, the relay and ``drain()``; any number of them at once is correct,
for each publishes only what is in buckets that it has leased. No database transaction is open
while the network is waited for. While one batch is published, the one before it is recorded and
the next is read.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
import traceback
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from typing import Any

from sqlalchemy import Connection as DatabaseConnection
from sqlalchemy.exc import SQLAlchemyError

from . import signals, subjects, transactions
from .breaker import EVERYTHING, Breaker
from .config import Config
from .connection import Connection
from .database import Database
from .exceptions import CeleryJetStreamError, NotConnectedError
from .headers import validate_headers
from .leases import ALL_BUCKETS, Lease
from .models import Tables
from .outcomes import Message, PublishResult, Verdict
from .publisher import Publisher
from .recorder import Counts, Recorder
from .rows import Key, Rows
from .session import Session
from .threads import wait

__all__ = ("FlushResult", "Flusher", "message_of")

logger = logging.getLogger(__name__)

#: Seconds that a flush waits for a connection to NATS; an outage is the breaker's business.
CONNECT_TIMEOUT = 3.0
#: Seconds for the answers to one batch, for each further row, and for each transaction that is an
#: atomic batch: the server takes some milliseconds for one, on a slow disk many.
PUBLISH_TIMEOUT, PER_ROW, PER_TRANSACTION = 5.0, 0.0005, 0.03
#: Seconds after which reading begins again at the first row: others have become due, or were
#: committed.
SWEEP = 1.0
#: Of how many batches the ids are learned at once.
AHEAD = 20
#: Seconds between two sweeps of a flush, in which nobody has the leases.
GAP = 0.02
#: Of a lease, what is kept back for recording.
RESERVE = 0.2
#: Seconds to wait, one after the other, for buckets that another flusher has: it may have looked
#: for rows before ours were there.
PATIENCE = (0.01, 0.02, 0.04, 0.08)


@dataclass(frozen=True)
class FlushResult:
    """What one flush did.

    Attributes:
        sent: rows that JetStream has now (``duplicates`` of them it had already).
        duplicates: see ``sent``.
        retried: rows with an unknown error, to be tried again later.
        failed: rows that were refused for good.
        exceptions: rows given up after unknown errors, or that cannot be read.
        left: rows that an outage left as they were (counted each time).
        seconds: how long it took.
        outage: why nothing (more) could be published now; None where all is well.
        busy: other flushers hold what is due.
        more: time was over before the outbox was empty.
    """

    sent: int = 0
    duplicates: int = 0
    retried: int = 0
    failed: int = 0
    exceptions: int = 0
    left: int = 0
    seconds: float = 0.0
    outage: str | None = None
    busy: bool = False
    more: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for Celery's result backends and ``--json``."""
        return asdict(self)


def message_of(row: Any) -> Message:
    """The message that a row holds, its bytes untouched.

    Raises:
        ValueError: the row was damaged since it was written.
    """
    envelope = json.loads(row.body)
    if not isinstance(envelope, dict) or envelope.get("event_id") != row.event_id:
        raise ValueError(f"the body is not the envelope of event {row.event_id}")
    subjects.validate_subject(row.subject)
    headers = validate_headers(json.loads(row.headers)) if row.headers != "{}" else {}
    headers["Nats-Msg-Id"] = row.event_id
    return Message(row.event_id, row.subject, bytes(row.body), headers)


class Flusher:
    """Flushes one outbox. Thread-safe: each flush is a run of its own."""

    def __init__(
        self,
        config: Config,
        database: Database[Tables],
        connection: Connection,
        publisher: Publisher,
    ) -> None:
        self.config = config
        self.database = database
        self.connection = connection
        self.publisher = publisher
        self.rows = Rows(database.tables, with_age=config.metrics)
        self.recorder = Recorder(config, database, self.rows)
        self.breaker = Breaker()
        connection.on_session(self._on_session)

    def flush(
        self, max_seconds: float | None = None, stop: Callable[[], bool] = lambda: False
    ) -> FlushResult:
        """Publishes what is due until there is no more, or time is over.

        Args:
            max_seconds: the time; None for as long as there is something.
            stop: asked between two batches whether to end early.

        Raises:
            OutboxUnavailableError: the database is away; what was sent and is not recorded goes
                out again with its ``Nats-Msg-Id``.
            ConfigurationError: the tables are not there.
        """
        run = _Run(self, max_seconds, stop)
        run.go()
        result = run.result()
        signals.outbox_flushed.send(sender=self, result=result)
        return result

    async def _on_session(self, _: Session) -> None:
        self.breaker.reset()


@dataclass
class _Batch:
    rows: list[Any] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    #: Transactions that may go as one, and how many rows each has.
    whole: dict[str, int] = field(default_factory=dict)
    #: By the monotonic clock.
    read_at: float = field(default_factory=time.monotonic)
    sent_at: float = 0.0

    @property
    def transactions(self) -> list[str | None] | None:
        """What tells the pipeline which of them are one batch: those whose rows are all here."""
        if not self.whole:
            return None
        here = Counter(row.transaction_id for row in self.rows)
        return [
            row.transaction_id
            if self.whole.get(row.transaction_id) == here[row.transaction_id]
            else None
            for row in self.rows
        ]

    @property
    def keys(self) -> list[str | None]:
        """What tells the pipeline which of them are to be sent one after the other."""
        return [
            f"{row.subject}\0{row.ordering_key}" if row.ordering_key else None for row in self.rows
        ]


class _Run:
    """One flush."""

    def __init__(
        self, flusher: Flusher, max_seconds: float | None, stop: Callable[[], bool]
    ) -> None:
        self._flusher = flusher
        self._config = flusher.config
        self._rows = flusher.rows
        self._breaker = flusher.breaker
        self._lease = Lease(flusher.database.tables, flusher.config.outbox_lease)
        self._start = time.monotonic()
        self._end = float("inf") if max_seconds is None else self._start + max_seconds
        self._stop = stop
        self._counts = Counts()
        self._failed: set[str] = set()
        self._found: set[str] = set()
        self._busy = self._more = False

    def go(self) -> None:
        if self._breaker.is_open(EVERYTHING):
            self._failed.add(EVERYTHING)
            return
        with self._flusher.database.statements() as database:
            try:
                for pause in (*PATIENCE, 0.0):
                    while self._sweep_once(database):
                        self._lease.give_back(database)  # to commands, and other flushers
                        time.sleep(GAP)
                    if not self._busy or self._over:
                        break
                    time.sleep(pause)
            except NotConnectedError as error:  # closed meanwhile
                self.fail(EVERYTHING, str(error))
            finally:
                with contextlib.suppress(SQLAlchemyError):  # away: the lease ends by itself
                    self._lease.give_back(database)

    def result(self) -> FlushResult:
        errors = {name: self._breaker.error(name) for name in (EVERYTHING, *self._breaker.names)}
        out = [
            e for name, e in errors.items() if name in self._failed or self._breaker.is_open(name)
        ]
        outage = next(filter(None, out), None)
        return FlushResult(
            **asdict(self._counts),
            seconds=round(time.monotonic() - self._start, 3),
            outage=outage,
            busy=self._busy,
            more=self._more,
        )

    def fail(self, name: str, error: str) -> None:
        """Leaves a subject alone for a while, or everything."""
        self._failed.add(name)
        self._breaker.fail(name, error)

    def find(self, subject: str) -> None:
        """A subject has a stream, after all: it is tried again at once, but only once."""
        if subject not in self._found:
            self._found.add(subject)
            self._failed.discard(subject)
            self._breaker.succeed(subject)

    @property
    def _over(self) -> bool:
        return time.monotonic() >= self._end or self._stop()

    def _sweep_once(self, database: DatabaseConnection) -> bool:
        """Finds what is due, leases it and publishes it; whether to look again."""
        size = self._config.outbox_batch_size
        out = self._breaker.open_names
        self._failed.update(out)
        due = self._rows.probe(database, size, out)
        self._more = bool(due)
        if not due or self._over or not self._is_connected():
            return False
        wanted = ALL_BUCKETS if sum(due.values()) >= size else frozenset(due)
        self._busy = not (self._lease.take(database, wanted) & due.keys())
        if self._busy:
            return False
        before = self._progress()
        _Sweep(self, database).go()
        moved = self._progress() != before
        return moved and not self._over and not self._breaker.is_open(EVERYTHING)

    def _progress(self) -> object:
        """What a sweep may change so that the next finds more; also what it learned is stuck."""
        return {**asdict(self._counts), "left": 0}, len(self._found), len(self._failed)

    def _is_connected(self) -> bool:
        connection = self._flusher.connection
        try:
            connection.run(connection.session, CONNECT_TIMEOUT)
        except NotConnectedError as error:
            self.fail(EVERYTHING, str(error))
            return False
        return True


class _Sweep:
    """Once through the rows that are due in the buckets of a lease, in order."""

    def __init__(self, run: _Run, database: DatabaseConnection) -> None:
        self._run = run
        self._flusher = run._flusher
        self._breaker = run._breaker
        self._lease = run._lease
        self._rows = run._rows
        self._atomic = run._config.outbox_atomic
        self._database = database
        self._ends = time.monotonic() + SWEEP
        self._buckets = None if run._lease.buckets == ALL_BUCKETS else run._lease.buckets
        self._held: set[Key] = set()
        self._blocked: set[Key] = set()
        self._flying: set[Key] = set()
        self._without: set[str] = set()
        self._first: set[int] = set()
        self._ahead: list[int] | None = None
        self._members: Sequence[Any] = ()
        self._finished = False

    def go(self) -> None:
        """Publishes batch after batch; each is recorded while the next is under way."""
        self._learn_holds()
        done: tuple[_Batch, list[PublishResult]] | None = None
        batch = self._read_first()
        while batch is not None and (published := self._publish(batch)):
            try:
                if done:
                    self._record(*done)
                    done = None
                following = self._read()
                results = wait(published, None)
            except BaseException:
                published.cancel()
                raise
            self._announce(batch, results)
            self._heed(batch, results)
            done = batch, results
            batch = None if self._over else self._unblocked(following)
        if done:
            self._record(*done)

    @property
    def _over(self) -> bool:
        return self._run._over or self._breaker.is_open(EVERYTHING)

    # -- claim -----------------------------------------------------------------------------------

    def _learn_holds(self) -> None:
        """Lets keys go on whose time has come, unless their subject is left alone as it is."""
        holds = self._rows.holds(self._database, self._lease.buckets)
        left_alone = set(self._breaker.open_names)
        over = [hold for hold in holds if hold.over and hold.key[1] not in left_alone]
        if over:
            self._flusher.database.transaction(
                lambda connection: self._rows.release(connection, over)
            )
        self._held = {hold.key for hold in holds} - {hold.key for hold in over}

    def _read_first(self) -> _Batch | None:
        """The first rows; after an outage, one, and best of a subject that did not fail."""
        if self._breaker.is_trying(EVERYTHING):
            self._without = set(self._breaker.names)
            if batch := self._read(first=True):
                return batch
            self._without, self._finished = set(), False
        return self._read(first=True)

    def _read(self, *, first: bool = False) -> _Batch | None:
        """The next rows that may go; None where there are no more in this sweep."""
        limit = self._run._config.outbox_batch_size
        if self._breaker.is_trying(EVERYTHING) and not self._atomic:
            limit = 1
        while not self._finished:
            self._without.update(self._breaker.open_names)
            found = self._look(limit) if first else self._look_on(limit)
            first = False
            if batch := self._batch(found):
                return batch
        return None

    def _look(self, limit: int) -> Sequence[Any]:
        buckets, without = self._buckets, self._without
        found = self._rows.at_once(self._database, buckets, limit, without)
        taken = self._together(found, limit) if self._atomic else found
        self._first = {row.id for row in taken}
        self._finished = len(found) < limit and len(taken) == len(found)
        return [*taken, *self._rows.later(self._database, buckets, limit, without)]

    def _look_on(self, limit: int) -> Sequence[Any]:
        """The next rows of those that were there in one moment.

        Not simply those after the last id: ids are given before the commit. One that is committed
        since then, and passed over, may be followed by another of its key.
        """
        if self._ahead is None:
            most = AHEAD * self._run._config.outbox_batch_size
            ids = self._rows.at_once_ids(self._database, self._buckets, most, self._without)
            self._ahead = [row_id for row_id in reversed(ids) if row_id not in self._first]
        ids = self._ahead[: -limit - 1 : -1]
        del self._ahead[-limit:]
        found = self._rows.these(self._database, ids, self._without) if ids else []
        if self._atomic and found:
            found = self._together(found, limit, last=not self._ahead)
            if self._ahead:  # else the rest is the next sweep's
                self._ahead += [row_id for row_id in reversed(ids) if row_id > found[-1].id]
        self._finished = not self._ahead or time.monotonic() > self._ends
        return found

    def _together(self, found: Sequence[Any], limit: int, *, last: bool = False) -> Sequence[Any]:
        """The first of these rows, as many as part no transaction; the rest comes later."""
        named = {row.transaction_id for row in found} - {None}
        self._members = self._rows.members(self._database, named) if named else ()
        if self._breaker.is_trying(EVERYTHING):
            return found[: transactions.first(found, self._members)]
        buckets = self._lease.buckets
        return found[: transactions.end(found, self._members, buckets, limit, last=last)]

    def _batch(self, found: Sequence[Any]) -> _Batch | None:
        held = [row.id for row in found if _key(row) in self._held]
        if held:
            self._rows.wait(self._database, held)
            found = [row for row in found if _key(row) not in self._held]
        whole = transactions.whole(found, self._members) if self._members else {}
        batch, ahead = _Batch(whole=whole), set(self._flying)
        held_up = self._hold_up(found, whole)
        for row in self._admitted(found, whole):
            key = _key(row)
            if row.transaction_id in held_up or (row.ordering_key and key in self._blocked):
                continue
            try:
                batch.messages.append(message_of(row))
            except Exception:
                self._blocked.add(key)
                if not row.ordering_key or key not in ahead:  # else when it is the key's first
                    error = traceback.format_exc(limit=-3)
                    self._flusher.recorder.damaged(row, error, self._run._counts)
                continue
            batch.rows.append(row)
            ahead.add(key)
        return batch if batch.rows else None

    def _unblocked(self, batch: _Batch | None) -> _Batch | None:
        """Without the rows of keys of which an earlier one was not stored."""
        if batch is None or not self._blocked:
            return batch
        free = _Batch(whole=batch.whole, read_at=batch.read_at)
        held_up = self._hold_up(batch.rows, batch.whole)
        for row, message in zip(batch.rows, batch.messages, strict=True):
            if row.transaction_id in held_up:
                continue
            if not row.ordering_key or _key(row) not in self._blocked:
                free.rows.append(row)
                free.messages.append(message)
        return free if free.rows else self._read()

    def _hold_up(self, rows: Sequence[Any], whole: Collection[str]) -> set[str]:
        """The transactions that go as one and of which a key is blocked; blocks all their keys."""
        if not whole or not self._blocked:
            return set()
        held_up = transactions.held_up(rows, whole, self._blocked)
        self._blocked.update(_key(row) for row in rows if row.transaction_id in held_up)
        return held_up

    def _admitted(self, rows: Sequence[Any], whole: Collection[str]) -> Iterator[Any]:
        """Of a subject that failed, one row only (or one transaction): it is being tried.

        The sweep passes over the others, and to the end over all that follow: they may have
        their keys.
        """
        trying = set[str]()
        for row in rows:
            if row.subject not in self._without:
                if self._breaker.is_trying(row.subject):
                    self._without.add(row.subject)
                    if row.transaction_id in whole:
                        trying.add(row.transaction_id)
                yield row
            elif row.transaction_id in trying:
                yield row

    # -- publish ---------------------------------------------------------------------------------

    def _publish(self, batch: _Batch) -> Future[list[PublishResult]] | None:
        """Hands a batch to the loop thread; None where the lease does not last for it."""
        lease = self._lease
        if lease.left < lease.seconds / 2 and not lease.renew(self._database):
            logger.warning("a lease of the outbox was lost: this process stood still")
            return None
        self._flying = {_key(row) for row in batch.rows}
        together = batch.transactions
        patience = PUBLISH_TIMEOUT + PER_ROW * len(batch.rows)
        patience += PER_TRANSACTION * len(set(together or ()))
        timeout = min(patience, lease.left * (1 - RESERVE))
        signals.outbox_claimed.send(sender=self._flusher, rows=batch.rows)
        batch.sent_at = time.monotonic()
        return self._flusher.connection.submit(
            self._flusher.publisher.attempt,
            batch.messages,
            batch.keys,
            timeout,
            together,
        )

    def _announce(self, batch: _Batch, results: Sequence[PublishResult]) -> None:
        now = time.monotonic()
        signals.outbox_published.send(
            sender=self._flusher,
            rows=batch.rows,
            results=results,
            seconds=now - batch.sent_at,
            since_read=now - batch.read_at,
        )

    def _heed(self, batch: _Batch, results: Sequence[PublishResult]) -> None:
        """Draws the conclusions for what is still to be published."""
        stored = {result.subject for result in results if result.success}
        for row, result in zip(batch.rows, results, strict=True):
            if not result.success and row.ordering_key:
                self._blocked.add(_key(row))
        if stored:
            self._breaker.succeed(EVERYTHING)
        for subject in stored:
            self._breaker.succeed(subject)
        out = {
            result.subject: result.error or "outage"
            for result in results
            if result.verdict in (Verdict.OUTAGE, Verdict.NO_STREAM, Verdict.DENIED)
        }
        if not stored and (silence := [result for result in results if _is_silence(result)]):
            self._run.fail(EVERYTHING, silence[0].error or "outage")
        for subject in out.keys() - stored:
            self._run.fail(subject, out[subject])

    # -- record ----------------------------------------------------------------------------------

    def _record(self, batch: _Batch, results: list[PublishResult]) -> None:
        missing = self._missing_streams(results)
        self._flusher.recorder.record(
            self._database, batch.rows, results, missing, self._run._counts
        )

    def _missing_streams(self, results: Sequence[PublishResult]) -> dict[str, float]:
        """The subjects that no stream takes, asked of JetStream; and for how many seconds."""
        asked = {result.subject for result in results if result.verdict is Verdict.NO_STREAM}
        missing = {}
        for subject in asked:
            try:
                there = self._flusher.connection.run(self._flusher.publisher.has_stream, subject)
                if there:
                    self._run.find(subject)  # it elected its leader, or has just been made
                if there is not False:
                    continue
            except CeleryJetStreamError as error:
                logger.warning("could not ask which stream takes %s: %s", subject, error)
                continue
            missing[subject] = self._breaker.failing_for(subject)
        return missing


def _is_silence(result: PublishResult) -> bool:
    """Whether there was no answer at all; a stream that is full, say, does answer."""
    return result.verdict is Verdict.OUTAGE and result.error_code is None


def _key(row: Any) -> Key:
    return (row.bucket, row.subject, row.ordering_key)
