"""Who flushes which part of the outbox: leases on buckets.

A key's events are all in one bucket, and only who holds its lease publishes them, so that their
order is kept however many flushers there are. Taking a lease touches no row of the outbox. A
flusher that is killed holds its buckets until the lease ends, by the database's clock.
"""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Collection

from sqlalchemy import Connection, bindparam, exc, insert, select, update

from .database import again, is_conflict
from .models import AT_ONCE, BUCKETS, Tables
from .sqltypes import db_now

__all__ = ("ALL_BUCKETS", "Lease")

ALL_BUCKETS = frozenset(range(BUCKETS))


class Lease:
    """Some buckets, held for a while by one run of a flusher (or a command)."""

    def __init__(self, tables: Tables, seconds: float) -> None:
        table = tables.buckets
        self.seconds = seconds
        self.buckets: frozenset[int] = frozenset()
        self._table = table
        self._owner = f"{socket.gethostname()[:32]}-{os.getpid()}-{secrets.token_hex(4)}"
        self._ends = 0.0
        mine = table.c.owner == self._owner
        self._held = select(table.c.bucket).where(mine, table.c.until > db_now())
        self._take = (
            update(table)
            .where(table.c.bucket.in_(bindparam("wanted", expanding=True)))
            .where((table.c.until <= db_now()) | mine)
            .values(owner=self._owner, until=db_now(seconds))
        )
        self._renew = update(table).where(mine, table.c.until > db_now())
        self._renew = self._renew.values(until=db_now(seconds))
        self._give_back = update(table).where(mine).values(owner="", until=AT_ONCE)

    @property
    def left(self) -> float:
        """Seconds for which it still holds, by our own clock, from before it was taken."""
        return self._ends - time.monotonic()

    def take(self, connection: Connection, wanted: Collection[int]) -> frozenset[int]:
        """Takes those of the wanted buckets that are free; returns all that it now holds."""
        start = time.monotonic()
        asked = sorted({*wanted, *self.buckets})
        try:
            held = frozenset(asked)
            if connection.execute(self._take, {"wanted": asked}).rowcount < len(asked):
                if self._complete(connection):
                    connection.execute(self._take, {"wanted": asked})
                held = frozenset(connection.scalars(self._held))
        except exc.DBAPIError as error:
            if not is_conflict(error):
                raise
            return self.buckets  # another one was taking them too
        self.buckets = held
        self._ends = start + self.seconds
        return self.buckets

    def renew(self, connection: Connection) -> bool:
        """Begins the time anew; False where a bucket has been lost (this process was stopped)."""
        start = time.monotonic()
        renewed = again(lambda: connection.execute(self._renew).rowcount)
        self._ends = start + self.seconds
        return renewed == len(self.buckets)

    def give_back(self, connection: Connection) -> None:
        """Lets others have them at once."""
        if self.buckets:
            self.buckets = frozenset()
            again(lambda: connection.execute(self._give_back))

    def _complete(self, connection: Connection) -> bool:
        """Adds the rows of buckets that the table lacks; whether there were any."""
        missing = ALL_BUCKETS - set(connection.scalars(select(self._table.c.bucket)))
        for bucket in missing:
            row = {"bucket": bucket, "owner": "", "until": AT_ONCE}
            try:
                connection.execute(insert(self._table), row)
            except exc.IntegrityError:
                continue  # added by another one meanwhile
        return bool(missing)
