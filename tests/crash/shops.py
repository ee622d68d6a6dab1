"""A shop with an outbox: its processes, its events, and the account of what became of them."""

from __future__ import annotations

import asyncio
import itertools
import json
import multiprocessing
import os
import signal
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nats
from celery import Celery
from nats.errors import TimeoutError as NatsTimeoutError
from nats.js.api import ConsumerConfig
from sqlalchemy import delete, func, select

from celery_jetstream import JetStream
from celery_jetstream.sqltypes import db_now
from tests.conftest import Names
from tests.crash.faults import until
from tests.databases import Database
from tests.stack import ROOT, CeleryProcess

__all__ = ("PATIENCE", "Account", "Program", "Shop", "stopped")

PATIENCE = 60.0
#: As many keys as the issue asks for.
KEYS = 100


@dataclass
class Account:
    """What became of some events; ``str()`` is the line for the report."""

    what: str
    events: int = 0
    kills: int = 0
    refused: int = 0
    lost: int = 0
    strangers: int = 0
    doubles: int = 0
    inversions: int = 0
    rows: dict[str, int] = field(default_factory=dict)
    leases: int = 0
    holds: int = 0

    def __str__(self) -> str:
        return (
            f"{self.what}: {self.events} events, {self.kills} kills, "
            f"{self.refused} duplicates refused by the server; lost {self.lost}, never committed "
            f"{self.strangers}, doubles {self.doubles}, inversions {self.inversions}, rows "
            f"{self.rows}, leases {self.leases}, holds {self.holds}"
        )

    @property
    def is_right(self) -> bool:
        """Everything arrived, once and in order, and nothing is left behind."""
        wrong = self.lost + self.strangers + self.doubles + self.inversions
        return wrong + self.leases + self.holds == 0 and self.rows.keys() <= {"sent"}


def _run(*arguments: Any) -> None:
    from tests.apps.shop import run  # not in the process of the tests: it listens to our signals

    run(*arguments)


class Program:
    """A program of ``tests.apps.shop``; a fork of a process that has imported it all already."""

    _forks = multiprocessing.get_context("forkserver")
    _forks.set_forkserver_preload(["tests.apps.shop", "tests.crash.shops"])

    def __init__(self, log: Path, shop: dict[str, Any], program: str, *arguments: Any) -> None:
        self.log = log
        arguments = (shop, str(log), program, *arguments)
        self._process = self._forks.Process(target=_run, args=arguments, daemon=True)
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid
        return self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()
        self.wait(10)

    def join(self, timeout: float) -> None:
        """Waits for its end, so long at the most."""
        self._process.join(timeout)

    def wait(self, timeout: float) -> int:
        """Its exit status."""
        self.join(timeout)
        status = self.poll()
        assert status is not None, f"it did not end in {timeout} s:\n{self.text()[-3000:]}"
        return status

    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""


