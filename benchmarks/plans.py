"""How PostgreSQL and MariaDB find what a flush asks for, in a long backlog.

``python -m benchmarks.plans [--rows 1000000]``: so many rows are pending, and as many sent. Each
query is run under ``EXPLAIN ANALYZE``, once with statistics of the idle table (none was pending)
and once with new ones. Ends with 1 where a plan sorts the backlog, or reads more than it must.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, event, text

from celery_jetstream.rows import Rows
from celery_jetstream.testing import NatsServer
from tests.conftest import Names
from tests.databases import Database
from tests.flushing import Flushing
from tests.servers import MariaServer, PostgresServer

#: Rows of a batch, and what may be read besides: the sample is grouped, ids are looked up.
LIMIT = 1000
MOST = 4 * LIMIT

_COLUMNS = (
    "event_id, event_type, subject, ordering_key, bucket, on_failure, headers, body, status,"
    " attempts, due_at, created_at, finished_at"
)
#: Rows made by the database itself, which is 20 times as fast.
_FILL = {
    "postgresql": f"""
        INSERT INTO jetstream_outbox ({_COLUMNS})
        SELECT CAST(n AS text), 'order.paid', 'hub.sync.desk', 'k' || n % 1000, n % 64, 'park',
            '{{}}', convert_to(repeat('x', 300), 'UTF8'), CAST(:status AS text), 0,
            CAST(:due AS timestamptz) + n * CAST(:step AS interval), now(),
            CASE WHEN CAST(:status AS text) <> 'pending' THEN now() - n * interval '1 second' END
        FROM generate_series(:first, :last) AS n
    """,
    "mariadb": f"""
        INSERT INTO jetstream_outbox ({_COLUMNS})
        WITH RECURSIVE numbers AS (
            SELECT :first AS n UNION ALL SELECT n + 1 FROM numbers WHERE n < :last
        )
        SELECT n, 'order.paid', 'hub.sync.desk', concat('k', n % 1000), n % 64, 'park', '{{}}',
            repeat('x', 300), :status, 0, CAST(:due AS datetime(6)) + INTERVAL n * :step SECOND,
            utc_timestamp(6), IF(:status <> 'pending', utc_timestamp(6) - INTERVAL n SECOND, NULL)
        FROM numbers
    """,
}
_ANALYZE = {"postgresql": "ANALYZE jetstream_outbox", "mariadb": "ANALYZE TABLE jetstream_outbox"}
AT_ONCE, LONG_AGO, FUTURE = "1970-01-01 00:00:00", "2020-01-01 00:00:00", "2090-01-01 00:00:00"


@dataclass(frozen=True)
class Plan:
    """What one query did.

    Attributes:
        query: its name here.
        statistics: what the planner knew: ``idle`` or ``new``.
        indexes: those that it used.
        read: rows (index entries, where it needed no rows) that it looked at.
        sorted: rows that it sorted.
        milliseconds: how long it took, the second time.
    """

    query: str
    statistics: str
    indexes: tuple[str, ...]
    read: int
    sorted: int
    milliseconds: float

    def faults(self) -> list[str]:
        """What is wrong with it."""
        found = []
        if not self.indexes:
            found.append("it uses no index")
        if self.read > MOST:
            found.append(f"it reads {self.read} rows for {LIMIT}")
        if self.sorted > MOST:
            found.append(f"it sorts {self.sorted} rows")
        return [f"{self.query} ({self.statistics} statistics): {fault}" for fault in found]


def fill(flushing: Flushing, rows: int) -> None:
    """So many sent rows, and then statistics; then as many pending, and some for later."""
    _insert(flushing, "sent", 1, rows, AT_ONCE)
    analyze(flushing)
    _insert(flushing, "pending", rows + 1, 2 * rows, AT_ONCE)
    _insert(flushing, "pending", 2 * rows + 1, 2 * rows + 5000, LONG_AGO, step=1)
    _insert(flushing, "pending", 2 * rows + 5001, 2 * rows + 10_000, FUTURE, step=1)


def analyze(flushing: Flushing) -> None:
    """New statistics."""
    with flushing.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text(_ANALYZE[flushing.kind])).close()


def plans(flushing: Flushing, statistics: str) -> list[Plan]:
    """The plans of all that a flush, and the pruning, ask of the long table."""
    rows = flushing.flusher.rows
    every = frozenset(range(64))
    ids = [row.id for row in _first(flushing, rows)]
    queries: dict[str, Callable[[Connection], object]] = {
        "probe": lambda c: rows.probe(c, LIMIT),
        "probe without a subject": lambda c: rows.probe(c, LIMIT, {"stuck"}),
        "at_once": lambda c: rows.at_once(c, None, LIMIT),
        "at_once of half": lambda c: rows.at_once(c, set(range(32)), LIMIT),
        "at_once_ids": lambda c: rows.at_once_ids(c, None, LIMIT),
        "these": lambda c: rows.these(c, ids),
        "later": lambda c: rows.later(c, every, LIMIT),
        "sent": lambda c: rows.sent(c, ids, keep=True),
        "failures": lambda c: rows.failures(c, ids),
    }
    found = [_plan(flushing, name, statistics, run) for name, run in queries.items()]
    return [*found, _pruning(flushing, statistics)]


def _insert(
    flushing: Flushing, status: str, first: int, last: int, due: str, *, step: int = 0
) -> None:
    postgres = flushing.kind == "postgresql"
    with flushing.engine.begin() as connection:
        if not postgres:
            connection.execute(text("SET SESSION max_recursive_iterations = 100000000"))
        values = {
            "status": status,
            "first": first,
            "last": last,
            "due": f"{due}+00" if postgres else due,
            "step": f"{step} seconds" if postgres else step,
        }
        connection.execute(text(_FILL[flushing.kind]), values)


def _first(flushing: Flushing, rows: Rows) -> Any:
    with flushing.engine.connect() as connection:
        return rows.at_once(connection, None, LIMIT)


def _pruning(flushing: Flushing, statistics: str) -> Plan:
    """What finds the rows to be deleted."""
    with flushing.engine.connect() as connection, _noted(flushing.engine) as noted:
        flushing.outbox.prune(60, stop=lambda: len(noted) > 1)
        selects = [(s, p) for s, p in noted if "finished_at" in s and s.startswith("SELECT")]
        return _explained(connection, flushing.kind, "prune", statistics, *selects[0])


def _plan(
    flushing: Flushing, name: str, statistics: str, run: Callable[[Connection], object]
) -> Plan:
    with flushing.engine.connect() as connection, _noted(flushing.engine) as noted:
        run(connection)
        connection.rollback()
        return _explained(connection, flushing.kind, name, statistics, *noted[0])


def _explained(
    connection: Connection, kind: str, name: str, statistics: str, statement: str, values: Any
) -> Plan:
    postgres = kind == "postgresql"
    explain = "EXPLAIN (ANALYZE, FORMAT JSON) " if postgres else "ANALYZE FORMAT=JSON "
    answer = connection.exec_driver_sql(explain + statement, values).scalar_one()
    connection.rollback()
    start = time.perf_counter()
    connection.exec_driver_sql(statement, values)
    took = 1000 * (time.perf_counter() - start)
    connection.rollback()
    nodes = list(_nodes(answer if postgres else json.loads(answer)))
    read = _postgres if postgres else _maria
    return Plan(name, statistics, *read(nodes), took)


def _nodes(tree: Any) -> Iterator[dict[str, Any]]:
    if isinstance(tree, dict):
        yield tree
        tree = tree.values()
    elif not isinstance(tree, list):
        return
    for part in tree:
        yield from _nodes(part)


def _postgres(nodes: list[dict[str, Any]]) -> tuple[tuple[str, ...], int, int]:
    names = [node["Index Name"] for node in nodes if "Index Name" in node]
    read = sorted_rows = 0
    for node in nodes:
        rows = node.get("Actual Rows", 0) * node.get("Actual Loops", 1)
        if "Scan" in node.get("Node Type", "") and node["Node Type"] != "Subquery Scan":
            removed = sum(value for name, value in node.items() if name.startswith("Rows Removed"))
            read += rows + removed * node.get("Actual Loops", 1)
        if "Sort" in node.get("Node Type", ""):
            sorted_rows += _input(node)
    return tuple(names), int(read), int(sorted_rows)


def _input(node: dict[str, Any]) -> float:
    return float(sum(plan["Actual Rows"] * plan["Actual Loops"] for plan in node["Plans"]))


def _maria(nodes: list[dict[str, Any]]) -> tuple[tuple[str, ...], int, int]:
    names, read, sorted_rows = [], 0.0, 0.0
    for node in nodes:
        if "table_name" in node and not str(node["table_name"]).startswith("<"):
            read += (node.get("r_rows") or 0) * (node.get("r_loops") or 1)
            if "key" in node:
                names.append(node["key"])
        if "filesort" in node:
            sorted_rows += max(
                (inner.get("r_rows") or 0) * (inner.get("r_loops") or 1)
                for inner in _nodes(node["filesort"])
            )
    return tuple(names), int(read), int(sorted_rows)


@contextmanager
def _noted(engine: Any) -> Iterator[list[tuple[str, Any]]]:
    noted: list[tuple[str, Any]] = []

    def note(_: Any, __: Any, statement: str, values: Any, *___: Any) -> None:
        noted.append((statement, values))

    event.listen(engine, "before_cursor_execute", note)
    try:
        yield noted
    finally:
        event.remove(engine, "before_cursor_execute", note)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    rows = parser.parse_args().rows
    faults = []
    with NatsServer() as nats:
        for kind, server in (("postgresql", PostgresServer()), ("mariadb", MariaServer())):
            with server:
                server.create_database("plans")
                names = Names(f"hub-{kind}", f"desk-{kind}", f"stream-{kind}")
                database = Database(kind, server.url("plans"))
                flushing = Flushing(nats.url, database, names).prepare()
                fill(flushing, rows)
                found = plans(flushing, "idle")
                analyze(flushing)
                found += plans(flushing, "new")
                flushing.close()
            print(f"\n{kind}, {rows} rows pending and {rows} sent:")
            for plan in found:
                print(
                    f"  {plan.query:24} {plan.statistics:5} {plan.milliseconds:8.1f} ms"
                    f" {plan.read:8} read {plan.sorted:6} sorted  {', '.join(plan.indexes)}"
                )
                faults += plan.faults()
    for fault in faults:
        print(fault)
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
