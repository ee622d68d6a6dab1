"""The dead letters of an app: looked at, sent again, deleted. ``jetstream.dead_letters``."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from . import events, subjects
from .config import Config
from .connection import Connection
from .deadletter_admin import DeadLetterAdmin
from .deadletter_filter import DeadLetterFilter
from .deadletter_store import PAGE, Progress
from .events import Event
from .exceptions import (
    DatabaseUnavailableError,
    DecodeError,
    EventError,
    NotConnectedError,
    PermissionDeniedError,
)
from .letters import StoredDeadLetter
from .publisher import Publisher
from .redrive import Redrive, RedriveResult, who

__all__ = ("DeadLetters",)

#: Seconds for which what was read of the dead letters is believed.
FRESH = 0.5


class DeadLetters(DeadLetterAdmin):
    """The dead letters of one app. Thread-safe; fork-safe.

    Args:
        config: the settings.
        connection: the process's.
        publisher: the process's.
        forget: has an event handled once more that the inbox calls processed; by its event_id.
        check: reads an event as its handler would; raises what that raises.
        app_name: whose dead letters; default ``jetstream_app_name``.
    """

    def __init__(
        self,
        config: Config,
        connection: Connection,
        publisher: Publisher,
        forget: Callable[[str], object],
        check: Callable[[Event], object],
        app_name: str = "",
    ) -> None:
        super().__init__(config, connection, app_name)
        self._publisher = publisher
        self._forget = forget
        self._check = check

    def of(self, app_name: str) -> DeadLetters:
        """Those of another app in the same stream, also one of the Ruby gem's.

        Raises:
            SubjectError: that is no name of an app.
        """
        subjects.validate_app_name(app_name)
        return DeadLetters(
            self.config, self.connection, self._publisher, self._forget, _believe, app_name
        )

    # -- sending again ---------------------------------------------------------------------------

    def redrive(
        self,
        chosen: DeadLetterFilter | str | int,
        *,
        rate: float | None = None,
        limit: int | None = None,
        force: bool = False,
        dry_run: bool = False,
        max_redrives: int | None = None,
        subject: str | None = None,
        by: str = "",
        stop: Callable[[], bool] = lambda: False,
        progress: Progress | None = None,
    ) -> RedriveResult:
        """Sends dead letters again to where they came from, those first that died first.

        The event is as it was, byte for byte, with the same ``event_id`` and headers; it has all
        its attempts. It is deleted from the dead letters when JetStream has stored it. A handler
        with an inbox that has processed the event passes over it, unless ``force`` is given.

        Args:
            chosen: which ones, ``DeadLetterFilter()`` for all; or one event_id or number.
            rate: events a second, at the most.
            limit: how many at the most.
            force: also those that were redriven ``max_redrives`` times, and (this app's own) those
                that the inbox calls processed, whose effect is then had once more.
            dry_run: only count them.
            max_redrives: how often one event may be; default ``jetstream_max_redrives``.
            subject: where to, in place of where they came from.
            by: who it was, for the header ``x-redriven-by``; default user and host.
            stop: asked between pages whether to end early.
            progress: called with letters that are done, and in all; they are counted first.

        Returns:
            How far it came. An outage, of NATS or of the inbox's database, ends it, and so does a
            permission that is missing: that is the result's ``error``.

        Raises:
            SubjectError: ``subject`` is none that can be published to.
            TopologyError: there is no stream.
            ValueError: ``rate`` or ``limit`` is none.
        """
        _check(rate, limit)
        run = self._run(subject, by, max_redrives, force, dry_run)
        chosen = DeadLetterFilter.of(chosen)
        size = PAGE if rate is None else max(1, min(PAGE, int(rate / 10)))
        size = size if limit is None else min(size, limit)
        try:
            tell = self._telling(progress, chosen, limit=limit, stop=stop)
            due = time.monotonic()
            for page, reached in self.store.pages(chosen, size=size):
                read = time.monotonic()
                for some in run.parts(page, size, limit):
                    if time.monotonic() - read > FRESH:  # perhaps purged, or redriven by another
                        some = self.store.still_there(some)
                    if stop():
                        return run.ended("stopped")
                    before, began = run.result.redriven, time.monotonic()
                    run.send(some)
                    tell(run.done)
                    if run.result.error or run.done == limit:
                        return run.result
                    if rate and not dry_run:
                        # what a pause has cost is not made up for, but for one part
                        due = max(due, began - size / rate) + (run.result.redriven - before) / rate
                        _keep_pace(due, stop)
                run.reached(reached)
        except (NotConnectedError, DatabaseUnavailableError) as error:
            return run.ended(str(error), denied=isinstance(error, PermissionDeniedError))
        return run.result

    def edited(
        self, event_id: str | int, *, payload: Any = None, envelope: bytes | None = None
    ) -> StoredDeadLetter:
        """A dead letter with another payload, or another envelope, checked as far as can be.

        Args:
            event_id: its event_id, or number.
            payload: any JSON value but None.
            envelope: all of the body, for one that is no envelope.

        Returns:
            The dead letter with its new body, for :meth:`redrive_edited`.

        Raises:
            EventError: there is no such dead letter, or the new event is none that its handler
                can read (``DecodeError``, ``PayloadError``), or it has another event_id.
        """
        letter = self.get(event_id)
        if letter is None:
            raise EventError(f"there is no dead letter {event_id} of {self.app_name}")
        if envelope is None:
            found = events.decode(letter.body).envelope
            event = Event.from_envelope({**found, "payload": payload})
        else:
            event = events.decode(envelope)
        if event.payload is None:
            raise EventError("payload is null; give the event's data, or {} where there is none")
        before = _own_id(letter.body)
        if before and event.event_id != before:
            raise EventError(
                f"event_id is {event.event_id!r}, and was {before!r}: leave it as it is "
                "(an event with another id is another event: publish it, and purge this one)"
            )
        self._check(event)
        return replace(letter, body=events.encode(event), problems=())

    def redrive_edited(
        self,
        letter: StoredDeadLetter,
        *,
        force: bool = False,
        dry_run: bool = False,
        subject: str | None = None,
        by: str = "",
    ) -> RedriveResult:
        """Sends what :meth:`edited` has made of a dead letter, and deletes that.

        Arguments, result and errors are those of :meth:`redrive`.
        """
        run = self._run(subject, by, None, force, dry_run)
        try:
            run.send([letter], edited=True)
        except (NotConnectedError, DatabaseUnavailableError) as error:
            return run.ended(str(error), denied=isinstance(error, PermissionDeniedError))
        return run.result

    def _run(
        self, subject: str | None, by: str, most: int | None, force: bool, dry_run: bool
    ) -> Redrive:
        owns_inbox = self.config.has_database and self.app_name == self.config.app_name
        return Redrive(
            self,
            self._publisher,
            subject=subject,
            by=by or who(),
            most=self.config.max_redrives if most is None else most,
            force=force,
            forget=self._forget if force and owns_inbox else None,
            dry_run=dry_run,
        )


def _believe(event: Event) -> None:
    """How another app's handlers read an event is not known here."""


def _own_id(body: bytes) -> str:
    try:
        return events.decode(body).event_id
    except DecodeError:
        return ""


def _check(rate: Any, limit: Any) -> None:
    if rate is not None and not (isinstance(rate, (int, float)) and rate > 0):
        raise ValueError(f"rate must be a number of events a second above 0, not {rate!r}")
    if limit is not None and not (isinstance(limit, int) and limit >= 0):
        raise ValueError(f"limit must be a number of events, not {limit!r}")


def _keep_pace(until: float, stop: Callable[[], bool]) -> None:
    while not stop() and (ahead := until - time.monotonic()) > 0:
        time.sleep(min(ahead, 0.1))
