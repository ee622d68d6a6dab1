"""The desk as an operator watches it: logs as the docs have them, traces in a file, metrics.

``WATCHED_SPANS`` names the file: one JSON object for each span.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from celery.signals import worker_process_init
from opentelemetry import trace
from opentelemetry.instrumentation.celery import CeleryInstrumentor
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SimpleSpanProcessor

from celery_jetstream.contrib.opentelemetry import JetStreamInstrumentor
from tests.apps.desk import app, jetstream

__all__ = ("app", "jetstream")

PAGE = Path(__file__).parents[2] / "docs/production/monitoring.md"
((code),) = (
    block
    for block in re.findall(r"^```python\n(.*?)^```", PAGE.read_text("utf-8"), re.M | re.S)
    if "setup_logging" in block
)
page: dict[str, Any] = {}
exec(compile(code, str(PAGE), "exec"), page)
page["LOGGING"]["root"]["level"] = "DEBUG"


def line(span: ReadableSpan) -> str:
    return json.dumps({**json.loads(span.to_json()), "pid": os.getpid()}) + "\n"


def instrument(**_: Any) -> None:
    file = open(os.environ["WATCHED_SPANS"], "a", buffering=1)  # noqa: SIM115
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(ConsoleSpanExporter(out=file, formatter=line)))
    trace.set_tracer_provider(provider)
    CeleryInstrumentor().instrument()
    JetStreamInstrumentor().instrument()


if "bridge" in sys.argv:
    instrument()
else:
    worker_process_init.connect(instrument, weak=False)
