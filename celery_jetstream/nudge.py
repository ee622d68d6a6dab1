"""Nudges: what makes an outbox's event leave milliseconds after its commit.

:func:`nudge_after_commit` is told of a row, in its transaction, and calls when the outermost COMMIT
has made it visible. :class:`Nudger` takes such calls, from any thread and at no cost, and flushes
in a thread of its own. A nudge may be lost (a crash, a fork, an error): a sweep finds the row.

Only what SQLAlchemy announces is used, so it works with every database and driver.
"""

from __future__ import annotations

import functools
import logging
import os
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.orm import Session, SessionTransaction, scoped_session

from .database import is_autocommit

__all__ = ("Nudge", "Nudger", "nudge_after_commit")

logger = logging.getLogger(__name__)

#: Called with the seconds after which the row can be read.
Nudge = Callable[[float], None]

#: Core has no event after a COMMIT, only one before it: seconds that the COMMIT itself may take.
CORE_DELAY = 0.01
#: Seconds between the starts of two flushes.
SPACING = 0.05
#: Seconds of pause after a flush that failed: after the first, and at most.
BACKOFF = (0.5, 30.0)
#: Seconds without a nudge after which the thread ends.
IDLE = 60.0


# -- after the commit ------------------------------------------------------------------------------


def nudge_after_commit(target: Session | scoped_session[Any] | Connection, nudge: Nudge) -> None:
    """Calls ``nudge`` once after the commit of what ``target`` is writing now.

    It is not called when that is rolled back: the transaction, or a savepoint around the row.
    Where a commit of SQLAlchemy's is none of the database's (a session that joined a connection's
    transaction), the connection's is waited for.

    Args:
        target: a session, or a Core connection. Of an ``AsyncSession`` its ``sync_session``, of an
            ``AsyncConnection`` its ``sync_connection``.
        nudge: hashable; calls with the same one are one. What it raises is logged.
    """
    if isinstance(target, Session):
        _mark_session(target, nudge)
    elif isinstance(target, Connection):
        _mark_connection(target, nudge)
    elif isinstance(target, scoped_session):
        _mark_session(target(), nudge)
    else:
        raise TypeError(
            "a Session or a Connection is needed (of an AsyncSession its sync_session, of an "
            f"AsyncConnection its sync_connection), not {target!r}"
        )


class _Marks:
    """Who is to be nudged, by the savepoint around the row (None: there is none).

    A savepoint is known by its ``id()``: the object would keep its session alive. An id is of use
    to a second one only after the first has ended, and is out of here by then.
    """

    __slots__ = ("_nudges",)

    def __init__(self) -> None:
        self._nudges: dict[int | None, set[Nudge]] = {}

    def add(self, savepoint: int | None, nudge: Nudge) -> None:
        nudges = self._nudges.get(savepoint)
        if nudges is None:
            self._nudges[savepoint] = {nudge}
        else:
            nudges.add(nudge)

    def released(self, savepoint: int, around: int | None) -> None:
        """What was written in the savepoint is now the one's around it."""
        if nudges := self._nudges.pop(savepoint, None):
            self._nudges.setdefault(around, set()).update(nudges)

    def rolled_back(self, savepoint: int) -> None:
        self._nudges.pop(savepoint, None)

    @property
    def all(self) -> set[Nudge]:
        """All that was not rolled back."""
        return set().union(*self._nudges.values())


def _call(nudges: Iterable[Nudge], delay: float) -> None:
    for nudge in nudges:
        try:
            nudge(delay)
        except Exception:
            logger.warning("nudge failed; the sweep does its work", exc_info=True)


# Sessions. Seen with SQLAlchemy 2.0.0, 2.0.58 and 2.1: `after_commit` comes when the database has
# committed, also for the release of a savepoint, which still is the session's nested transaction
# then; `after_transaction_end` comes last, after a commit, a rollback and a mere close alike.

_KEY = "celery_jetstream.nudges"


