"""The database that holds the outbox: an engine of ours, or the one behind your sessions.

Every statement of a flusher is a transaction of its own, so that none is open while anything
waits for the network. Nothing here needs a session's state or a prepared statement, so that a
pooler such as PgBouncer may stand in between.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, TypeVar

from kombu.utils.imports import symbol_by_name
from sqlalchemy import Connection, Engine, Table, create_engine, event, exc
from sqlalchemy.engine import make_url

from .config import Config
from .exceptions import ConfigurationError, OutboxUnavailableError
from .models import Tables, outbox_model
from .readers import masked

__all__ = ("Database", "is_conflict", "is_outage")

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: Seconds to wait for a connection, and for a lock on SQLite.
CONNECT_TIMEOUT = 5
SQLITE_TIMEOUT = 30
#: How often a statement that lost against another transaction is tried.
TRIES = 6

#: What our own engine tells the drivers: give up on a server that does not answer.
_CONNECT_ARGS: dict[str, dict[str, Any]] = {
    "psycopg": {
        "connect_timeout": CONNECT_TIMEOUT,
        "tcp_user_timeout": 10_000,  # milliseconds
        "keepalives_idle": 10,
        "prepare_threshold": None,  # PgBouncer
    },
    "psycopg2": {"connect_timeout": CONNECT_TIMEOUT, "tcp_user_timeout": 10_000},
    "pymysql": {"connect_timeout": CONNECT_TIMEOUT, "read_timeout": 60, "write_timeout": 60},
    "mysqldb": {"connect_timeout": CONNECT_TIMEOUT, "read_timeout": 60, "write_timeout": 60},
    "pysqlite": {"timeout": SQLITE_TIMEOUT},
}

#: SQLSTATEs and error numbers of a transaction that lost against another and may try again.
_CONFLICTS = {"40001", "40P01", "55P03", 1205, 1213, 1020}
#: PostgreSQL where only reading is allowed: the other server has taken over.
_STANDBY = "25006"


class Database:
    """The outbox's database as one process sees it. Thread-safe; a forked child makes its own."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._engine: Engine | None = None
        self._lock = threading.Lock()
        _databases.add(self)

    @property
    def engine(self) -> Engine:
        """Ours for ``database_url``, else that of ``session_factory``.

        Raises:
            ConfigurationError: neither can be used.
        """
        tables, url = self.tables, self._config.database_url
        with self._lock:
            if self._engine is None:
                factory = self._config.session_factory
                self._engine = _own_engine(url) if url else _engine_of(factory, tables.outbox)
            return self._engine

    @cached_property
    def tables(self) -> Tables:
        """The outbox's tables: those of ``outbox_model``, else of the default model."""
        config = self._config
        model = config.outbox_model
        if isinstance(model, str):
            model = _imported("outbox_model", model)
        if model is None:
            model = outbox_model(config.outbox_table, config.outbox_schema)
        table = getattr(model, "__table__", None)
        if table is None:
            raise ConfigurationError(
                f"jetstream_outbox_model={model!r} is no mapped class; derive one from OutboxMixin",
                setting="jetstream_outbox_model",
            )
        return Tables.of(table)

    @contextlib.contextmanager
    def statements(self) -> Iterator[Connection]:
        """A connection on which every statement is a transaction.

        Raises:
            OutboxUnavailableError: the database is away.
        """
        with translated(self.engine), self.engine.connect() as connection:
            yield connection.execution_options(isolation_level="AUTOCOMMIT")

    def transaction(self, work: Callable[[Connection], T]) -> T:
        """Does ``work(connection)`` in one transaction; again where it lost against another.

        Raises:
            OutboxUnavailableError: the database is away.
        """

        def attempt() -> T:
            with self.engine.begin() as connection:
                return work(connection)

        with translated(self.engine):
            return again(attempt)

    def close(self) -> None:
        """Closes the connections of an engine of ours."""
        with self._lock:
            engine, self._engine = self._engine, None
        if engine is not None and self._config.database_url is not None:
            engine.dispose()


def again(work: Callable[[], T]) -> T:
    """Runs one statement, again where it lost against another transaction."""
    for attempt in range(TRIES):
        try:
            return work()
        except exc.DBAPIError as error:
            if not is_conflict(error) or attempt == TRIES - 1:
                raise
        time.sleep(random.uniform(0, 0.05 * 2**attempt))
    raise AssertionError


def is_conflict(error: BaseException) -> bool:
    """Whether a transaction lost against another (deadlock, lock wait, locked SQLite)."""
    if not isinstance(error, exc.DBAPIError) or error.orig is None:
        return False
    number = error.orig.args[0] if error.orig.args else None
    locked = "database is locked" in str(error.orig) or "table is locked" in str(error.orig)
    known = _state(error) in _CONFLICTS or (isinstance(number, int) and number in _CONFLICTS)
    return known or locked


