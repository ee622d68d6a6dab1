"""``hub`` publishes webhook deliveries to ``desk``, in blocks, and one message that is no event.

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
from pathlib import Path
from typing import Any

import nats
from celery import Celery

from celery_jetstream import JetStream

WEBHOOKS = Path(__file__).parent / "data" / "github_webhooks.jsonl"
BLOCK = 10
NOT_JSON = b"payload=%7B%22zen%22%3A%22Speak+like+a+human.%22%7D"  # a webhook sent as a form

app = Celery("hub")
app.conf.update(jetstream_app_name="hub", jetstream_destination_app="desk")
jetstream = JetStream(app)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=None, help="only the first so many")
    parser.add_argument("--rate", type=float, default=100, help="events per second; 0: no limit")
    parser.add_argument("--record", type=Path, required=True, help="what was published, JSON lines")
    options = parser.parse_args()

    webhooks = read_webhooks()[: options.events]
    jetstream.connect()
    with options.record.open("a") as record:
        for start in range(0, len(webhooks), BLOCK):
            began = time.monotonic()
            publish(webhooks[start : start + BLOCK], record)
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
    results = jetstream.publish_batch(
        {
            "event_type": f"github.{webhook['event_type']}",
            "resource_type": "repository",
            "resource_id": (webhook["payload"].get("repository") or {}).get("full_name", ""),
            "payload": webhook["payload"],
        }
        for webhook in webhooks
    )
    for webhook, result in zip(webhooks, results, strict=True):
        result.raise_for_error()
        note(record, f"github.{webhook['event_type']}", result.event_id, result.sequence)


def publish_no_event(record: Any) -> None:
    """As a foreign program might: with nats-py alone, and a body that is not JSON."""

    async def send() -> int:
        client = await nats.connect(os.environ["NATS_URL"])
        answer = await client.jetstream().publish(jetstream.config.publish_subject, NOT_JSON)
        await client.close()
        return answer.seq

    note(record, "", "", asyncio.run(send()))


def note(record: Any, event_type: str, event_id: str, sequence: int | None) -> None:
    line = {"event_type": event_type, "event_id": event_id, "sequence": sequence}
    print(json.dumps(line), file=record, flush=True)


if __name__ == "__main__":
    sys.exit(main())