def _mark_session(session: Session, nudge: Nudge) -> None:
    marks: _Marks | None = session.info.get(_KEY)
    if marks is None:
        marks = session.info[_KEY] = _Marks()
    savepoint = session.get_nested_transaction()
    marks.add(None if savepoint is None else id(savepoint), nudge)


def _session_committed(session: Session) -> None:
    marks: _Marks | None = session.info.get(_KEY)
    if marks is None:
        return
    savepoint = session.get_nested_transaction()
    if savepoint is not None:
        marks.released(id(savepoint), _around(savepoint))
        return
    session.info.pop(_KEY, None)
    outer = session.bind
    if isinstance(outer, Connection) and outer.in_transaction():
        for nudge in marks.all:
            _mark_connection(outer, nudge)
    else:
        _call(marks.all, 0.0)


def _session_transaction_ended(session: Session, transaction: SessionTransaction) -> None:
    marks: _Marks | None = session.info.get(_KEY)
    if marks is None:
        return
    if transaction.parent is None:
        session.info.pop(_KEY, None)
    else:
        marks.rolled_back(id(transaction))


def _around(savepoint: SessionTransaction) -> int | None:
    parent = savepoint.parent
    while parent is not None and not parent.nested:
        parent = parent.parent
    return None if parent is None else id(parent)


event.listen(Session, "after_commit", _session_committed)
event.listen(Session, "after_transaction_end", _session_transaction_ended)


# Core. All events come before what they announce, so the savepoint in question still is the
# connection's nested transaction. (Unless savepoints end in another order than they began, of which
# SQLAlchemy warns: then a nudge may be one too many.)

_connections: weakref.WeakKeyDictionary[Connection, _Marks] = weakref.WeakKeyDictionary()


def _mark_connection(connection: Connection, nudge: Nudge) -> None:
    if is_autocommit(connection):
        _call((nudge,), CORE_DELAY)
        return
    _listen_to_engines()
    marks = _connections.get(connection)
    if marks is None:
        marks = _connections[connection] = _Marks()
    savepoint = connection.get_nested_transaction()
    marks.add(None if savepoint is None else id(savepoint), nudge)


def _connection_commits(connection: Connection, *_: Any) -> None:
    if (marks := _connections.pop(connection, None)) is not None:
        _call(marks.all, CORE_DELAY)


def _connection_rolls_back(connection: Connection, *_: Any) -> None:
    _connections.pop(connection, None)


def _connection_releases(connection: Connection, *_: Any) -> None:
    marks, savepoint = _connections.get(connection), connection.get_nested_transaction()
    if marks is not None and savepoint is not None:
        around = getattr(savepoint, "_previous_nested", None)
        marks.released(id(savepoint), None if around is None else id(around))


def _connection_rolls_savepoint_back(connection: Connection, *_: Any) -> None:
    marks, savepoint = _connections.get(connection), connection.get_nested_transaction()
    if marks is not None and savepoint is not None:
        marks.rolled_back(id(savepoint))


@functools.cache
def _listen_to_engines() -> None:
    """Only when Core is first used: it makes every statement of the process 4 µs slower.

    On the engines, for a connection that is open already hears those; twice does no harm.
    """
    event.listen(Engine, "commit", _connection_commits)
    event.listen(Engine, "commit_twophase", _connection_commits)
    event.listen(Engine, "rollback", _connection_rolls_back)
    event.listen(Engine, "rollback_twophase", _connection_rolls_back)
    event.listen(Engine, "release_savepoint", _connection_releases)
    event.listen(Engine, "rollback_savepoint", _connection_rolls_savepoint_back)


# -- off the caller's thread -----------------------------------------------------------------------


