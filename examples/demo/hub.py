"""``hub`` publishes webhook deliveries to ``desk``, in blocks, and one message that is no event.

Every second block is published at once. The others go by way of the outbox, one transaction for
each delivery; the relay publishes them::

    celery -A examples.demo.hub jetstream outbox relay

A program of its own, with no Celery worker: publishing needs none.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nats
from celery import Celery
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from celery_jetstream import JetStream, signals
from examples.demo import store
from examples.demo.store import Delivery

DIRECTORY = Path(os.environ["DEMO_DIRECTORY"])
WEBHOOKS = Path(__file__).parent / "data" / "github_webhooks.jsonl"
BLOCK = 10
NOT_JSON = b"payload=%7B%22zen%22%3A%22Speak+like+a+human.%22%7D"  # a webhook sent as a form

app = Celery("hub")
app.conf.update(
    jetstream_app_name="hub",
    jetstream_destination_app="desk",
    jetstream_database_url=store.url(DIRECTORY),
    jetstream_outbox_lease=2,
    jetstream_outbox_nudge=False,  # with it the hub would flush too, and leave the relay nothing
)
jetstream = JetStream(app)


if "DEMO_STALL" in os.environ:

    @signals.outbox_published.connect
    def stall(rows: Sequence[Any], **_: Any) -> None:
        """The worst moment: JetStream has the rows, and nobody has noted it. Here we are killed."""
        print(f"stalled with {len(rows)} rows claimed", flush=True)
        time.sleep(3600)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=None, help="only the first so many")
    parser.add_argument("--rate", type=float, default=100, help="events per second; 0: no limit")
    parser.add_argument("--record", type=Path, required=True, help="what was done, JSON lines")
    options = parser.parse_args()

    webhooks = list(enumerate(read_webhooks()[: options.events]))
    jetstream.connect()
    with options.record.open("a") as record:
        for start in range(0, len(webhooks), BLOCK):
            began = time.monotonic()
            block = webhooks[start : start + BLOCK]
            if start // BLOCK % 2:
                publish([webhook for _, webhook in block], record)
            else:
                take_in([*block, block[0]], record)  # the first one comes a second time
            if start == 0:
                publish_no_event(record)
            if options.rate:
                time.sleep(max(0.0, BLOCK / options.rate - (time.monotonic() - began)))
    jetstream.close()
    return 0


def read_webhooks() -> list[dict[str, Any]]:
    """The deliveries, in an order as mixed as real traffic's, and always the same."""
    webhooks = [json.loads(line) for line in WEBHOOKS.read_text("utf-8").splitlines()]
    random.Random(2).shuffle(webhooks)
    return webhooks


def publish(webhooks: list[dict[str, Any]], record: Any) -> None:
    """At once: JetStream has them when this returns."""
    events = [event_of(webhook) for webhook in webhooks]
    for event, result in zip(events, jetstream.publish_batch(events), strict=True):
        result.raise_for_error()
        note(record, "at once", event["event_type"], result.event_id)


def take_in(deliveries: list[tuple[int, dict[str, Any]]], record: Any) -> None:
    """Through the outbox: a delivery's row and its event are committed together, or neither is."""
    database = store.engine(DIRECTORY)
    for number, webhook in deliveries:
        event = event_of(webhook)
        how = "outbox"
        try:
            with Session(database) as session, session.begin():
                event_id = jetstream.outbox.add(session, **event)
                session.add(Delivery(number=number, event_type=event["event_type"]))
        except IntegrityError:  # it was here before
            how = "rolled back"
        note(record, how, event["event_type"], event_id)
    database.dispose()


def event_of(webhook: dict[str, Any]) -> dict[str, Any]:
    return {
        "event_type": f"github.{webhook['event_type']}",
        "resource_type": "repository",
        "resource_id": (webhook["payload"].get("repository") or {}).get("full_name", ""),
        "payload": webhook["payload"],
    }


def publish_no_event(record: Any) -> None:
    """As a foreign program might: with nats-py alone, and a body that is not JSON."""

    async def send() -> None:
        client = await nats.connect(os.environ["NATS_URL"])
        await client.jetstream().publish(jetstream.config.publish_subject, NOT_JSON)
        await client.close()

    asyncio.run(send())
    note(record, "at once", "", "")


def note(record: Any, how: str, event_type: str, event_id: str) -> None:
    line = {"how": how, "event_type": event_type, "event_id": event_id}
    print(json.dumps(line), file=record, flush=True)


if __name__ == "__main__":
    sys.exit(main())
