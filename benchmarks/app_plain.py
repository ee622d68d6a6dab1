"""Plain Celery, as it is without this library: the yardstick."""

from __future__ import annotations

import json
import os
from typing import Any

from celery import Celery

from benchmarks.tally import tick

app = Celery("plain")
app.conf.update(json.loads(os.environ["BENCH_CONF"]))


@app.task
def handle(event: dict[str, Any]) -> None:
    tick()
