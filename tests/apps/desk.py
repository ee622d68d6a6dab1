"""The app that the integration and crash tests run: one handler for each way a task can end.

Configured by the environment (``DESK_CONF``, JSON), for it runs in processes of its own. Every
run of a handler is one line in the file ``DESK_LEDGER``.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import signal
import time
from dataclasses import dataclass
from typing import Any, Literal

from celery import Celery, Task
from celery.exceptions import Ignore, Reject

from celery_jetstream import Ack, Event, JetStream, jetstream_handler, upcast
from tests.apps.ledger import jot, note, runs_of

app = Celery("desk")
app.conf.update(json.loads(os.environ["DESK_CONF"]))
jetstream = JetStream(app)


class OutOfServiceError(Exception):
    """Listed in jetstream_outage_errors by the tests that want an outage."""


class OddError(Exception):
    """Cannot be pickled: its constructor wants more than its args."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(one)
        self.two = two


@jetstream_handler("order.>")
def order(event: Event) -> None:
    time.sleep(event.payload.get("seconds", 0))
    note(event, "handled")


@jetstream_handler("slow.*")
def slow(event: Event) -> None:
    note(event, "begun")
    time.sleep(event.payload["seconds"])
    note(event, "handled")


@jetstream_handler("other.*", queue="other")
def other(event: Event) -> None:
    note(event, "handled")


@jetstream_handler("nobody.*", queue="nobody")
def nobody(event: Event) -> None:
    note(event, "handled")


@jetstream_handler("retry.*", bind=True, max_retries=3)
def retry(self: Any, event: Event) -> None:
    note(event, "begun", retries=self.request.retries)
    if event.delivery.num_delivered <= event.payload.get("fail", 1):
        raise self.retry(countdown=event.payload.get("countdown", 0.2))
    note(event, "handled")


@jetstream_handler("retry_quietly", bind=True)
def retry_quietly(self: Any, event: Event) -> None:
    note(event, "begun")
    if event.delivery.num_delivered == 1:
        self.retry(countdown=0.2, throw=False)
    else:
        note(event, "handled")


@jetstream_handler(
    "auto.*", autoretry_for=(OSError,), retry_backoff=True, retry_jitter=False, max_retries=1
)
def auto(event: Event) -> None:
    note(event, "begun")
    raise OSError("auto")


@jetstream_handler("reject.drop")
def reject_drop(event: Event) -> None:
    note(event, "begun")
    raise Reject("not for us", requeue=False)


@jetstream_handler("reject.requeue")
def reject_requeue(event: Event) -> None:
    note(event, "begun")
    if event.delivery.num_delivered < 3:
        raise Reject("later", requeue=True)
    note(event, "handled")


@jetstream_handler("ignore")
def ignore(event: Event) -> None:
    note(event, "begun")
    raise Ignore


@jetstream_handler("error.value")
def error_value(event: Event) -> None:
    note(event, "begun")
    raise ValueError("not a number")


@jetstream_handler("error.runtime")
def error_runtime(event: Event) -> None:
    note(event, "begun")
    raise RuntimeError("always")


@jetstream_handler("error.odd", unrecoverable_errors=(OddError,))
def error_odd(event: Event) -> None:
    note(event, "begun")
    raise OddError("one", "two")


@jetstream_handler("error.once")
def error_once(event: Event) -> None:
    note(event, "begun")
    if event.delivery.num_delivered == 1:
        raise RuntimeError("once")
    note(event, "handled")


@jetstream_handler("outage")
def outage(event: Event) -> None:
    note(event, "begun")
    event.payload["doubled"] = 2 * event.payload.get("doubled", event.payload.get("fail", 7))
    if runs_of(event) <= event.payload.get("fail", 7):
        raise OutOfServiceError("away")
    note(event, "handled", doubled=event.payload["doubled"])


@jetstream_handler("kill.always")
def kill_always(event: Event) -> None:
    note(event, "begun")
    os.kill(os.getpid(), signal.SIGKILL)


@jetstream_handler("kill.once")
def kill_once(event: Event) -> None:
    note(event, "begun")
    if event.delivery.num_delivered == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    note(event, "handled")


@jetstream_handler("exit")
def leave(event: Event) -> None:
    note(event, "begun")
    if event.delivery.num_delivered == 1:
        raise SystemExit(3)
    note(event, "handled")


@jetstream_handler("limit.hard", time_limit=1)
def limit_hard(event: Event) -> None:
    note(event, "begun")
    if event.delivery.num_delivered == 1:
        time.sleep(60)
    note(event, "handled")


@jetstream_handler("limit.soft", soft_time_limit=1)
def limit_soft(event: Event) -> None:
    note(event, "begun")
    if event.delivery.num_delivered == 1:
        time.sleep(60)
    note(event, "handled")


@jetstream_handler("rated.*", rate_limit="2/s")
def rated(event: Event) -> None:
    note(event, "handled")


@app.task(name="plain")
def plain(number: int, seconds: float) -> None:
    """A task of the broker's, beside the handlers."""
    time.sleep(seconds)
    jot("plain", number)


@jetstream_handler("looped.*")
def looped(event: Event) -> None:
    """Under gevent this fails unless the connection's loop is in a thread of its own."""

    async def inner() -> str:
        await asyncio.sleep(0.01)
        return "looped"

    note(event, "handled", result=asyncio.run(inner()))


@jetstream_handler("unsendable", serializer="no-such-serializer")
def unsendable(event: Event) -> None:
    note(event, "handled")


class InContext(Task):
    context = ""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.context = "entered"
        return self.run(*args, **kwargs)


@jetstream_handler("in.context", base=InContext, bind=True)
def in_context(self: Any, event: Event) -> None:
    note(event, "handled", context=self.context)


@dataclass
class Measure:
    id: int
    amount: float
    unit: Literal["kg", "lb"] = "kg"


@jetstream_handler("typed.*", payload=Measure, queue="typed")
def typed(event: Event) -> None:
    assert isinstance(event.payload, Measure)


@jetstream_handler("measured", payload=Measure)
def measured(event: Event) -> None:
    amount = event.payload.amount
    note(dataclasses.replace(event, payload={"id": event.payload.id}), "handled", amount=amount)


@upcast("measured", from_version="1.0")
def with_unit(payload: dict[str, Any]) -> dict[str, Any]:
    return {**payload, "unit": payload.get("unit", "lb")}


@jetstream_handler("passed_over")
def passed_over(event: Event) -> None:
    note(event, "handled")


@jetstream_handler("traced")
def traced(event: Event) -> None:
    note(event, "handled", trail=event.headers.get("trail", ""))


@jetstream.use
def skip(event: Event, call_next: Any) -> Any:
    if event.event_type == "passed_over":
        note(event, "passed over")
        return Ack()
    return call_next(event)


if os.environ.get("DESK_TWICE"):

    @jetstream_handler("order.>")
    def order_again(event: Event) -> None: ...


if unknown := os.environ.get("DESK_WITHOUT"):
    app.finalize()
    del app.tasks[unknown]
