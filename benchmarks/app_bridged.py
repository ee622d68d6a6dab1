"""The same task as a handler of events."""

from __future__ import annotations

import json
import os

from celery import Celery

from benchmarks.tally import tick
from celery_jetstream import Event, JetStream, jetstream_handler

app = Celery("bridged")
app.conf.update(json.loads(os.environ["BENCH_CONF"]))
jetstream = JetStream(app)


@jetstream_handler("bench.*")
def handle(event: Event) -> None:
    tick()


def one_of_many(event: Event) -> None:
    tick()


for number in range(8):
    jetstream_handler(f"many{number}.*", name=f"benchmarks.many{number}")(one_of_many)
