"""Outbox and inbox in a database: made, written as SQL, and compared with what is needed.

``create_…`` and ``drop_…`` are for Alembic's revisions::

    def upgrade() -> None:
        create_outbox(op.get_bind())
        create_inbox(op.get_bind())
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterable, Iterator
from typing import Any

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Connection,
    Index,
    Inspector,
    Integer,
    LargeBinary,
    Table,
    Text,
    exc,
    insert,
    inspect,
    select,
    text,
)
from sqlalchemy.engine import Dialect
from sqlalchemy.schema import CreateColumn, CreateIndex, CreateTable

from .database import TRIES, Database, is_conflict
from .exceptions import ConfigurationError
from .models import AT_ONCE, BUCKETS, InboxMessage, OutboxEvent, Tables
from .sqltypes import UtcDateTime

__all__ = (
    "create_inbox",
    "create_outbox",
    "create_tables",
    "ddl",
    "differences",
    "drop_inbox",
    "drop_outbox",
)

HOW = "run 'celery -A … jetstream outbox init' (or 'inbox init'), or your migrations"
#: Bytes that go into a type of MySQL's without a length of its own.
_ROOM = {
    **dict.fromkeys(("TINYTEXT", "TINYBLOB"), 2**8 - 1),
    **dict.fromkeys(("TEXT", "BLOB"), 2**16 - 1),
    **dict.fromkeys(("MEDIUMTEXT", "MEDIUMBLOB"), 2**24 - 1),
}
#: What a database says where another one makes the same at the same time.
_RACE = ("already exist", "duplicate", "concurrently", "has changed")


# -- made ------------------------------------------------------------------------------------------


def create_outbox(bind: Connection, model: type[Any] = OutboxEvent) -> None:
    """Creates what an outbox lacks of its tables, indexes and rows of buckets.

    Args:
        bind: in a revision ``op.get_bind()``; never commits.
        model: yours, or ``outbox_model("name", "schema")``; the default one's else.
    """
    _create(_connection(bind, "outbox"), Tables.of(model.__table__))


def create_inbox(bind: Connection, model: type[Any] = InboxMessage) -> None:
    """Creates what an inbox lacks of its table and index.

    Args:
        bind: in a revision ``op.get_bind()``; never commits.
        model: yours, or ``inbox_model("name", "schema")``; the default one's else.
    """
    _create(_connection(bind, "inbox"), (model.__table__,))


def drop_outbox(bind: Connection, model: type[Any] = OutboxEvent) -> None:
    """Drops an outbox's tables, with all that has not been published; for ``downgrade()``."""
    for table in Tables.of(model.__table__):
        table.drop(bind, checkfirst=True)


def drop_inbox(bind: Connection, model: type[Any] = InboxMessage) -> None:
    """Drops an inbox's table: what comes again then is handled again; for ``downgrade()``."""
    model.__table__.drop(bind, checkfirst=True)


def _connection(bind: Any, name: str) -> Connection:
    if isinstance(bind, Connection):
        return bind
    raise TypeError(
        f"a connection is needed, not {bind!r}; without one (alembic upgrade --sql) take the "
        f"SQL of 'celery -A … jetstream {name} init --sql'"
    )


def create_tables(database: Database[Any]) -> None:
    """Creates what is missing, however many do so at once.

    Raises:
        ConfigurationError: there is no such schema, or this user may not create tables.
        DatabaseUnavailableError: the database is away.
    """
    engine = database.engine
    with database.translated(engine):
        for attempt in range(TRIES):
            try:
                with engine.begin() as connection:
                    _need_schema(connection, database)
                    _create(connection, database.tables)
                return
            except exc.DBAPIError as error:
                if _is_forbidden(error):
                    raise ConfigurationError(
                        f"the database's user may not create the tables ({error.orig}); have it "
                        f"done with the SQL of 'celery -A … jetstream {database.name} init --sql'"
                    ) from error
                if not _is_race(error) or attempt == TRIES - 1:
                    raise
            time.sleep(random.uniform(0, 0.05 * 2**attempt))


