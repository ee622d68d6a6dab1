"""celery-salt: the handler as a subscriber to its topic exchange on RabbitMQ (``.venv-bench``).

By ``setup_salt_queue``, as its documentation has it, which needs no Django. An event is two tasks:
one that looks for the subscribers and sends each of them a task to the same queue, and that task.
``task_acks_late`` makes both at least once; that the second has reached RabbitMQ is not waited for,
as Celery does not without being told. For speed it has a queue without priorities, Celery's own
prefetch (its setup makes it one, for the sake of calls, and here are none), and no log lines: it
would write two for each event, at any level of the worker's.
"""

from __future__ import annotations

import json
import logging
import os
import sys

from celery import Celery
from celery_salt import event, subscribe
from celery_salt.django.celery import setup_salt_queue

from benchmarks.tally import tick

NAME = "celery-salt"

logging.disable(logging.INFO)
app = Celery(NAME, broker=os.environ["BENCH_SERVER"])
setup_salt_queue(app, NAME, [__name__], max_priority=None)
app.conf.update(
    broker_connection_retry_on_startup=True,
    task_acks_late=True,
    task_ignore_result=True,
    worker_prefetch_multiplier=4,
)


@event("bench.created")
class Created:
    id: int
    name: str
    email: str


@subscribe("bench.created")
def handle(created: Created) -> None:
    tick()


def fill() -> None:
    """Publishes what it is given."""
    print("connected", flush=True)
    for payload in json.load(sys.stdin):
        Created.publish(**payload)


if __name__ == "__main__":
    fill()
