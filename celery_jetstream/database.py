"""The database of outbox and inbox: an engine of ours, or the one behind your sessions.

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
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

from kombu.utils.imports import symbol_by_name
from sqlalchemy import Connection, Engine, Table, create_engine, event, exc
from sqlalchemy.engine import make_url
from sqlalchemy.orm import Session, sessionmaker

from .config import Config
from .exceptions import (
    ConfigurationError,
    DatabaseUnavailableError,
    InboxUnavailableError,
    OutboxUnavailableError,
)
from .readers import masked

__all__ = (
    "Database",
    "Engines",
    "again",
    "is_autocommit",
    "is_away",
    "is_conflict",
    "is_outage",
    "mapped_table",
)

logger = logging.getLogger(__name__)

T = TypeVar("T")
TablesT = TypeVar("TablesT", bound=Iterable[Table])

#: Seconds to wait for a connection, and for a lock on SQLite.
CONNECT_TIMEOUT = 5
SQLITE_TIMEOUT = 30
#: How often a statement that lost against another transaction is tried.
TRIES = 6

_UNAVAILABLE: dict[str, type[DatabaseUnavailableError]] = {
    "outbox": OutboxUnavailableError,
    "inbox": InboxUnavailableError,
}
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
_CONFLICTS = {"40001", "40P01", "55P03", 1205, 1213, 1020, 3572}
#: What says that a server is away, goes, comes, or has no connection to spare.
_AWAY_STATES = ("08", "57P01", "57P02", "57P03", "53300", "25006")
_AWAY_NUMBERS = {1040, 1053, 1203, 1226, 1927, 2002, 2003, 2006, 2013, 2055, 4031}
#: PostgreSQL where only reading is allowed: the other server has taken over.
_STANDBY = "25006"


class Engines:
    """Where one process's engines come from; thread-safe, and a forked child begins anew.

    Args:
        config: the settings.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._own: Engine | None = None
        self._of_tables: dict[Table, Engine] = {}
        self._lock = threading.Lock()
        _all_engines.add(self)

    def engine(self, table: Table) -> Engine:
        """Ours for ``database_url``, else that of ``session_factory`` for a table.

        Raises:
            ConfigurationError: neither can be used.
        """
        url = self._config.database_url
        with self._lock:
            if url is None:
                if table not in self._of_tables:
                    self._of_tables[table] = _engine_of(self._config.session_factory, table)
                return self._of_tables[table]
            if self._own is None:
                self._own = _own_engine(url)
            return self._own

    def sessions(self, table: Table) -> Callable[[], Session]:
        """What makes sessions for handlers: ``session_factory``, else one of our own engine.

        Raises:
            ConfigurationError: its sessions are asynchronous, or have no engine.
        """
        factory = self._config.session_factory
        if factory is None:
            return sessionmaker(self.engine(table))
        _engine_of(factory, table)
        return _sessionmaker(factory)

    def close(self) -> None:
        """Closes the connections of an engine of ours."""
        with self._lock:
            engine, self._own = self._own, None
            self._of_tables.clear()
        if engine is not None:
            engine.dispose()


class Database(Generic[TablesT]):
    """The database of the outbox, or of the inbox, as one process sees it. Thread-safe.

    Args:
        engines: the process's.
        name: ``outbox`` or ``inbox``: as messages, and the command that makes the tables, have it.
        tables: its tables; the first says which engine is meant.
    """

    def __init__(self, engines: Engines, name: str, tables: TablesT) -> None:
        self.engines = engines
        self.name = name
        self.tables = tables

    @property
    def engine(self) -> Engine:
        """The engine that statements of our own use.

        Raises:
            ConfigurationError: there is none that can be used.
        """
        return self.engines.engine(next(iter(self.tables)))

    @contextlib.contextmanager
    def statements(self) -> Iterator[Connection]:
        """A connection on which every statement is a transaction.

        Raises:
            DatabaseUnavailableError: the database is away.
        """
        engine = self.engine
        with self.translated(engine), engine.connect() as connection:
            yield connection.execution_options(isolation_level="AUTOCOMMIT")

    def transaction(self, work: Callable[[Connection], T]) -> T:
        """Does ``work(connection)`` in one transaction; again where it lost against another.

        Raises:
            DatabaseUnavailableError: the database is away.
        """
        engine = self.engine

        def attempt() -> T:
            with engine.begin() as connection:
                return work(connection)

        with self.translated(engine):
            return again(attempt)

    @contextlib.contextmanager
    def translated(self, bind: Engine | Connection) -> Iterator[None]:
        """Raises what a database says as ours: an outage, or a table that is not there.

        Raises:
            DatabaseUnavailableError: an outage, or a conflict that was lost.
        """
        try:
            with self.tables_there(bind):
                yield
        except exc.SQLAlchemyError as error:
            if is_outage(error) or is_conflict(error):
                raise _UNAVAILABLE[self.name](
                    f"the {self.name}'s database {_place(bind.engine)} is away: {_cause(error)}"
                ) from error
            raise

    @contextlib.contextmanager
    def tables_there(self, bind: Engine | Connection) -> Iterator[None]:
        """Says what to do about a table that is not there."""
        try:
            yield
        except exc.DBAPIError as error:
            if not _no_table(error):
                raise
            raise ConfigurationError(
                f"the {self.name}'s tables are not in {_place(bind.engine)} as they must be; run "
                f"'celery -A … jetstream {self.name} init', or your migrations: {_cause(error)}"
            ) from error


