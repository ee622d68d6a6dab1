"""What the outbox makes of each publish: sent, tried later, given up, or left as it was.

An outage changes no row. A refusal is final at once, an unknown error after so many attempts and
so long. Where an event of a key is given up, the key waits for it (``on_failure="park"``).
"""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from sqlalchemy import Connection

from .config import Config
from .database import Database, again
from .models import Tables
from .outcomes import PublishResult, Verdict
from .rows import Failure, Fate, Key, Rows, backoff

__all__ = ("Counts", "Recorder", "next_step")

logger = logging.getLogger(__name__)

#: Seconds between two looks at a subject that no stream takes, at the most.
NO_STREAM_PAUSE = 10.0


@dataclass
class Counts:
    """How many rows ended how, in one run."""

    sent: int = 0
    duplicates: int = 0
    retried: int = 0
    failed: int = 0
    exceptions: int = 0
    left: int = field(default=0)


def next_step(
    verdict: Verdict, failure: Failure, config: Config, *, missing_for: float, jitter: float
) -> str | timedelta:
    """What becomes of a row that was not stored, and for no outage: its status, or a delay.

    Args:
        verdict: ``REFUSED``, ``NO_STREAM`` (confirmed) or ``UNKNOWN``.
        failure: the row's tries before this one.
        config: the limits.
        missing_for: seconds for which no stream has taken the subject, as far as is known.
        jitter: between 0 and 1.
    """
    if verdict is Verdict.REFUSED:
        return "failed"
    delay = backoff(failure.attempts, jitter)
    if verdict is Verdict.NO_STREAM:
        over = max(missing_for, failure.failing_for) >= config.outbox_no_stream_grace
        return "failed" if over else min(delay, timedelta(seconds=NO_STREAM_PAUSE))
    tried = failure.attempts + 1 >= config.outbox_max_attempts
    return "exception" if tried and failure.failing_for >= config.outbox_max_age else delay


class Recorder:
    """Writes results down: what is stored in one statement, the rest in one transaction."""

    def __init__(self, config: Config, database: Database[Tables], rows: Rows) -> None:
        self._config = config
        self._database = database
        self._rows = rows

    def record(
        self,
        connection: Connection,
        batch: Sequence[Any],
        results: Sequence[PublishResult],
        missing_for: dict[str, float],
        counts: Counts,
    ) -> None:
        """Records one batch.

        Args:
            connection: on which every statement is a transaction.
            batch: the rows.
            results: of each of them.
            missing_for: the subjects that no stream takes, confirmed; seconds for which.
            counts: added to.
        """
        stored = [row.id for row, result in zip(batch, results, strict=True) if result.success]
        if stored:
            keep = self._config.outbox_retention > 0
            again(lambda: self._rows.sent(connection, stored, keep=keep))
            counts.sent += len(stored)
            counts.duplicates += sum(result.duplicate for result in results)
        if len(stored) < len(batch):
            pairs = [pair for pair in zip(batch, results, strict=True) if not pair[1].success]
            self._record_failures(pairs, missing_for, counts)

    def damaged(self, row: Any, error: str, counts: Counts) -> None:
        """Gives up a row that cannot be read; it stays, with the traceback."""
        logger.error(
            "event %s of the outbox cannot be read: %s",
            row.event_id,
            error,
            extra=_fields(row, "exception"),
        )
        fates = [(row, Fate(row.id, error, "exception"))]
        self._database.transaction(lambda connection: self._write(connection, fates))
        counts.exceptions += 1

    def _record_failures(
        self,
        pairs: Sequence[tuple[Any, PublishResult]],
        missing_for: dict[str, float],
        counts: Counts,
    ) -> None:
        own = [pair for pair in pairs if _own_fault(pair[1], missing_for)]
        keys = {_key(row) for row, _ in own if row.ordering_key}
        behind = sum(
            result.verdict is Verdict.BEHIND and _key(row) in keys for row, result in pairs
        )
        counts.left += len(pairs) - len(own) - behind
        if own:
            fates = self._database.transaction(
                lambda connection: self._fail(connection, own, missing_for)
            )
            _say(fates)
            for _, fate in fates:
                _count(counts, fate)

    def _fail(
        self,
        connection: Connection,
        own: Sequence[tuple[Any, PublishResult]],
        missing_for: dict[str, float],
    ) -> list[tuple[Any, Fate]]:
        failures = self._rows.failures(connection, [row.id for row, _ in own])
        fates = []
        for row, result in own:
            failure = failures.get(row.id)
            if failure is None:
                continue  # cancelled, or sent by another, meanwhile
            step = next_step(
                result.verdict,
                failure,
                self._config,
                missing_for=missing_for.get(row.subject, 0.0),
                jitter=random.random(),
            )
            error = result.error or result.verdict.value
            if isinstance(step, timedelta):
                fate = Fate(row.id, error, until=failure.now + step)
            else:
                fate = Fate(row.id, error, step)
            fates.append((row, fate))
        self._write(connection, fates)
        return fates

    def _write(self, connection: Connection, fates: Sequence[tuple[Any, Fate]]) -> None:
        """What waits for them is told when it is read."""
        held = {
            _key(row): fate
            for row, fate in fates
            if row.ordering_key and (fate.status == "pending" or row.on_failure == "park")
        }
        self._rows.fail(connection, [fate for _, fate in fates])
        self._rows.hold(connection, held)


def _own_fault(result: PublishResult, missing_for: dict[str, float]) -> bool:
    """Whether it is the event's own, and not an outage's."""
    if result.verdict is Verdict.NO_STREAM:
        return result.subject in missing_for
    return result.verdict in (Verdict.REFUSED, Verdict.UNKNOWN)


def _say(fates: Sequence[tuple[Any, Fate]]) -> None:
    """One line for all that failed for one reason."""
    reasons: dict[tuple[str, str], list[Any]] = {}
    for row, fate in fates:
        reasons.setdefault((fate.status, fate.error), []).append(row)
    for (status, error), (first, *more) in reasons.items():
        which = f"event {first.event_id}" + (f" and {len(more)} more" if more else "")
        fields = _fields(first, status)
        if status == "pending":
            logger.warning("%s of the outbox: tried again later: %s", which, error, extra=fields)
        else:
            logger.error("%s of the outbox: given up (%s): %s", which, status, error, extra=fields)


def _fields(row: Any, outcome: str) -> dict[str, Any]:
    return {"event_id": row.event_id, "subject": row.subject, "outcome": outcome}


def _count(counts: Counts, fate: Fate) -> None:
    if fate.status == "pending":
        counts.retried += 1
    elif fate.status == "failed":
        counts.failed += 1
    else:
        counts.exceptions += 1


def _key(row: Any) -> Key:
    return (row.bucket, row.subject, row.ordering_key)