class Shop:
    """Writes here (without flushing), flushes in processes.

    Args:
        directory: for logs, the ledger and beat's files.
        nats_url: of a running server.
        names: of this test's own.
        database: empty; the tables are made.
        settings: of the app, beside what is needed.
    """

    def __init__(
        self, directory: Path, nats_url: str, names: Names, database: Database, **settings: Any
    ) -> None:
        self.directory, self.names = directory, names
        self.ledger_file = directory / "ledger"
        self.processes: list[CeleryProcess | Program] = []
        self._numbers = itertools.count()
        self._ledger: dict[str, list[dict[str, Any]]] = {}
        self._read_so_far = 0
        self.settings: dict[str, Any] = {
            "jetstream_nats_urls": nats_url,
            "jetstream_stream_name": names.stream_name,
            "jetstream_app_name": names.app_name,
            "jetstream_destination_app": names.destination_app,
            "jetstream_database_url": database.url,
            "jetstream_outbox_lease": 1,
            "task_default_queue": f"shop-{names.app_name}",
            "task_ignore_result": True,
            "broker_connection_retry_on_startup": True,
            "worker_cancel_long_running_tasks_on_connection_loss": False,
            **settings,
        }
        app = Celery("writer", broker="memory://", set_as_current=False)
        app.conf.update(self.settings, jetstream_outbox_nudge=False)
        self.jetstream = JetStream(app)
        self.jetstream.provision()
        self.outbox = self.jetstream.outbox
        self.tables = self.outbox.database.tables
        self.outbox.create_tables()

    def close(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send(signal.SIGCONT)
                process.kill()
        self.jetstream.close()

    # -- processes -------------------------------------------------------------------------------

    def start(self, program: str, *arguments: Any, kill: dict[str, Any] | None = None) -> Program:
        """Starts a program of ``tests.apps.shop``."""
        log = self.directory / f"{program}-{next(self._numbers)}.log"
        shop = {"settings": self.settings, "ledger": str(self.ledger_file), "kill": kill}
        process = Program(log, shop, program, *arguments)
        self.processes.append(process)
        return process

    def celery(self, *arguments: str) -> CeleryProcess:
        """Starts ``celery -A tests.apps.shop …``."""
        log = self.directory / f"{arguments[0]}-{next(self._numbers)}.log"
        command = [sys.executable, "-m", "celery", "-A", "tests.apps.shop", *arguments]
        environment = {
            "SHOP_CONF": json.dumps(self.settings),
            "SHOP_LEDGER": str(self.ledger_file),
            "PYTHONPATH": str(ROOT),
        }
        process = CeleryProcess(log, command, environment)
        self.processes.append(process)
        return process

    def ledger(self, what: str) -> list[dict[str, Any]]:
        """The lines of a kind; asked often, so each is read once."""
        if self.ledger_file.exists():
            with self.ledger_file.open("rb") as file:
                file.seek(self._read_so_far)
                new = file.read()
            new = new[: new.rfind(b"\n") + 1]
            self._read_so_far += len(new)
            for line in map(json.loads, new.splitlines()):
                self._ledger.setdefault(line["what"], []).append(line)
        return self._ledger.get(what, [])

    def wait_ledger(self, what: str, count: int = 1, timeout: float = PATIENCE) -> None:
        """Waits until the ledger has so many lines of a kind."""
        try:
            until(lambda: self._has(what, count), timeout, f"{count} × {what}")
        except TimeoutError as error:
            raise AssertionError(f"{error}\n{self.logs()}") from None

    def _has(self, what: str, count: int) -> bool:
        failed = [process for process in self.processes if (process.poll() or 0) > 0]
        assert not failed, f"ended early:\n{failed[0].text()[-3000:]}"
        return len(self.ledger(what)) >= count

    def committed(self) -> list[str]:
        return [event_id for line in self.ledger("committed") for event_id in line["ids"]]

    def logs(self) -> str:
        return "\n".join(
            f"--- {process.log.name}\n{process.text()[-2500:]}" for process in self.processes[-6:]
        )

    # -- rows ------------------------------------------------------------------------------------

    def write(self, count: int) -> None:
        """Commits so many events, over all the keys in turn."""
        events = [
            {
                "event_type": "order.changed",
                "resource_id": f"k{number % KEYS}",
                "payload": {"key": f"k{number % KEYS}", "number": number // KEYS},
            }
            for number in range(count)
        ]
        with self.outbox.database.engine.begin() as connection:
            self.outbox.add_many(connection, events)

    def rows(self) -> dict[str, str]:
        """The status of each row, by its event_id."""
        table = self.tables.outbox.c
        with self.outbox.database.engine.connect() as connection:
            found = connection.execute(select(table.event_id, table.status))
            return {row.event_id: row.status for row in found}

    def is_pending(self) -> bool:
        table = self.tables.outbox.c
        with self.outbox.database.engine.connect() as connection:
            query = select(table.id).where(table.status == "pending").limit(1)
            return connection.scalar(query) is not None

    def wait_sent(self, timeout: float = PATIENCE) -> None:
        try:
            until(lambda: not self.is_pending(), timeout, "no row to be pending")
        except TimeoutError as error:
            counts = Counter(self.rows().values())
            raise AssertionError(f"{error}: {counts}, {self._left()}\n{self.logs()}") from None

    def forget(self) -> None:
        """For another round: no processes, no rows, no messages, no ledger."""
        self.processes = [process for process in self.processes if process.poll() is None]
        with self.outbox.database.engine.begin() as connection:
            connection.execute(delete(self.tables.outbox))
        asyncio.run(self._read(purge=True))
        self.ledger_file.unlink(missing_ok=True)
        self._ledger, self._read_so_far = {}, 0

    # -- the account -----------------------------------------------------------------------------

    def account(self, what: str, kills: int = 0) -> Account:
        """Compares rows and stream; prints the account."""
        rows, messages = self.rows(), asyncio.run(self._read())
        ids = [message["event_id"] for message in messages]
        account = Account(
            what,
            events=len(rows),
            kills=kills,
            refused=sum(line["duplicates"] for line in self.ledger("published")),
            lost=len({*rows, *self.committed()} - set(ids)),
            strangers=len(set(ids) - set(rows)),
            doubles=len(ids) - len(set(ids)),
            inversions=_inversions(messages),
            rows=dict(Counter(rows.values())),
        )
        until(lambda: not self._left()[0], 5, "the leases to end")
        account.leases, account.holds = self._left()
        print(account)
        return account

    def _left(self) -> tuple[int, int]:
        """Leases and holds."""
        buckets, holds = self.tables.buckets, self.tables.holds
        leases = select(func.count()).where(buckets.c.until > db_now())
        with self.outbox.database.engine.connect() as connection:
            held = connection.scalar(select(func.count()).select_from(holds))
            return connection.scalar(leases) or 0, held or 0

    async def _read(self, *, purge: bool = False) -> list[dict[str, Any]]:
        """The events in the stream, in its order."""
        client = await nats.connect(self.settings["jetstream_nats_urls"])
        try:
            js, stream = client.jetstream(timeout=15), self.names.stream_name
            if purge:
                await js.purge_stream(stream)
                return []
            config = ConsumerConfig(max_ack_pending=-1, ack_wait=300)
            subject = self.jetstream.config.publish_subject
            reader = await js.pull_subscribe(subject, stream=stream, config=config)
            left = (await reader.consumer_info()).num_pending or 0
            events: list[dict[str, Any]] = []
            while len(events) < left:
                try:
                    found = await reader.fetch(min(1000, left - len(events)), timeout=5)
                except NatsTimeoutError:
                    break
                events += [json.loads(message.data) for message in found]
            await js.delete_consumer(stream, (await reader.consumer_info()).name)
            return events
        finally:
            await client.close()


def _inversions(events: list[dict[str, Any]]) -> int:
    """How many events came after a later one of their key."""
    last: dict[str, int] = {}
    found = 0
    for event in events:
        key, number = event["payload"]["key"], event["payload"]["number"]
        found += number < last.get(key, -1)
        last[key] = max(number, last.get(key, -1))
    return found


def stopped(process: Program) -> bool:
    """Whether SIGSTOP has stopped all of a process."""
    tasks = Path(f"/proc/{process.pid}/task")
    states = [_state(tasks / name / "stat") for name in os.listdir(tasks)]
    return set(states) == {"T"}


def _state(file: Path) -> str:
    return file.read_text().rpartition(")")[2].split()[0]
