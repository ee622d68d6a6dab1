"""``hub`` publishes webhook deliveries to ``desk``, in blocks, and one message that is no event.

A tenth of the events is sent twice, in a way that JetStream does not notice: as a sender does that
comes back after the duplicate window.

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
from examples.demo import board, store
from examples.demo.store import Delivery

DIRECTORY = Path(os.environ["DEMO_DIRECTORY"])
WEBHOOKS = Path(__file__).parent / "data" / "github_webhooks.jsonl"
BLOCK = 10
#: Kinds that fail at first, or for good.
NOT_TWICE = ("github.check_run.", "github.security_advisory.")
#: By their ids.
Events = dict[str, dict[str, Any]]
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
                sent = publish([webhook for _, webhook in block], record)
            else:
                sent = take_in([*block, block[0]], record)  # the first one comes a second time
            send_again(sent, record)
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


def publish(webhooks: list[dict[str, Any]], record: Any) -> Events:
    """At once: JetStream has them when this returns."""
    events = [event_of(webhook) for webhook in webhooks]
    sent = {}
    for event, result in zip(events, jetstream.publish_batch(events), strict=True):
        result.raise_for_error()
        sent[result.event_id] = event
        note(record, "at once", event, result.event_id)
    return sent


def take_in(deliveries: list[tuple[int, dict[str, Any]]], record: Any) -> Events:
    """Through the outbox: a delivery's row and its event are committed together, or neither is."""
    database = store.engine(DIRECTORY)
    sent = {}
    for number, webhook in deliveries:
        event = event_of(webhook)
        how = "outbox"
        try:
            with Session(database) as session, session.begin():
                event_id = jetstream.outbox.add(session, **event)
                session.add(Delivery(number=number, event_type=event["event_type"]))
            sent[event_id] = event
        except IntegrityError:  # it was here before
            how = "rolled back"
        note(record, how, event, event_id)
    database.dispose()
    return sent


def send_again(sent: Events, record: Any) -> None:
    """The first one that is plain to handle: its own bytes, and no ``Nats-Msg-Id``."""
    for event_id, event in sent.items():
        if not event["event_type"].startswith(NOT_TWICE):
            message = jetstream.publisher.message(**event, event_id=event_id)
            send_bare(message.body)
            note(record, "sent twice", event, event_id)
            return


def event_of(webhook: dict[str, Any]) -> dict[str, Any]:
    return {
        "event_type": f"github.{webhook['event_type']}",
        "resource_type": "repository",
        "resource_id": (webhook["payload"].get("repository") or {}).get("full_name", ""),
        "payload": webhook["payload"],
    }


def publish_no_event(record: Any) -> None:
    send_bare(NOT_JSON)
    note(record, "at once", {"event_type": "", "payload": {}}, "")


def send_bare(body: bytes) -> None:
    """As a foreign program might: with nats-py alone."""

    async def send() -> None:
        client = await nats.connect(os.environ["NATS_URL"])
        await client.jetstream().publish(jetstream.config.publish_subject, body)
        await client.close()

    asyncio.run(send())


def note(record: Any, how: str, event: dict[str, Any], event_id: str) -> None:
    names = list(filter(None, board.whose(event["payload"])))
    line = {"how": how, "event_type": event["event_type"], "event_id": event_id, "names": names}
    print(json.dumps(line), file=record, flush=True)


if __name__ == "__main__":
    sys.exit(main())
