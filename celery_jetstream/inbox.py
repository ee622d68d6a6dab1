"""The inbox: an event is handled once, however often its message comes. ``jetstream.inbox``.

A handler that takes a ``session`` runs in one transaction with its inbox row, the events that it
writes to the outbox, and whatever else it writes: all of it commits, or nothing. Around any other
handler the row is marked before and after, which a crash in between does not survive.

Sessions are synchronous: a Celery worker has no event loop for others.
"""

from __future__ import annotations

import contextlib
import logging
import random
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import TypeVar

from celery.exceptions import Ignore
from sqlalchemy import Connection, Engine, event, exc
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.orm import Session

from . import signals
from .config import Config
from .database import Database, Engines, is_autocommit, is_away, is_conflict, mapped_table
from .exceptions import ConfigurationError, InboxError, InboxUnavailableError
from .inbox_admin import InboxAdmin
from .inbox_leases import Leases
from .inbox_models import InboxMixin, inbox_model
from .inbox_rows import Answer, Entry, InboxRows, Verdict
from .settlement import Ack, DeadLetter, Nak
from .sqltypes import need_columns

__all__ = ("Inbox",)

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: Seconds for which what a handler has done is tried to be marked, while the database is away.
MARK_TIMEOUT = 10.0
#: In ``session.info``: the session's transaction has an inbox row in it.
_GUARDED = "celery_jetstream.inbox"
#: In ``connection.info``: a statement failed since the run began.
_FAILED = "celery_jetstream.failed"


