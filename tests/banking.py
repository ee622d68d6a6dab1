"""A bank around the stack: its database, its effects, and what its inbox says."""

from __future__ import annotations

import json
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Any

from celery import Celery
from sqlalchemy import Engine, create_engine, text

from celery_jetstream import JetStream
from celery_jetstream.config import Config
from celery_jetstream.database import Engines
from celery_jetstream.inbox import Inbox
from celery_jetstream.inbox_admin import InboxRow
from celery_jetstream.schema import create_inbox, create_outbox
from tests.conftest import Names
from tests.servers import wait_until
from tests.stack import CeleryProcess, Stack

APP = "tests.apps.bank"


class Bank(Stack):
    """As a stack, with a database that the handlers' effects and the inbox are in."""

    def __init__(
        self,
        directory: Path,
        nats_url: str,
        broker: str,
        names: Names,
        database_url: str,
        **settings: Any,
    ) -> None:
        super().__init__(
            directory, nats_url, broker, names, jetstream_database_url=database_url, **settings
        )
        self.database_url = database_url
        self.hub.provision()
        with self.engine.begin() as connection:
            create_inbox(connection)
            create_outbox(connection)
            serial = {"postgresql": "SERIAL", "sqlite": "INTEGER"}
            kind = serial.get(self.engine.dialect.name, "INTEGER AUTO_INCREMENT")
            connection.execute(
                text(
                    f"CREATE TABLE effects (id {kind} PRIMARY KEY, event_id VARCHAR(255), "
                    "handler VARCHAR(64))"
                )
            )

    @cached_property
    def engine(self) -> Engine:
        return create_engine(self.database_url, pool_pre_ping=True)

    @cached_property
    def inbox(self) -> Inbox:
        config = Config(app_name="bank", destination_app="hub", database_url=self.database_url)
        return Inbox(config, Engines(config))

    def celery(self, *arguments: str, app: str = APP, **extra: str) -> CeleryProcess:
        return super().celery(*arguments, app=app, **extra)

    def close(self) -> None:
        super().close()
        self.engine.dispose()
        self.inbox.database.engines.close()

    # -- what happened ---------------------------------------------------------------------------

    def effects(self) -> Counter[str]:
        """How many effects each event had."""
        with self.engine.connect() as connection:
            return Counter(connection.scalars(text("SELECT event_id FROM effects")))

    def row(self, event_id: str) -> InboxRow:
        (row,) = self.inbox.get(event_id)
        return row

    def runs(self, event_id: str, what: str = "begun") -> list[dict[str, Any]]:
        return [line for line in self.ledger(what) if line["event_id"] == event_id]

    def publish_many(self, events: list[tuple[str, dict[str, Any]]]) -> list[str]:
        """Events of several types, pipelined; returns their event_ids."""
        results = self.hub.publish_batch(
            [{"event_type": kind, "payload": payload} for kind, payload in events], timeout=60
        )
        assert all(results), [result.error for result in results if not result][:3]
        return [result.event_id for result in results]

    @property
    def processes(self) -> list[CeleryProcess]:
        return list(self._processes)

    def hub_with_outbox(self) -> JetStream:
        """Another process's hub, as it were; to be closed."""
        app = Celery("hub", broker="memory://", set_as_current=False)
        given = self.hub.config
        app.conf.update(
            jetstream_nats_urls=given.nats_urls,
            jetstream_stream_name=given.stream_name,
            jetstream_app_name=given.app_name,
            jetstream_destination_app=given.destination_app,
            jetstream_database_url=f"sqlite:///{self.directory}/hub.sqlite",
        )
        hub = JetStream(app)
        hub.outbox.create_tables()
        hub.connect()
        return hub

    def stored(self) -> int:
        """How many messages the stream has ever stored."""
        count: int = self.api(f"STREAM.INFO.{self.names.stream_name}")["state"]["last_seq"]
        return count

    def rows(self) -> Counter[str]:
        """How many rows of the outbox have each status."""
        with self.engine.connect() as connection:
            return Counter(connection.scalars(text("SELECT status FROM jetstream_outbox")))

    def publish_again(self, event_id: str, event_type: str, **payload: Any) -> None:
        """Another message with the same event: its ``Nats-Msg-Id`` is not the event's."""
        subject = f"{self.names.destination_app}.sync.{self.names.app_name}"
        body = {"event_id": event_id, "event_type": event_type, "payload": payload}

        async def send() -> None:
            session = await self.hub.connection.session()
            answer = json.loads((await session.ask(subject, json.dumps(body).encode())).data)
            assert "seq" in answer, answer

        self.hub.connection.run(send)

    def wait_effects(self, event_ids: list[str], timeout: float = 60) -> None:
        """Waits until all of them have had an effect, and nothing is left for the bank."""
        wanted = set(event_ids)
        try:
            wait_until(lambda: wanted <= self.effects().keys(), timeout, "the effects")
        except TimeoutError as error:
            missing = len(wanted - self.effects().keys())
            raise AssertionError(f"{error}; {missing} missing\n{self.logs()}") from None
        self.wait_settled(timeout)

    def refused(self) -> int:
        """Hand-overs of an event that was done, or being done, by the workers' logs."""
        said = ("was handled by", "is being handled by")
        return sum(process.text().count(words) for process in self._processes for words in said)

    def exactly_once(self, event_ids: list[str], fault: str) -> None:
        """Every effect once, every row tells the truth, nothing dead, nothing left."""
        self.wait_effects(event_ids, 90)
        effects = self.effects()
        twice = {event_id: count for event_id, count in effects.items() if count > 1}
        assert not twice, f"{fault}: {len(twice)} effects more than once: {list(twice)[:3]}"
        assert set(effects) == set(event_ids), f"{fault}: an effect of no event"
        states = Counter(row.status for row in self.inbox.find(limit=100_000))
        assert states == {"processed": len(event_ids)}, f"{fault}: {states}"
        assert self.dead_count() == 0, f"{fault}: {self.dead_letters()[:3]}"
        runs = Counter(line["event_id"] for line in self.ledger("begun"))
        again = sum(count - 1 for count in runs.values())
        print(
            f"{fault}: {len(event_ids)} events, each once; {again} runs more than that, "
            f"{self.refused()} refused"
        )