def is_outage(error: BaseException) -> bool:
    """Whether the database is away, or has no connection to spare: nobody's fault."""
    if isinstance(error, exc.DBAPIError) and _state(error) == _STANDBY:
        return True
    if isinstance(error, (exc.OperationalError, exc.InterfaceError, exc.TimeoutError)):
        return not is_conflict(error)
    return isinstance(error, exc.DBAPIError) and error.connection_invalidated


@contextlib.contextmanager
def translated(engine: Engine) -> Iterator[None]:
    """Raises what a database says as ours: an outage, or a table that is not there."""
    try:
        with tables_there(engine):
            yield
    except exc.SQLAlchemyError as error:
        if is_outage(error) or is_conflict(error):
            raise OutboxUnavailableError(
                f"the outbox's database {_place(engine)} is away: {_cause(error)}"
            ) from error
        raise


@contextlib.contextmanager
def tables_there(bind: Engine | Connection) -> Iterator[None]:
    """Says what to do about a table that is not there."""
    try:
        yield
    except exc.DBAPIError as error:
        if not _no_table(error):
            raise
        raise ConfigurationError(
            f"the outbox's tables are not in {_place(bind.engine)} as they must be; run 'celery -A "
            f"… jetstream outbox init', or your migrations: {_cause(error)}"
        ) from error


def _place(engine: Engine) -> str:
    """The URL without credentials; drivers take a password in the query, too."""
    place = engine.url.set(query={})
    return repr(place._replace(username=None, password=None))


def _state(error: exc.DBAPIError) -> str | None:
    """The SQLSTATE, where the driver tells; psycopg2 has its own name for it."""
    return getattr(error.orig, "sqlstate", None) or getattr(error.orig, "pgcode", None)


def _no_table(error: exc.DBAPIError) -> bool:
    text = str(error.orig).lower()
    return isinstance(error, (exc.ProgrammingError, exc.OperationalError)) and (
        "no such table" in text
        or "no such column" in text
        or "doesn't exist" in text
        or "unknown column" in text
        or _state(error) in ("42P01", "42703")
    )


def _cause(error: exc.SQLAlchemyError) -> str:
    """What the driver said, without the statement and its values."""
    lines = str(getattr(error, "orig", None) or error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


# -- engines ---------------------------------------------------------------------------------------


def _own_engine(url: str) -> Engine:
    try:
        parsed = make_url(url)
    except (ValueError, exc.ArgumentError):  # which show parts of it, or all
        raise ConfigurationError(
            f"jetstream_database_url={masked(url)} is not a URL: letters such as / and @ in a "
            "password are written as %2F and %40",
            setting="jetstream_database_url",
        ) from None
    driver = parsed.get_driver_name()
    options: dict[str, Any] = {"connect_args": _CONNECT_ARGS.get(driver, {})}
    options["hide_parameters"] = True  # headers and bodies are nothing for a log
    if parsed.get_backend_name() != "sqlite":
        options |= {"pool_size": 2, "max_overflow": 8, "pool_timeout": 30, "pool_pre_ping": True}
    try:
        engine = create_engine(parsed, **options)
    except (ImportError, exc.ArgumentError) as error:
        raise ConfigurationError(
            f"jetstream_database_url={masked(url)} cannot be used: {error}; install its driver, or "
            "name another one",
            setting="jetstream_database_url",
        ) from error
    if parsed.get_backend_name() == "sqlite":
        event.listen(engine, "connect", _set_wal)
    return engine


def _set_wal(connection: Any, _: Any) -> None:
    """Readers and the one writer do not wait for each other (kept in the file)."""
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.close()


def _engine_of(factory: Any, table: Table) -> Engine:
    made = _imported("session_factory", factory) if isinstance(factory, str) else factory
    made = getattr(made, "session_factory", made)  # of a scoped_session: not the one in use
    shown = f"jetstream_session_factory={masked(factory)}"
    try:
        bind = made().get_bind(clause=table)
    except (AttributeError, TypeError, exc.SQLAlchemyError) as error:
        raise ConfigurationError(
            f"{shown} gives no session with one engine ({error}); give a sessionmaker with bind=, "
            "or set jetstream_database_url",
            setting="jetstream_session_factory",
        ) from error
    engine: Engine = bind.engine
    if engine.dialect.is_async:
        raise ConfigurationError(
            f"{shown} has an asynchronous driver, and Celery's tasks are not asynchronous; set "
            "jetstream_database_url with another driver",
            setting="jetstream_session_factory",
        )
    return engine


def _imported(setting: str, name: str) -> Any:
    try:
        return symbol_by_name(name)
    except Exception as error:  # importing runs code, which may raise anything
        raise ConfigurationError(
            f"jetstream_{setting}={name!r} cannot be imported: {error!r}",
            setting=f"jetstream_{setting}",
        ) from error


# -- forks -----------------------------------------------------------------------------------------

_databases: weakref.WeakSet[Database] = weakref.WeakSet()
_inherited: list[object] = []


def _forget_in_child() -> None:
    """In a forked child the parent's connections are left as they are, for ever."""
    for database in list(_databases):
        _inherited.append(database._engine)
        database._engine, database._lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
