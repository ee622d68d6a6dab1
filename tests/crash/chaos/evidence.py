"""What became of the events: asked of the databases, the stream and Redis."""

from __future__ import annotations

from collections import Counter
from typing import Any

import redis
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from celery_jetstream.exceptions import NotConnectedError
from tests.crash.chaos.account import DeadLetter, Found
from tests.crash.chaos.chain import Chain

__all__ = ("Evidence",)


class Evidence:
    """Asks the servers of a chain, which may be away."""

    def __init__(self, chain: Chain) -> None:
        self._chain = chain

    def effects_so_far(self) -> int:
        """Cheap, for it is asked often; -1 where the database does not answer."""
        try:
            return int(self._scalar("bank", "SELECT coalesce(max(id), 0) FROM effects"))
        except SQLAlchemyError:
            return -1

    def behind(self) -> int:
        """How many events have been written and not handled, about; 0 where none can say."""
        try:
            written = self._scalar("shop", "SELECT count(*) FROM orders")
            return int(written - self._scalar("bank", "SELECT count(*) FROM effects"))
        except SQLAlchemyError:
            return 0

    def moments(self, table: str) -> list[tuple[str, float]]:
        """The events of orders or effects, and when: seconds since 1970, oldest first."""
        database = "shop" if table == "orders" else "bank"
        query = f"SELECT event_id, extract(epoch FROM at) FROM {table} ORDER BY at"
        return [(event_id, float(at)) for event_id, at in self._rows(database, query)]

    def found(self) -> Found | None:
        """All that there is; None where a server does not answer."""
        try:
            return self._found()
        except (SQLAlchemyError, NotConnectedError, redis.RedisError, KeyError):
            return None

    def _found(self) -> Found:
        outbox = "SELECT event_id, status FROM jetstream_outbox"
        leased = "SELECT count(*) FROM jetstream_outbox_buckets WHERE until > now()"
        consumer = self._chain.consumer()
        return Found(
            orders=dict(self._rows("shop", "SELECT event_id, kind FROM orders")),
            outbox=dict(self._rows("shop", outbox)),
            effects=Counter(e for (e,) in self._rows("bank", "SELECT event_id FROM effects")),
            inbox=dict(self._rows("bank", "SELECT event_id, status FROM jetstream_inbox")),
            passed_on={event_id for event_id, _ in self._rows("bank", outbox)},
            dead=[
                DeadLetter(
                    letter["context"]["event_id"],
                    letter["reason"],
                    letter["context"]["stream_sequence"],
                )
                for letter in self._chain.dead_letters()
            ],
            leases=self._scalar("shop", leased),
            holds=self._scalar("shop", "SELECT count(*) FROM jetstream_outbox_holds"),
            stored=self._chain.left(),
            consumer={name: consumer[name] for name in ("num_pending", "num_ack_pending")},
            queues=self._queues(),
        )

    def _queues(self) -> dict[str, int]:
        """Lengths of those that are not empty."""
        with redis.Redis.from_url(self._chain.servers.redis.url, socket_timeout=2) as client:
            queues = (
                self._chain.settings["task_default_queue"],
                self._chain.shop["task_default_queue"],
            )
            lengths = {queue: int(client.llen(queue)) for queue in queues}
            return {name: length for name, length in lengths.items() if length}

    def _rows(self, database: str, query: str) -> list[Any]:
        with self._chain.engines[database].connect() as connection:
            return [tuple(row) for row in connection.execute(text(query))]

    def _scalar(self, database: str, query: str) -> Any:
        return self._rows(database, query)[0][0]
