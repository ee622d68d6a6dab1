"""A Celery app whose tasks publish in the pool's children, and threads in the main process.

Configured by the environment (``ANNOUNCER_CONF``, JSON). The threads publish from the moment that
the worker is ready until it ends; which events, is then written to ``ANNOUNCER_COUNT``.
"""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

from celery import Celery, signals

from celery_jetstream import JetStream

app = Celery("announcer")
app.conf.update(json.loads(os.environ["ANNOUNCER_CONF"]))
jetstream = JetStream(app)

THREADS = 4
stopping = threading.Event()
published: list[str] = []
threads: list[threading.Thread] = []


@app.task(name="announce")
def announce(number: int) -> None:
    result = jetstream.publish("task.done", {"id": number}, event_id=f"task-{number}")
    result.raise_for_error()


def publish(thread: int) -> None:
    number = 0
    while not stopping.wait(0.01):
        event_id = f"main-{thread}-{number}"
        jetstream.publish("main.tick", {}, event_id=event_id).raise_for_error()
        published.append(event_id)
        number += 1


@signals.worker_ready.connect
def start(**_: Any) -> None:
    for number in range(THREADS):
        threads.append(threading.Thread(target=publish, args=(number,), daemon=True))
        threads[-1].start()


@signals.worker_shutting_down.connect
def stop(**_: Any) -> None:
    stopping.set()


@signals.worker_shutdown.connect
def write(**_: Any) -> None:
    for thread in threads:
        thread.join(10)
    Path(os.environ["ANNOUNCER_COUNT"]).write_text(json.dumps(published))
