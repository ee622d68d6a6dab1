"""What the outbox's and the inbox's tables are made of, and the database's own clock.

Every time in these tables is the database's, never a worker's.
"""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

from sqlalchemy import (
    BigInteger,
    DateTime,
    Float,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    TypeDecorator,
    bindparam,
)
from sqlalchemy.dialects import mysql, postgresql
from sqlalchemy.engine import Dialect
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

from .exceptions import ConfigurationError

__all__ = (
    "BIG_ID",
    "BYTES",
    "ERROR_CAP",
    "IN_MYSQL",
    "IN_SQLITE",
    "LONG_TEXT",
    "UtcDateTime",
    "db_now",
    "kept",
    "metadata",
    "need_columns",
)

#: For Alembic's ``target_metadata``.
metadata = MetaData()

IN_SQLITE = {"sqlite_autoincrement": True}  # ids never come again
IN_MYSQL = {
    "mysql_engine": "InnoDB",
    "mysql_charset": "utf8mb4",
    "mysql_collate": "utf8mb4_bin",  # a key is its bytes: "A" is not "a"
    "mariadb_engine": "InnoDB",
    "mariadb_charset": "utf8mb4",
    "mariadb_collate": "utf8mb4_bin",
}
BIG_ID = BigInteger().with_variant(Integer(), "sqlite")
BYTES = LargeBinary().with_variant(mysql.LONGBLOB(), "mysql", "mariadb")
LONG_TEXT = Text().with_variant(mysql.MEDIUMTEXT(), "mysql", "mariadb")

#: Characters kept of an error, traceback and all.
ERROR_CAP = 4000


def kept(error: str) -> str:
    """What is kept of an error: no more than there is room for, and nothing but text."""
    return error[:ERROR_CAP].encode(errors="replace").decode().replace("\0", "")


def need_columns(setting: str, table: Table, mixin: type[Any]) -> None:
    """Looks whether a table of the user's has the columns of a mixin.

    Raises:
        ConfigurationError: some are missing; names them.
    """
    wanted = {name for name in mixin.__annotations__ if not name.startswith("__")}
    if missing := sorted(wanted - set(table.columns.keys())):
        raise ConfigurationError(
            f"{setting}: the table {table.name!r} lacks the columns {', '.join(missing)}; "
            f"derive the model from {mixin.__name__}",
            setting=setting,
        )


# -- time ------------------------------------------------------------------------------------------


class UtcDateTime(TypeDecorator[datetime]):
    """A moment with microseconds, aware of UTC in Python whatever the database keeps."""

    impl = DateTime
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> Any:  # noqa: D102
        if dialect.name == "postgresql":
            return dialect.type_descriptor(postgresql.TIMESTAMP(timezone=True))
        if dialect.name in ("mysql", "mariadb"):
            return dialect.type_descriptor(mysql.DATETIME(fsp=6))
        return dialect.type_descriptor(DateTime())

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: D102
        if value is None:
            return None
        moment = value.astimezone(timezone.utc)
        return moment if dialect.name == "postgresql" else moment.replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: D102
        if value is None:
            return None
        return value.replace(tzinfo=timezone.utc) if value.tzinfo is None else value


class db_now(FunctionElement[datetime]):  # noqa: N801 - a function in SQL
    """The database's clock, so many seconds from now (milliseconds count)."""

    type = UtcDateTime()
    inherit_cache = True

    def __init__(self, seconds: Any = 0.0) -> None:
        if isinstance(seconds, (int, float)):
            seconds = bindparam(None, round(float(seconds), 3), type_=Float)
        super().__init__(seconds)


@compiles(db_now, "postgresql")
def _postgresql_now(element: db_now, compiler: Any, **options: Any) -> str:
    # statement_timestamp(): now() is the transaction's, clock_timestamp() can use no index
    return (
        f"(statement_timestamp() + make_interval(secs => "
        f"CAST({compiler.process(element.clauses, **options)} AS double precision)))"
    )


@compiles(db_now, "mysql", "mariadb")
def _mysql_now(element: db_now, compiler: Any, **options: Any) -> str:
    return f"(UTC_TIMESTAMP(6) + INTERVAL {compiler.process(element.clauses, **options)} SECOND)"


@compiles(db_now, "sqlite")
def _sqlite_now(element: db_now, compiler: Any, **options: Any) -> str:
    seconds = compiler.process(element.clauses, **options)
    return f"(strftime('%Y-%m-%d %H:%M:%f', 'now', {seconds} || ' seconds') || '000')"