def mapped_table(config: Config, name: str, default: Callable[..., type[Any]]) -> Table:
    """The table of the outbox's or the inbox's model: the user's, else the default one's.

    Raises:
        ConfigurationError: ``jetstream_{name}_model`` is no mapped class.
    """
    model = getattr(config, f"{name}_model")
    if isinstance(model, str):
        model = _imported(f"{name}_model", model)
    if model is None:
        model = default(getattr(config, f"{name}_table"), getattr(config, f"{name}_schema"))
    table = getattr(model, "__table__", None)
    if not isinstance(table, Table):
        raise ConfigurationError(
            f"jetstream_{name}_model={model!r} is no mapped class; derive one from "
            f"{name.capitalize()}Mixin",
            setting=f"jetstream_{name}_model",
        )
    return table


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
    locked = "database is locked" in str(error.orig) or "table is locked" in str(error.orig)
    return locked or _state(error) in _CONFLICTS or _number(error) in _CONFLICTS


def is_outage(error: BaseException) -> bool:
    """Whether the database is away, or has no connection to spare: nobody's fault."""
    if isinstance(error, exc.DBAPIError) and _state(error) == _STANDBY:
        return True
    if isinstance(error, (exc.OperationalError, exc.InterfaceError, exc.TimeoutError)):
        return not is_conflict(error)
    return isinstance(error, exc.DBAPIError) and error.connection_invalidated


def is_away(error: BaseException) -> bool:
    """Whether the database is surely away, whatever the statement was.

    For statements of users': to them, some drivers tell a column that is not there by the same
    class of error as a server that is gone.
    """
    if isinstance(error, exc.TimeoutError):  # no connection to be had of the pool
        return True
    if not isinstance(error, exc.DBAPIError) or is_conflict(error):
        return False
    state, number = _state(error), _number(error)
    if error.connection_invalidated or number in _AWAY_NUMBERS:
        return True
    if state is not None:
        return state.startswith(_AWAY_STATES)
    # a driver of PostgreSQL's that lost its connection has no state to tell
    silent = hasattr(error.orig, "sqlstate") or hasattr(error.orig, "pgcode")
    return silent and isinstance(error, exc.OperationalError)


def is_autocommit(connection: Connection) -> bool:
    """Whether each statement is its own transaction: no COMMIT will follow."""
    level = connection.get_execution_options().get("isolation_level")
    if level is None:  # as the engine was created; SQLAlchemy has no public name for that
        level = getattr(connection.dialect, "_on_connect_isolation_level", None)
    return bool(level == "AUTOCOMMIT")


def _place(engine: Engine) -> str:
    """The URL without credentials; drivers take a password in the query, too."""
    place = engine.url.set(query={})
    return repr(place._replace(username=None, password=None))


def _state(error: exc.DBAPIError) -> str | None:
    """The SQLSTATE, where the driver tells; psycopg2 has its own name for it."""
    return getattr(error.orig, "sqlstate", None) or getattr(error.orig, "pgcode", None)


def _number(error: exc.DBAPIError) -> int | None:
    """MySQL's number of an error."""
    first = error.orig.args[0] if error.orig is not None and error.orig.args else None
    return first if isinstance(first, int) else None


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
        options["isolation_level"] = "READ COMMITTED"  # as PostgreSQL has it: no locks on gaps
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


def _sessionmaker(factory: Any) -> Callable[[], Session]:
    made = _imported("session_factory", factory) if isinstance(factory, str) else factory
    found: Callable[[], Session] = getattr(made, "session_factory", made)
    return found  # of a scoped_session: not the one in use


def _engine_of(factory: Any, table: Table) -> Engine:
    made = _sessionmaker(factory)
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

_all_engines: weakref.WeakSet[Engines] = weakref.WeakSet()
_inherited: list[object] = []


def _forget_in_child() -> None:
    """In a forked child the parent's connections are left as they are, for ever."""
    for engines in list(_all_engines):
        _inherited.append(engines._own)
        engines._own, engines._lock = None, threading.Lock()
        engines._of_tables.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