class Inbox(InboxAdmin):
    """One app's inbox in one process. Thread-safe; a forked child makes its own.

    Args:
        config: the settings.
        engines: the process's; the inbox's database is one of them.

    Raises:
        ConfigurationError: the model, or the session factory, cannot be used.
    """

    def __init__(self, config: Config, engines: Engines) -> None:
        table = mapped_table(config, "inbox", inbox_model)
        need_columns("jetstream_inbox_model", table, InboxMixin)
        self.rows = InboxRows(table, config.inbox_lease)
        super().__init__(config, Database(engines, "inbox", (table,)), self.rows)
        self._leases = Leases(self._renew, config.inbox_lease)

    @cached_property
    def sessions(self) -> Callable[[], Session]:
        """What makes the sessions that handlers get.

        Raises:
            ConfigurationError: they would be asynchronous, or have no engine.
        """
        return self.database.engines.sessions(self.rows.table)

    # -- runs ------------------------------------------------------------------------------------

    def run_within(
        self, entry: Entry, call: Callable[[Session], T], begun: Callable[[int], None]
    ) -> T | Ack | Nak:
        """Runs a handler in the transaction of its inbox row.

        Args:
            entry: the hand-over.
            call: the handler, given the session.
            begun: told how many runs of the message have failed, before the handler runs.

        Returns:
            What the handler returned; ``Ack`` where the event is done already, ``Nak(ack_wait)``
            where another run is at it.

        Raises:
            InboxUnavailableError: it could not begin or commit, through no fault of the event's.
            InboxError: the handler ended the transaction.
            Exception: what the handler raised, or the database found wrong at the commit.
        """
        with contextlib.closing(self.sessions()) as session:
            if not session.in_transaction():
                session.begin()
            connection = self._connection(session)
            with self._able_to_begin(connection):
                answer = self.rows.begin(connection, entry, within=True)
            if answer.verdict is not Verdict.OURS:
                return self._refused(entry, answer)
            begun(answer.attempts)
            connection.info.pop(_FAILED, None)
            try:
                result = _guarded(session, call)
            except Ignore:
                session.rollback()
                self._pass_over(entry)
                raise
            if not isinstance(result, (Nak, DeadLetter)):
                self._commit(session, connection, entry)
            return result

    def run_around(
        self, entry: Entry, call: Callable[[], T], begun: Callable[[int], None]
    ) -> T | Ack | Nak:
        """Runs a handler between two marks, each in a transaction of its own; as above.

        The handler runs again where its process dies, or the database is away for longer than
        10 s, between its effect and the second mark.
        """
        with self._able_to_begin(None), self.database.statements() as connection:
            answer = self.rows.begin(connection, entry, within=False)
        if answer.verdict is not Verdict.OURS:
            return self._refused(entry, answer)
        begun(answer.attempts)
        with self._leases.held(entry.owner):
            try:
                result = call()
            except Ignore:
                self._mark(entry)
                raise
            if not isinstance(result, (Nak, DeadLetter)):
                self._mark(entry)
        return result

    def bare(self, call: Callable[[Session], T]) -> T:
        """Runs a handler that no message is behind (``.delay(envelope)``): a session, no row."""
        with contextlib.closing(self.sessions()) as session:
            result = call(session)
            session.commit()
            return result

    # -- how it ended ----------------------------------------------------------------------------

    def fail(self, entry: Entry, error: str, patience: float = 0.0) -> Answer:
        """Records that a run failed, after its transaction is over.

        Args:
            entry: the hand-over.
            error: what is kept of the reason.
            patience: seconds to wait for a transaction that a killed process has left.

        Raises:
            InboxUnavailableError: it could not be recorded.
        """
        end = time.monotonic() + patience
        while True:
            with self._able_to_begin(None), self.database.statements() as connection:
                answer = self.rows.fail(connection, entry, error)
            if answer.verdict is not Verdict.BUSY or time.monotonic() >= end:
                return answer
            time.sleep(random.uniform(0.02, 0.1))

    def release(self, entry: Entry) -> None:
        """A run was cut off with its process through no fault of its own.

        Raises:
            InboxUnavailableError: that could not be recorded; its lease will end.
        """
        with self.database.statements() as connection:
            self.rows.release(connection, entry)

    def is_outage(self, error: BaseException) -> bool:
        """Whether a run ended so for a database that is away, or a conflict that was lost."""
        return isinstance(error, InboxUnavailableError) or is_away(error) or is_conflict(error)

    def is_lost_conflict(self, error: BaseException) -> bool:
        """Whether it was a conflict: the database is there, and the next try may be better."""
        return is_conflict(error.__cause__ or error) or is_conflict(error)

    def close(self, timeout: float = 1.0) -> None:
        """Ends the thread that keeps leases."""
        self._leases.close(timeout)

    # -- how -------------------------------------------------------------------------------------

    def _connection(self, session: Session) -> Connection:
        with self._able_to_begin(None):
            connection = session.connection(bind_arguments={"clause": self.rows.table})
        if is_autocommit(connection):
            raise ConfigurationError(
                "jetstream_session_factory: its sessions commit each statement (isolation_level "
                "AUTOCOMMIT), so that an effect and its inbox row are not one; give another",
                setting="jetstream_session_factory",
            )
        return connection

    @contextlib.contextmanager
    def _able_to_begin(self, connection: Connection | None) -> Iterator[None]:
        """A table that is not there is an outage as well: a deploy may precede its migrations."""
        bind = connection if connection is not None else self.database.engine
        try:
            with self.database.translated(bind):
                yield
        except ConfigurationError as error:
            raise InboxUnavailableError(str(error)) from error

    def _refused(self, entry: Entry, answer: Answer) -> Ack | Nak:
        who, fields = (entry.event_id, entry.handler), entry.log_fields
        if answer.verdict is Verdict.PROCESSED:
            fields["outcome"] = "ack"
            logger.info("event %s was handled by %s before", *who, extra=fields)
            signals.duplicate_skipped.send(
                sender=self, event_id=who[0], handler=who[1], delivery=entry.delivery
            )
            return Ack()
        fields["outcome"] = "nak"
        logger.info("event %s is being handled by %s elsewhere", *who, extra=fields)
        return Nak(self._config.ack_wait)

    def _pass_over(self, entry: Entry) -> None:
        """What a handler ignores is done with, though nothing of it is kept."""
        with self._able_to_begin(None), self.database.statements() as connection:
            self.rows.begin(connection, entry, within=True)

    def _commit(self, session: Session, connection: Connection, entry: Entry) -> None:
        try:
            if connection.info.pop(_FAILED, False) and not self.rows.has(connection, entry):
                raise InboxError(
                    "the database rolled the transaction back (a deadlock, say) and the handler "
                    "went on as if it had not; let the error through, or use a savepoint"
                )
            session.commit()
        except exc.SQLAlchemyError as error:
            if is_away(error) or is_conflict(error):
                raise InboxUnavailableError(f"could not commit: {error}") from error
            raise

    def _mark(self, entry: Entry) -> None:
        end = time.monotonic() + MARK_TIMEOUT
        while True:
            try:
                with self.database.statements() as connection:
                    return self.rows.finish(connection, entry)
            except InboxUnavailableError:
                if time.monotonic() >= end:
                    raise
            time.sleep(random.uniform(0.1, 0.5))

    def _renew(self, owners: set[str]) -> int:
        with self.database.statements() as connection:
            return self.rows.renew(connection, owners)


def _guarded(session: Session, call: Callable[[Session], T]) -> T:
    """Runs a handler that must leave the transaction as it is."""
    transaction = session.get_transaction()
    session.info[_GUARDED] = True
    try:
        result = call(session)
    finally:
        session.info.pop(_GUARDED, None)
    if session.get_transaction() is not transaction or not session.is_active:
        raise InboxError(
            "the handler rolled back or closed the session it was given, and its inbox row with "
            "it; use session.begin_nested() for a part that may fail, and raise for the whole"
        )
    return result


def _refuse_commit(session: Session) -> None:
    if session.info.get(_GUARDED) and session.get_nested_transaction() is None:
        raise InboxError(
            "the handler committed the session that it was given: its inbox row would be kept "
            "though the handler may yet fail; leave the commit to the inbox"
        )


def _note_failure(context: ExceptionContext) -> None:
    """A handler may catch it, and not know that its transaction is gone.

    PostgreSQL then answers a COMMIT with a rollback, which its drivers take for a commit; after a
    deadlock, what follows is a transaction of its own on MariaDB.
    """
    connection = context.connection
    if connection is not None and not (connection.closed or connection.invalidated):
        connection.info[_FAILED] = True


event.listen(Session, "before_commit", _refuse_commit)
event.listen(Engine, "handle_error", _note_failure)
