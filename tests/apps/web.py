"""A WSGI app that publishes: what a web server forks, threads and reloads.

``GET /publish/ID`` publishes at once, ``/outbox/ID`` by way of a row, ``/async/ID`` in a loop of
its own; the answer is JSON. Configured by the environment (``WEB_CONF``, JSON). With ``WEB_FIRST``
it publishes while it is imported: under ``--preload`` that is before the fork.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable, Iterable
from typing import Any

from celery import Celery

from celery_jetstream import JetStream

celery = Celery("web", broker="memory://")
celery.conf.update(json.loads(os.environ["WEB_CONF"]))
jetstream = JetStream(celery)


def publish(event_id: str) -> Any:
    return jetstream.publish("web.request", {"id": event_id}, event_id=event_id)


def by_outbox(event_id: str) -> Any:
    return jetstream.outbox.publish("web.request", {"id": event_id}, event_id=event_id)


def in_a_loop(event_id: str) -> Any:
    return asyncio.run(jetstream.apublish("web.request", {"id": event_id}, event_id=event_id))


WAYS = {"publish": publish, "outbox": by_outbox, "async": in_a_loop}

if os.environ.get("WEB_FIRST"):
    publish("before-the-fork-1")
    by_outbox("before-the-fork-2")


def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    way, event_id = environ["PATH_INFO"].strip("/").split("/")
    result = WAYS[way](event_id)
    start_response("200 OK", [("Content-Type", "application/json")])
    answer = {"success": result.success, "pid": os.getpid(), "at": time.time()}
    return [json.dumps(answer).encode()]