class Nudger:
    """Flushes soon after it is nudged, in a thread of its own. One per process and app.

    A flush begins at once, or ``spacing`` after the last began; nudges that come meanwhile are one,
    and so are those that come while a flush runs: as what they announce may be too late for that
    flush, another follows. After a flush that failed there is a pause, and another try (not for
    ever: with the longest pause it waits for the next nudge).

    In a forked child it begins anew, with no thread and no nudges; those are the parent's.

    Args:
        flush: does the work; may block.
        spacing: seconds between the starts of two flushes.
        backoff: seconds of pause after a failed flush, the shortest and the longest.
        idle: seconds without a nudge after which the thread ends; the next nudge starts another.
    """

    def __init__(
        self,
        flush: Callable[[], None],
        *,
        spacing: float = SPACING,
        backoff: tuple[float, float] = BACKOFF,
        idle: float = IDLE,
    ) -> None:
        self._flush = flush
        self._spacing = spacing
        self._backoff = backoff
        self._idle = idle
        self._closed = False
        self._reset()
        _nudgers.add(self)

    def _reset(self) -> None:
        self._changed = threading.Condition()  # reentrant: a signal handler may nudge as well
        self._thread: threading.Thread | None = None
        self._due: float | None = None
        self._latest = 0.0
        self._not_before = 0.0
        self._failures = 0
        self._told = False

    def nudge(self, delay: float = 0.0) -> None:
        """Has a flush begin, ``delay`` seconds from now at the earliest; any thread.

        Does not wait and does not raise. After :meth:`close` it does nothing.
        """
        due = time.monotonic() + delay
        with self._changed:
            if self._closed:
                return
            sooner = self._due is None or due < self._due
            if sooner:
                self._due = due
            self._latest = max(self._latest, due)
            if self._thread is None:
                self._start()
            elif sooner:
                self._changed.notify()

    def close(self, timeout: float = 1.0) -> None:
        """Stops the thread; ``timeout`` seconds at most are waited for it.

        What was nudged is flushed at once, unless the last flush failed. To be called before the
        interpreter ends (``atexit``), so that a short script's last event leaves with it.
        """
        with self._changed:
            self._closed = True
            self._changed.notify()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout)

    # -- with the lock held ----------------------------------------------------------------------

    def _start(self) -> None:
        self._thread = threading.Thread(
            target=self._run, name="celery-jetstream-nudge", daemon=True
        )
        try:
            self._thread.start()
        except RuntimeError as error:  # no more threads, or the interpreter ends
            self._thread = None
            self._tell(error)

    def _turn(self) -> float | None:
        """When the next flush may begin; None when there is none to do."""
        if self._due is None:
            return None
        if self._closed:
            return None if self._failures else self._latest
        return max(self._due, self._not_before)

    def _tell(self, error: Exception) -> None:
        level = logging.DEBUG if self._told else logging.WARNING
        self._told = True
        logger.log(
            level,
            "flush after a commit failed (%s: %s); until it succeeds, events wait for the sweep",
            type(error).__name__,
            error,
        )

    # -- the thread ------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._wait():
                try:
                    self._flush()
                except Exception as error:
                    self._failed(error)
                else:
                    self._succeeded()
        except BaseException:
            with self._changed:
                self._thread = None
            raise

    def _wait(self) -> bool:
        """Waits for the next flush's turn and takes it; False at the end of the thread."""
        with self._changed:
            while True:
                turn, now = self._turn(), time.monotonic()
                if turn is not None and turn <= now:
                    self._due = self._latest if self._latest > now else None
                    self._not_before = now + self._spacing
                    return True
                if turn is not None:
                    self._changed.wait(turn - now)
                elif self._closed or not self._changed.wait(self._idle):
                    self._thread = None
                    return False

    def _succeeded(self) -> None:
        with self._changed:
            if self._told:
                logger.info("flush after a commit works again")
            self._failures, self._told = 0, False

    def _failed(self, error: Exception) -> None:
        least, most = self._backoff
        with self._changed:
            self._tell(error)
            pause = min(most, least * 2 ** min(self._failures, 16))
            self._failures += 1
            now = time.monotonic()
            self._not_before = now + random.uniform(0.5, 1.0) * pause
            if pause < most and self._due is None:
                self._due = self._latest = now


# -- forks -----------------------------------------------------------------------------------------

_nudgers: weakref.WeakSet[Nudger] = weakref.WeakSet()


def _forget_in_child() -> None:
    """In a forked child: the thread is gone, and whoever held the lock with it."""
    for nudger in list(_nudgers):
        nudger._reset()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