def _create(connection: Connection, tables: Iterable[Table]) -> None:
    for table in tables:
        table.create(connection, checkfirst=True)
        for index in sorted(table.indexes, key=_name):  # of a table that was there already
            index.create(connection, checkfirst=True)
    if isinstance(tables, Tables):
        present = set(connection.scalars(select(tables.buckets.c.bucket)))
        missing = [row for row in _bucket_rows() if row["bucket"] not in present]
        if missing:
            connection.execute(insert(tables.buckets), missing)


def _need_schema(connection: Connection, database: Database[Any]) -> None:
    schema, setting = next(iter(database.tables)).schema, f"jetstream_{database.name}_schema"
    if schema is not None and schema not in inspect(connection).get_schema_names():
        raise ConfigurationError(
            f"{setting}={schema!r} is not in the database; an administrator makes "
            f"it: CREATE SCHEMA {schema}",
            setting=setting,
        )


def _is_race(error: exc.DBAPIError) -> bool:
    """Whether another has made the same at the same time: a table, an index, the buckets' rows."""
    if isinstance(error, exc.IntegrityError) or is_conflict(error):
        return True
    said = str(error.orig).lower()
    return any(words in said for words in _RACE)


def _is_forbidden(error: exc.DBAPIError) -> bool:
    """By PostgreSQL's SQLSTATE, or MySQL's numbers for a command or a database."""
    number = error.orig.args[0] if error.orig is not None and error.orig.args else None
    return getattr(error.orig, "sqlstate", None) == "42501" or number in (1044, 1142)


def _bucket_rows() -> list[dict[str, Any]]:
    return [{"bucket": bucket, "owner": "", "until": AT_ONCE} for bucket in range(BUCKETS)]


def ddl(dialect: Dialect, tables: Iterable[Table]) -> str:
    """The SQL that makes the tables in an empty database."""
    statements: list[Any] = []
    for table in tables:
        statements.append(CreateTable(table))
        statements += map(CreateIndex, sorted(table.indexes, key=_name))
    compiled = [str(statement.compile(dialect=dialect)).strip() for statement in statements]
    if isinstance(tables, Tables):
        rows = insert(tables.buckets).values(_bucket_rows())
        compiled.append(str(rows.compile(dialect=dialect, compile_kwargs={"literal_binds": True})))
    return "".join(f"{statement};\n\n" for statement in compiled).rstrip() + "\n"


# -- compared --------------------------------------------------------------------------------------


def differences(connection: Connection, tables: Iterable[Table], body_size: int = 0) -> list[str]:
    """What in the database is not as it must be, each in words to act on; empty where all is.

    Args:
        connection: to the database.
        tables: what is needed.
        body_size: bytes that an outbox's body must be able to have.
    """
    inspector = inspect(connection)
    return [
        fault
        for table in tables
        for fault in _Comparison(connection, inspector, table, body_size).faults()
    ]


