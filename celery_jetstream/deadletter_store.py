"""Dead letters in the stream: read page by page, deleted by their numbers.

Reads with ``$JS.API.STREAM.MSG.GET`` and ``next_by_subj``, deletes with ``STREAM.MSG.DELETE``. A
consumer would take the messages from whoever has one there: in a work queue no two consumers may
have one subject (10099, 10100). To read takes nothing from anybody, sees what another consumer has
in hand, and every server since 2.9.10 has it, whatever the stream's ``allow_direct`` is; it is the
stream's leader that answers, so that what was deleted is not read again.

One letter's number must be known before the next can be asked for. So a part of the stream is read
by :data:`WALKERS` at once, each from another number on.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from datetime import datetime, timezone
from typing import Any, TypeVar

from .config import Config
from .connection import Connection
from .deadletter import NO_MESSAGE_FOUND, original_of
from .deadletter_filter import DeadLetterFilter
from .envelopes import read_produced_at
from .exceptions import (
    ConnectionRefusedByServer,
    NotConnectedError,
    PermissionDeniedError,
    TopologyError,
)
from .letters import StoredDeadLetter, read_letter
from .session import Session

__all__ = ("PAGE", "DeadLetterStore", "Letters", "Progress")

T = TypeVar("T")
Letters = list[StoredDeadLetter]
Messages = list[dict[str, Any]]
#: Told of letters that are done, and of how many there are to do.
Progress = Callable[[int, int], None]

#: How many read side by side; letters, and bytes for each, that one page is to have.
WALKERS, PAGE, ROOM = 16, 256, 64 * 1024
#: Seconds that an outage is waited for (an election takes 4 to 6), and between two tries.
PATIENCE, PAUSE = 15.0, 0.2
#: Seconds that a connection, or one answer, is waited for.
ASK_TIMEOUT = 5.0
STREAM_NOT_FOUND = 10059
NOT_DELETED = 10057


class DeadLetterStore:
    """What one stream has on one dead-letter subject. Thread-safe; fork-safe.

    Waits :data:`PATIENCE` for an outage to end and raises ``NotConnectedError`` then, which also
    names a permission that is missing; and ``TopologyError`` where there is no stream.

    Args:
        config: the settings.
        connection: the process's.
        subject: the dead-letter subject.
    """

    def __init__(self, config: Config, connection: Connection, subject: str) -> None:
        self.subject = subject
        self._stream = config.stream_name
        self._connection = connection
        self._info = f"$JS.API.STREAM.INFO.{self._stream}"
        self._get = f"$JS.API.STREAM.MSG.GET.{self._stream}"
        self._delete = f"$JS.API.STREAM.MSG.DELETE.{self._stream}"

    def pages(
        self,
        chosen: DeadLetterFilter,
        after: int = 0,
        *,
        size: int = PAGE,
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
        place, span = after + 1, size
        while place is not None and place <= last:
            found, reached = self._patiently(self._wave, place, span, last, size)
            yield [letter for letter in found if chosen.admits(letter)], min(last, reached - 1)
            span = _next_span(span, found, size)
            place = reached

    def total(self) -> int:
        """How many there are, of every kind: one question."""
        return self._patiently(self._total)

    def still_there(self, letters: Sequence[StoredDeadLetter]) -> Letters:
        """Those that nobody has deleted since they were read."""
        return self._patiently(self._pick, [letter.sequence for letter in letters])

    def remove(self, sequences: Sequence[int]) -> int:
        """Deletes those with these numbers; one that is gone already is no error.

        Returns:
            How many were not.

        Raises:
            NotConnectedError: an outage, or the server refuses.
        """
        return self._patiently(self._remove, sequences)

    def _patiently(self, function: Callable[..., Coroutine[Any, Any, T]], *args: Any) -> T:
        """Runs it in the loop thread, again while there is an outage, for :data:`PATIENCE`."""
        until = time.monotonic() + PATIENCE
        while True:
            try:
                return self._connection.run(function, *args)
            except (ConnectionRefusedByServer, PermissionDeniedError):
                raise  # waiting does not help
            except NotConnectedError:
                if time.monotonic() >= until:
                    raise
            time.sleep(PAUSE)

    # -- in the loop thread ----------------------------------------------------------------------

    async def _last(self) -> int:
        """The stream's last number. 2.9.10 forgets a subject's when that message is deleted."""
        return int((await self._state())["last_seq"])

    async def _total(self) -> int:
        found = (await self._state(subjects_filter=self.subject)).get("subjects") or {}
        return int(found.get(self.subject, 0))

    async def _state(self, **request: str) -> dict[str, Any]:
        found = await self._ask(await self._connection.session(ASK_TIMEOUT), self._info, request)
        if "error" in found:
            raise self._fault("read dead letters", found["error"])
        state: dict[str, Any] = found["state"]
        return state

    async def _pick(self, numbers: Sequence[int]) -> Letters:
        session = await self._connection.session(ASK_TIMEOUT)
        found = await asyncio.gather(*(self._read(session, {"seq": one}) for one in numbers))
        now = datetime.now(timezone.utc)
        return [
            _letter(message, now)
            for message in found
            if message is not None and message["subject"] == self.subject
        ]

    async def _wave(self, start: int, span: int, last: int, size: int) -> tuple[Letters, int]:
        """The letters from a number on, of so many numbers; and where to go on.

        A walker who has found his share stops; what those behind him have found is read again.
        """
        session = await self._connection.session(ASK_TIMEOUT)
        step, share = max(1, span // WALKERS), max(1, 2 * size // WALKERS)
        ends = [min(start + step * (i + 1), last + 1) for i in range(WALKERS)]
        starts = [start, *ends[:-1]]
        walks = await asyncio.gather(
            *(self._walk(session, one, end, share) for one, end in zip(starts, ends, strict=True))
        )
        now, found = datetime.now(timezone.utc), list[StoredDeadLetter]()
        for (messages, reached), end in zip(walks, ends, strict=True):
            found += [_letter(message, now) for message in messages]
            if reached is not None and reached < end:
                return found, reached
        return found, walks[-1][1] or last + 1

    async def _walk(
        self, session: Session, place: int, end: int, share: int
    ) -> tuple[Messages, int | None]:
        """The messages of one part of the stream, and the first behind it, or where he stopped."""
        found: Messages = []
        room = share * ROOM
        while place < end and len(found) < share and room > 0:
            message = await self._read(session, {"seq": place, "next_by_subj": self.subject})
            if message is None:
                return found, None
            if message["seq"] >= end:
                return found, message["seq"]
            found.append(message)
            place = message["seq"] + 1
            room -= len(message.get("data", ""))
        return found, place

    async def _read(self, session: Session, request: dict[str, Any]) -> dict[str, Any] | None:
        answer = await self._ask(session, self._get, request)
        problem = answer.get("error")
        if not problem:
            message: dict[str, Any] = answer["message"]
            return message
        if problem.get("err_code") == NO_MESSAGE_FOUND:
            return None
        raise self._fault("read dead letters", problem)

    async def _remove(self, sequences: Sequence[int]) -> int:
        session = await self._connection.session(ASK_TIMEOUT)
        return sum(await asyncio.gather(*(self._remove_one(session, one) for one in sequences)))

    async def _remove_one(self, session: Session, sequence: int) -> bool:
        request = {"seq": sequence, "no_erase": True}
        problem = (await self._ask(session, self._delete, request)).get("error")
        if not problem:
            return True
        gone = problem.get("err_code") in (NOT_DELETED, NO_MESSAGE_FOUND)
        if gone and await self._read(session, {"seq": sequence}) is None:
            return False
        raise self._fault(f"delete the dead letter {sequence}", problem)

    async def _ask(self, session: Session, subject: str, request: dict[str, Any]) -> dict[str, Any]:
        answer = await session.ask(subject, json.dumps(request).encode(), timeout=ASK_TIMEOUT)
        found: dict[str, Any] = json.loads(answer.data)
        return found

    def _fault(self, what: str, problem: dict[str, Any]) -> Exception:
        told = f"could not {what}: {problem.get('description')} ({problem.get('err_code')})"
        if problem.get("err_code") == STREAM_NOT_FOUND:
            return TopologyError(f"{told}: run `jetstream provision`", stream=self._stream)
        return NotConnectedError(told)


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
