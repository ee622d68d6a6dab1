"""What an administrator does with dead letters: look, count, export, purge; sends nothing."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice, takewhile
from typing import IO, Any

from . import subjects
from .config import Config
from .connection import Connection
from .deadletter_filter import EVERY_LETTER, DeadLetterCounts, DeadLetterFilter, counted
from .deadletter_store import PAGE, DeadLetterStore, Letters, Progress
from .exceptions import NotConnectedError, PermissionDeniedError
from .letters import StoredDeadLetter

__all__ = ("DeadLetterAdmin", "PurgeResult")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PurgeResult:
    """What a purge did.

    Attributes:
        purged: dead letters that it deleted (``dry_run``: would delete).
        last_sequence: all that was asked for up to this number is done.
        error: why it ended before the end; None where it came there.
        denied: since our NATS user may not; to repeat it does not help then.
    """

    purged: int = 0
    last_sequence: int = 0
    error: str | None = None
    denied: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


class DeadLetterAdmin:
    """The commands over one app's dead letters that send nothing. Thread-safe; fork-safe.

    All of them wait 15 s for an outage to end and raise ``NotConnectedError`` then (it also names
    a permission that is missing), and ``TopologyError`` where there is no stream.

    Args:
        config: the settings.
        connection: the process's.
        app_name: whose dead letters; default ``jetstream_app_name``.
    """

    def __init__(self, config: Config, connection: Connection, app_name: str = "") -> None:
        self.app_name = app_name or config.app_name
        self.config = config
        self.connection = connection
        subject = subjects.dead_letter_subject(self.app_name)
        self.store = DeadLetterStore(config, connection, subject)

    # -- looking ---------------------------------------------------------------------------------

    def list(
        self, chosen: DeadLetterFilter = EVERY_LETTER, limit: int = 50, after: int = 0
    ) -> Sequence[StoredDeadLetter]:
        """Dead letters, those first that were given up first.

        Args:
            chosen: which ones.
            limit: how many at the most.
            after: go on after the one with this number.
        """
        found: Letters = []
        size = PAGE if not chosen.is_empty else min(limit, PAGE)
        for page, _ in self.store.pages(chosen, after, size=size):
            found += page
            if len(found) >= limit:
                break
        return found[:limit]

    def get(self, event_id: str | int) -> StoredDeadLetter | None:
        """The dead letter with this event_id, or this number in the stream; the newest of several.

        By its number it is one question, by its event_id all have to be looked at.
        """
        found = None
        for page, _ in self.store.pages(DeadLetterFilter.of(event_id)):
            found = page[-1] if page else found
        return found

    def count(self, chosen: DeadLetterFilter = EVERY_LETTER) -> DeadLetterCounts:
        """How many there are, by reason, type, handler, source and error class."""
        counts = DeadLetterCounts()
        for page, _ in self.store.pages(chosen):
            counts = counted(page, counts)
        return counts

    def export(
        self,
        target: IO[str],
        chosen: DeadLetterFilter = EVERY_LETTER,
        *,
        after: int = 0,
        progress: Progress | None = None,
    ) -> int:
        """Writes them as lines of JSON (docs/reference/dead-letters.md), the first one first.

        With all headers and bodies: keep it as you keep what is in your events.

        Args:
            target: where to, a text file.
            chosen: which ones.
            after: go on after the one with this number.
            progress: called with letters that are done, and in all; they are counted first.

        Returns:
            How many.
        """
        done, tell = 0, self._telling(progress, chosen, after=after)
        for page, _ in self.store.pages(chosen, after):
            for letter in page:
                target.write(json.dumps(letter.as_record(), ensure_ascii=False) + "\n")
            done += len(page)
            tell(done)
        return done

    def _telling(
        self,
        progress: Progress | None,
        chosen: DeadLetterFilter,
        *,
        after: int = 0,
        limit: int | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> Callable[[int], object]:
        """What is told how many are done. Counts them first, where somebody looks at it."""
        if progress is None:
            return lambda done: None
        if chosen.is_empty and not after:
            total = self.store.total()
            total = total if limit is None else min(total, limit)
        else:
            pages = takewhile(lambda _: not stop(), self.store.pages(chosen, after))
            total = sum(1 for _ in islice((letter for page, _ in pages for letter in page), limit))
        progress(0, total)
        return lambda done: progress(done, total)

    # -- deleting --------------------------------------------------------------------------------

    def purge(
        self,
        chosen: DeadLetterFilter | str | int,
        *,
        limit: int | None = None,
        dry_run: bool = False,
        stop: Callable[[], bool] = lambda: False,
        progress: Progress | None = None,
    ) -> PurgeResult:
        """Deletes dead letters for ever; their events are not handled.

        What is given up after it began stays. An outage ends it, and is the result's ``error``.

        Args:
            chosen: which ones, ``DeadLetterFilter()`` for all; or one event_id or number.
            limit: how many at the most.
            dry_run: only count them.
            stop: asked between pages whether to end early.
            progress: called with letters that are done, and in all; they are counted first.
        """
        chosen = DeadLetterFilter.of(chosen)
        purged = last = 0
        error, denied = None, False
        try:
            tell = self._telling(progress, chosen, limit=limit, stop=stop)
            for page, reached in self.store.pages(chosen):
                if stop():
                    error = "stopped"
                    break
                page = page if limit is None else page[: limit - purged]
                found = [letter.sequence for letter in page]
                purged += len(found) if dry_run else self.store.remove(found)
                tell(purged)
                last = page[-1].sequence if page and purged == limit else reached
                if purged == limit:
                    break
        except NotConnectedError as problem:
            error, denied = str(problem), isinstance(problem, PermissionDeniedError)
        if purged and not dry_run:
            logger.info("%d dead letters of %s purged", purged, self.app_name)
        return PurgeResult(purged, last, error, denied)
