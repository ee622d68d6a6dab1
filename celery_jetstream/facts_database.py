"""What the doctor finds out about the database of outbox and inbox. Reads only."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from typing import Any, TypeVar

from sqlalchemy import Connection, Table, exc, select, text

from .facts import Clock, DatabaseFacts, OldTransaction, TableFacts, Unknown
from .sqltypes import db_now

__all__ = ("look",)

T = TypeVar("T")

#: How many open transactions are told of.
MOST = 5


def look(jetstream: Any, uses_inbox: bool, found: dict[str, Any]) -> None:
    """Puts what it learns into ``found``, under the names that :class:`.Facts` has for it.

    Blocks as the database does: call it in a thread of its own.

    Raises:
        CeleryJetStreamError: the database is away, or cannot be used.
    """
    config = jetstream.config
    needs_outbox = config.use_outbox or not uses_inbox
    found["outbox"] = _box(jetstream.outbox, needs_outbox)
    found["inbox"] = _box(jetstream.inbox, uses_inbox)
    database = jetstream.outbox.database
    with database.statements() as connection:
        found["database clock"] = _clock(connection)
        tables = (*database.tables, *jetstream.inbox.database.tables)
        found["database"] = _server(connection, tables)


def _box(box: Any, needed: bool) -> dict[str, Any]:
    """As its ``status``; not ``used`` where it is not asked for, and none of it is there."""
    status = dict(box.status())
    missing = [fault for fault in status["differences"] if fault.startswith("table ")]
    status["used"] = needed or len(missing) < sum(1 for _ in box.database.tables)
    return status


def _clock(connection: Connection) -> Clock | Unknown:
    if connection.dialect.name == "sqlite":
        return Unknown("SQLite has this host's clock")
    connection.scalar(select(db_now()))  # the first has a connection to make
    before = time.time()
    moment = connection.scalars(select(db_now())).one().timestamp()
    after = time.time()
    return Clock(ahead=moment - (before + after) / 2, within=(after - before) / 2)


# -- servers ---------------------------------------------------------------------------------------


def _server(connection: Connection, tables: Iterable[Table]) -> DatabaseFacts:
    kind = connection.dialect.name
    if kind == "postgresql":
        return _postgresql(connection, tables)
    return _mysql(connection, kind) if kind in ("mysql", "mariadb") else _sqlite(connection)


def _sqlite(connection: Connection) -> DatabaseFacts:
    names = ("journal_mode", "synchronous")
    return DatabaseFacts(
        kind="sqlite",
        version=str(connection.scalar(text("SELECT sqlite_version()"))),
        durability={name: str(connection.scalar(text(f"PRAGMA {name}"))) for name in names},
    )


# -- PostgreSQL ------------------------------------------------------------------------------------

_PG_TABLES = """
SELECT s.n_live_tup AS live, s.n_dead_tup AS dead, c.reloptions AS options
FROM pg_stat_user_tables s JOIN pg_class c ON c.oid = s.relid
WHERE s.relid = to_regclass(:name)
"""
#: What keeps dead rows of this database from being removed; without anybody's statements.
_PG_OLD = """
SELECT 'the transaction of ' || coalesce(usename, '?') || ' (' || coalesce(state, backend_type)
  || coalesce(', application_name ' || nullif(application_name, ''), '') || ', pid ' || pid || ')',
  extract(epoch FROM clock_timestamp() - xact_start)
FROM pg_stat_activity
WHERE xact_start IS NOT NULL AND datname = current_database() AND pid <> pg_backend_pid()
  AND backend_type <> 'autovacuum worker'
UNION ALL
SELECT 'the prepared transaction ' || gid, extract(epoch FROM clock_timestamp() - prepared)
FROM pg_prepared_xacts WHERE database = current_database()
ORDER BY 2 DESC LIMIT :most
"""
_PG_HIDDEN = """
SELECT count(*) FROM pg_stat_activity
WHERE datname = current_database() AND query = '<insufficient privilege>'
"""


def _postgresql(connection: Connection, tables: Iterable[Table]) -> DatabaseFacts:
    names = ("fsync", "full_page_writes", "synchronous_commit")
    return DatabaseFacts(
        kind="postgresql",
        version=_setting(connection, "server_version"),
        durability={name: _setting(connection, name) for name in names},
        read_only=bool(connection.scalar(text("SELECT pg_is_in_recovery()"))),
        autovacuum=_setting(connection, "autovacuum") == "on",
        tables=tuple(t for table in tables for t in _pg_table(connection, table)),
        transactions=_transactions(connection, _PG_OLD),
        hidden=int(connection.scalar(text(_PG_HIDDEN)) or 0),
    )


def _setting(connection: Connection, name: str) -> str:
    return str(connection.scalar(text("SELECT current_setting(:name)"), {"name": name}))


def _pg_table(connection: Connection, table: Table) -> Iterable[TableFacts]:
    quoted = connection.dialect.identifier_preparer.format_table(table)
    row = connection.execute(text(_PG_TABLES), {"name": quoted}).first()
    if row is not None:
        off = "autovacuum_enabled=(false|off|no|0)"
        on = not any(re.fullmatch(off, option) for option in row.options or ())
        yield TableFacts(name=table.fullname, live=row.live, dead=row.dead, autovacuum=on)


# -- MariaDB and MySQL -----------------------------------------------------------------------------

_MY_OLD = """
SELECT concat('the transaction of connection ', trx_mysql_thread_id, ' (', lower(trx_state), ')'),
  timestampdiff(SECOND, trx_started, now())
FROM information_schema.innodb_trx WHERE trx_mysql_thread_id <> connection_id()
ORDER BY 2 DESC LIMIT :most
"""
_MY_HISTORY = """
SELECT count FROM information_schema.innodb_metrics WHERE name = 'trx_rseg_history_len'
"""


def _mysql(connection: Connection, kind: str) -> DatabaseFacts:
    names = ("innodb_flush_log_at_trx_commit", "sync_binlog")
    return DatabaseFacts(
        kind=kind,
        version=str(connection.scalar(text("SELECT version()"))),
        durability={name: str(connection.scalar(text(f"SELECT @@{name}"))) for name in names},
        read_only=bool(connection.scalar(text("SELECT @@read_only"))),
        transactions=_transactions(connection, _MY_OLD),
        history=_history(connection),
    )


def _history(connection: Connection) -> int | None:
    """MariaDB tells everybody, MySQL those with the PROCESS privilege."""
    asked = text("SHOW GLOBAL STATUS LIKE 'Innodb_history_list_length'")
    if (row := connection.execute(asked).first()) is not None:
        return int(row[1])
    try:
        found = connection.scalar(text(_MY_HISTORY))
    except exc.DBAPIError:
        return None
    return None if found is None else int(found)


def _transactions(connection: Connection, query: str) -> tuple[OldTransaction, ...] | Unknown:
    try:
        rows = connection.execute(text(query), {"most": MOST}).all()
    except exc.DBAPIError as error:
        if error.connection_invalidated:
            raise
        said = str(error.orig).splitlines()[0]
        return Unknown(f"the database's user may not see transactions ({said}): GRANT PROCESS")
    return tuple(OldTransaction(what=str(what), seconds=float(age)) for what, age in rows)
