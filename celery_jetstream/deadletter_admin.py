"""What an administrator does with dead letters: look, count, export, purge.

Reads with ``$JS.API.STREAM.MSG.GET`` and ``next_by_subj``, deletes with ``STREAM.MSG.DELETE``. A
consumer would take the messages from whoever has one there: in a work queue no two consumers may
have one subject (10099, 10100). To read takes nothing from anybody, sees what another consumer has
in hand, and every server since 2.9.10 has it, whatever the stream's ``allow_direct`` is; it is the
stream's leader that answers, so that what was deleted is not read again.

One letter's number must be known before the next can be asked for. So a part of the stream is read
by :data:`WALKERS` at once, each from another number on: 4,000 letters a second, one by one 1,200.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import IO, Any, TypeVar

from . import subjects
from .config import Config
from .connection import Connection
from .deadletter import NO_MESSAGE_FOUND, original_of
from .deadletter_filter import EVERY_LETTER, DeadLetterCounts, DeadLetterFilter, counted
from .envelopes import read_produced_at
from .exceptions import ConnectionRefusedByServer, NotConnectedError, TopologyError
from .letters import StoredDeadLetter, read_letter
from .session import Session

__all__ = ("PAGE", "DeadLetterAdmin", "Progress", "PurgeResult")

logger = logging.getLogger(__name__)

T = TypeVar("T")
#: Under this name, since the class has a method ``list``.
Letters = list[StoredDeadLetter]
Messages = list[dict[str, Any]]
#: Told of numbers of the stream that are done, and of how many there are.
Progress = Callable[[int, int], None]

#: How many read side by side; letters, and bytes for each, that one page is to have.
WALKERS, PAGE, ROOM = 16, 256, 64 * 1024
#: Seconds that an outage is waited for (an election takes 4 to 6), and between two tries.
PATIENCE, PAUSE = 15.0, 0.2
#: Seconds that a connection, or one answer, is waited for.
ASK_TIMEOUT = 5.0
STREAM_NOT_FOUND = 10059
#: The server could not delete: also where there is no such message.
NOT_DELETED = 10057


@dataclass(frozen=True)
class PurgeResult:
    """What a purge did.

    Attributes:
        purged: dead letters that it deleted (``dry_run``: would delete).
        last_sequence: all that was asked for up to this number is done.
        error: why it ended before the end; None where it came there.
    """

    purged: int = 0
    last_sequence: int = 0
    error: str | None = None

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
        self.subject = subjects.dead_letter_subject(self.app_name)
        self._config = config
        self._connection = connection
        self._info = f"$JS.API.STREAM.INFO.{config.stream_name}"
        self._get = f"$JS.API.STREAM.MSG.GET.{config.stream_name}"
        self._delete = f"$JS.API.STREAM.MSG.DELETE.{config.stream_name}"

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
        for page, _ in self.pages(chosen, after, size=size):
            found += page
            if len(found) >= limit:
                break
        return found[:limit]

    def get(self, event_id: str | int) -> StoredDeadLetter | None:
        """The dead letter with this event_id, or this number in the stream; the newest of several.

        By its number it is one question, by its event_id all have to be looked at.
        """
        found = None
        for page, _ in self.pages(DeadLetterFilter.of(event_id)):
            found = page[-1] if page else found
        return found

    def count(self, chosen: DeadLetterFilter = EVERY_LETTER) -> DeadLetterCounts:
        """How many there are, by reason, type, handler, source and error class."""
        counts = DeadLetterCounts()
        for page, _ in self.pages(chosen):
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
            progress: called with numbers of the stream that are done, and in all.

        Returns:
            How many.
        """
        done = 0
        for page, _ in self.pages(chosen, after, progress=progress):
            for letter in page:
                target.write(json.dumps(letter.as_record(), ensure_ascii=False) + "\n")
            done += len(page)
        return done

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
            progress: called with numbers of the stream that are done, and in all.
        """
        chosen = DeadLetterFilter.of(chosen)
        purged = last = 0
        error = None
        try:
            for page, reached in self.pages(chosen, progress=progress):
                if stop():
                    error = "stopped"
                    break
                page = page if limit is None else page[: limit - purged]
                if not dry_run:
                    self.remove([letter.sequence for letter in page])
                purged += len(page)
                last = page[-1].sequence if purged == limit else reached
                if purged == limit:
                    break
        except NotConnectedError as problem:
            error = str(problem)
        if purged and not dry_run:
            logger.info("%d dead letters of %s purged", purged, self.app_name)
        return PurgeResult(purged, last, error)

    def remove(self, sequences: Sequence[int]) -> None:
        """Deletes those with these numbers; one that is gone already is no error.

        Raises:
            NotConnectedError: an outage, or the server refuses.
        """
        self._patiently(self._remove, sequences)

    # -- reading, page by page -------------------------------------------------------------------

    def pages(
        self,
        chosen: DeadLetterFilter,
        after: int = 0,
        *,
        size: int = PAGE,
        progress: Progress | None = None,
    ) -> Iterator[tuple[Letters, int]]:
        """Those that a filter admits, and the number up to which all were looked at.

        What is given up after the first page was asked for is not among them: a redriven event
        that fails at once is not redriven again.
        """
        last = self._patiently(self._last)
        numbers = chosen.sequences
        if numbers is not None:
            numbers = tuple(one for one in numbers if after < one <= last)
            for start in range(0, len(numbers), size):
                some = numbers[start : start + size]
                found = self._patiently(self._pick, some)
                yield [letter for letter in found if chosen.admits(letter)], some[-1]
            return
        first, place, span = None, after + 1, size
        while place is not None and place <= last:
            found, reached = self._patiently(self._wave, place, span, last)
            first = (found[0].sequence if found else place) if first is None else first
            yield [letter for letter in found if chosen.admits(letter)], min(last, reached - 1)
            if progress:
                progress(min(last, reached - 1) - first + 1, last - first + 1)
            span = _next_span(span, found, size)
            place = reached

    def _patiently(self, function: Callable[..., Coroutine[Any, Any, T]], *args: Any) -> T:
        """Runs it in the loop thread, again while there is an outage, for :data:`PATIENCE`."""
        until = time.monotonic() + PATIENCE
        while True:
            try:
                return self._connection.run(function, *args)
            except ConnectionRefusedByServer:
                raise
            except NotConnectedError as error:
                if time.monotonic() >= until or isinstance(error, _Denied):
                    raise
            time.sleep(PAUSE)

    async def _last(self) -> int:
        """The stream's last number. 2.9.10 forgets a subject's when that message is deleted."""
        found = await self._ask(await self._connection.session(ASK_TIMEOUT), self._info, {})
        if "error" in found:
            raise self._fault("read dead letters", found["error"])
        return int(found["state"]["last_seq"])

    async def _pick(self, numbers: Sequence[int]) -> Letters:
        session = await self._connection.session(ASK_TIMEOUT)
        found = await asyncio.gather(*(self._read(session, {"seq": one}) for one in numbers))
        now = datetime.now(timezone.utc)
        return [
            _letter(message, now)
            for message in found
            if message is not None and message["subject"] == self.subject
        ]

    async def _wave(self, start: int, span: int, last: int) -> tuple[Letters, int]:
        """The letters from a number on, of so many numbers; and where the next one is."""
        session = await self._connection.session(ASK_TIMEOUT)
        step = max(1, span // WALKERS)
        ends = [min(start + step * (i + 1), last + 1) for i in range(WALKERS)]
        starts = [start, *ends[:-1]]
        walks = await asyncio.gather(
            *(self._walk(session, one, end) for one, end in zip(starts, ends, strict=True))
        )
        now = datetime.now(timezone.utc)
        found = [_letter(message, now) for messages, _ in walks for message in messages]
        return found, walks[-1][1] or last + 1

    async def _walk(self, session: Session, place: int, end: int) -> tuple[Messages, int | None]:
        """The messages of one part of the stream, and the first behind it."""
        found: Messages = []
        while place < end:
            message = await self._read(session, {"seq": place, "next_by_subj": self.subject})
            if message is None:
                return found, None
            if message["seq"] >= end:
                return found, message["seq"]
            found.append(message)
            place = message["seq"] + 1
        return found, end

    async def _read(self, session: Session, request: dict[str, Any]) -> dict[str, Any] | None:
        answer = await self._ask(session, self._get, request)
        problem = answer.get("error")
        if not problem:
            message: dict[str, Any] = answer["message"]
            return message
        if problem.get("err_code") == NO_MESSAGE_FOUND:
            return None
        raise self._fault("read dead letters", problem)

    async def _remove(self, sequences: Sequence[int]) -> None:
        session = await self._connection.session(ASK_TIMEOUT)
        await asyncio.gather(*(self._remove_one(session, one) for one in sequences))

    async def _remove_one(self, session: Session, sequence: int) -> None:
        request = {"seq": sequence, "no_erase": True}
        problem = (await self._ask(session, self._delete, request)).get("error")
        if not problem:
            return
        gone = problem.get("err_code") in (NOT_DELETED, NO_MESSAGE_FOUND)
        if gone and await self._read(session, {"seq": sequence}) is None:
            return
        raise self._fault(f"delete the dead letter {sequence}", problem)

    async def _ask(self, session: Session, subject: str, request: dict[str, Any]) -> dict[str, Any]:
        try:
            answer = await session.ask(subject, json.dumps(request).encode(), timeout=ASK_TIMEOUT)
        except NotConnectedError as error:
            if not session.denied:
                raise
            raise _Denied(
                f"{error}; NATS denies this user something: dead letters need to publish to "
                f"{self._info} and {self._get}, to {self._delete} for redrive and purge, and for "
                "redrive to where the events go"
            ) from error
        found: dict[str, Any] = json.loads(answer.data)
        return found

    def _fault(self, what: str, problem: dict[str, Any]) -> Exception:
        told = f"could not {what}: {problem.get('description')} ({problem.get('err_code')})"
        if problem.get("err_code") == STREAM_NOT_FOUND:
            name = self._config.stream_name
            return TopologyError(f"{told}: run `jetstream provision`", stream=name)
        return NotConnectedError(told)


class _Denied(NotConnectedError):
    """Waiting does not help."""


def _next_span(span: int, found: Sequence[StoredDeadLetter], size: int) -> int:
    """How many numbers to look at next, for a page of about ``size`` letters that are not large."""
    weight = max(len(found), sum(len(letter.body) for letter in found) // ROOM)
    if weight < size // 2:
        return span * 2
    return max(WALKERS, span // 2) if weight > size else span


def _letter(message: dict[str, Any], now: datetime) -> StoredDeadLetter:
    original = original_of(message)
    stored = read_produced_at({"produced_at": message.get("time")}) or now
    return read_letter(
        message["seq"], message["subject"], original.headers, original.body, stored, now
    )
