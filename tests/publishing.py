"""A publisher of a test's own, and what the stream has of it."""

from __future__ import annotations

import json
from typing import Any

from celery import Celery
from nats.js.api import ConsumerConfig
from sqlalchemy import create_engine

from celery_jetstream import JetStream
from celery_jetstream.schema import create_outbox
from tests.conftest import Names
from tests.databases import Database
from tests.servers import wait_until

__all__ = ("Source",)


class Source:
    """An app that publishes, with an outbox where there is a database; its stream is made.

    Attributes:
        settings: for other processes of the same app.
        jetstream: this process's.
    """

    def __init__(
        self, nats_url: str, names: Names, database: Database | None = None, **settings: Any
    ) -> None:
        self.stream = names.stream_name
        self.settings: dict[str, Any] = {
            "jetstream_nats_urls": nats_url,
            "jetstream_stream_name": names.stream_name,
            "jetstream_app_name": names.app_name,
            "jetstream_destination_app": names.destination_app,
            **settings,
        }
        if database is not None:
            self.settings["jetstream_database_url"] = database.url
            engine = create_engine(database.url)
            with engine.begin() as connection:
                create_outbox(connection)
            engine.dispose()
        app = Celery("source", broker="memory://", set_as_current=False)
        app.conf.update(self.settings)
        self.jetstream = JetStream(app)
        self.jetstream.provision()

    def wait_flushed(self, timeout: float) -> None:
        """Flushes the outbox until nothing is left in it, so many seconds at the most."""
        wait_until(self._flush, timeout, "the rows of the outbox to be published")

    def _flush(self) -> bool:
        result = self.jetstream.outbox.drain()
        return not (result.more or result.busy or result.outage)

    def stored(self) -> list[str]:
        """The ids of all events in the stream, in its order."""
        return self.jetstream.connection.run(self._read)

    async def _read(self) -> list[str]:
        session = await self.jetstream.connection.session()
        stream, subject = session.client.jetstream(), self.jetstream.config.publish_subject
        config = ConsumerConfig(max_ack_pending=-1, ack_wait=300)
        reader = await stream.pull_subscribe(subject, stream=self.stream, config=config)
        left = (await reader.consumer_info()).num_pending or 0
        found: list[str] = []
        while len(found) < left:
            found += [json.loads(message.data)["event_id"] for message in await reader.fetch(500)]
        await stream.delete_consumer(self.stream, (await reader.consumer_info()).name)
        return found