class _Comparison:
    """One table, as it is and as it must be."""

    def __init__(
        self, connection: Connection, inspector: Inspector, table: Table, body_size: int
    ) -> None:
        self._connection = connection
        self._inspector = inspector
        self._table = table
        self._dialect: Dialect = connection.dialect
        self._where: dict[str, Any] = {"table_name": table.name, "schema": table.schema}
        self._room = {"body": body_size, "headers": body_size, "last_error": 16_000}

    def faults(self) -> Iterator[str]:
        if not self._inspector.has_table(**self._where):
            yield f"table {self._table.fullname} is missing: {HOW}"
            return
        yield from self._columns()
        yield from self._indexes()
        yield from self._checks()
        if self._dialect.name in ("mysql", "mariadb"):
            yield from self._collations()

    # -- columns ---------------------------------------------------------------------------------

    def _columns(self) -> Iterator[str]:
        found = {column["name"]: column for column in self._inspector.get_columns(**self._where)}
        for column in self._table.columns:
            there = found.pop(column.name, None)
            if there is None:
                spec = CreateColumn(column).compile(dialect=self._dialect)
                yield f"{self._named(column)} is missing: ALTER TABLE … ADD COLUMN {spec}"
                continue
            if not column.primary_key and there["nullable"] != column.nullable:
                yield f"{self._named(column)} must {'' if column.nullable else 'not '}allow NULL"
            if not self._fits(column, there["type"]):
                needed = column.type.compile(self._dialect)
                yield f"{self._named(column)} is {there['type']!r} and must be {needed}"
        for name, there in found.items():
            if not there["nullable"] and there["default"] is None and not there.get("computed"):
                yield (
                    f"column {self._table.fullname}.{name} is none of ours and must have a value: "
                    "give it a default, or drop it"
                )

    def _named(self, column: Column[Any]) -> str:
        return f"column {self._table.fullname}.{column.name}"

    def _fits(self, column: Column[Any], found: Any) -> bool:
        kind, needed = self._dialect.name, column.type
        if kind == "sqlite":
            return True  # it keeps what it is given, whatever the type is called
        if isinstance(needed, UtcDateTime):
            return bool(found.timezone if kind == "postgresql" else _decimals(found) == 6)
        if isinstance(needed, Integer):
            return isinstance(found, BigInteger if isinstance(needed, BigInteger) else Integer)
        if isinstance(needed, (Text, LargeBinary)):
            return self._room_in(found) >= self._room.get(column.name, 0)
        length = getattr(needed, "length", None)
        return length is None or self._room_in(found) >= length

    def _room_in(self, found: Any) -> float:
        """Characters or bytes."""
        if (length := getattr(found, "length", None)) is not None:
            return float(length)
        name = type(found).__name__.upper() if self._dialect.name != "postgresql" else ""
        return _ROOM.get(name, float("inf"))

    # -- the rest --------------------------------------------------------------------------------

    def _indexes(self) -> Iterator[str]:
        found: list[tuple[list[Any], bool]] = [
            (list(index["column_names"]), bool(index["unique"]))
            for index in self._inspector.get_indexes(**self._where)
        ]
        found += [
            (list(unique["column_names"]), True)
            for unique in self._inspector.get_unique_constraints(**self._where)
        ]
        for index in sorted(self._table.indexes, key=_name):
            if not _is_among(index, found):
                sql = " ".join(str(CreateIndex(index).compile(dialect=self._dialect)).split())
                yield f"an index of {self._table.fullname} is missing (or not unique): {sql}"
        key = [column.name for column in self._table.primary_key.columns]
        there = self._inspector.get_pk_constraint(**self._where)["constrained_columns"]
        if key != there:
            yield f"the primary key of {self._table.fullname} must be ({', '.join(key)})"

    def _checks(self) -> Iterator[str]:
        found = [
            set(re.findall(r"\w+", check["sqltext"].lower()))
            for check in self._inspector.get_check_constraints(**self._where)
        ]
        for check in sorted(
            (c for c in self._table.constraints if isinstance(c, CheckConstraint)), key=_name
        ):
            sql = str(check.sqltext)
            words = set(re.findall(r"\w+", sql.lower())) - {"in", "is", "between", "and", "null"}
            if not any(words <= there for there in found):
                yield f"a check of {self._table.fullname} is missing: CHECK ({sql})"

    def _collations(self) -> Iterator[str]:
        """A key is its bytes; and without InnoDB there are no transactions."""
        where = {"name": self._table.name, "schema": self._table.schema}
        its = "table_name = :name AND table_schema = coalesce(:schema, database())"
        engine = f"SELECT engine FROM information_schema.tables WHERE {its}"
        if (found := self._ask(engine, where)[0][0]) != "InnoDB":
            yield f"table {self._table.fullname} is of engine {found} and must be of InnoDB"
        columns = (
            "SELECT column_name, collation_name FROM information_schema.columns "
            f"WHERE {its} AND collation_name IS NOT NULL ORDER BY ordinal_position"
        )
        for name, collation in self._ask(columns, where):
            if name in self._table.columns and collation != "utf8mb4_bin":
                yield (
                    f"column {self._table.fullname}.{name} has collation {collation} and must have "
                    "utf8mb4_bin"
                )

    def _ask(self, query: str, values: dict[str, Any]) -> list[Any]:
        return list(self._connection.execute(text(query), values))


def _is_among(index: Index, found: list[tuple[list[Any], bool]]) -> bool:
    wanted = [column.name for column in index.columns]
    if index.unique:
        return any(unique and columns == wanted for columns, unique in found)
    return any(columns[: len(wanted)] == wanted for columns, _ in found)


def _decimals(found: Any) -> int:
    return getattr(found, "fsp", None) or 0


def _name(named: Any) -> str:
    return str(named.name)
