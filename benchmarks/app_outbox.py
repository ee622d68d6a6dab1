"""The app of the outbox benchmarks, for what runs under ``celery -A``: a worker, the relay."""

from __future__ import annotations

import json
import os

from benchmarks.client_outbox import app_of

app = app_of(**json.loads(os.environ["BENCH_CONF"]))
