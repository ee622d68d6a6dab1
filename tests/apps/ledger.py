"""What the handlers of the tests' apps did: a line for each, in the file ``DESK_LEDGER``."""

from __future__ import annotations

import json
import os
import time
from typing import Any

from celery_jetstream import Event


def note(event: Event, what: str, **more: Any) -> None:
    """One line in the ledger, about an event."""
    delivery = event.delivery
    jot(
        what,
        event.payload.get("id"),
        type=event.event_type,
        event_id=event.event_id,
        num_delivered=delivery.num_delivered if delivery else None,
        **more,
    )


def jot(what: str, number: Any, **more: Any) -> None:
    """One line in the ledger; a single write, so that processes do not mix their lines."""
    line = {"what": what, "id": number, "pid": os.getpid(), "at": time.time(), **more}
    file = os.open(os.environ["DESK_LEDGER"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(file, (json.dumps(line) + "\n").encode())
    finally:
        os.close(file)


def runs_of(event: Event) -> int:
    """How often it has begun."""
    with open(os.environ["DESK_LEDGER"]) as file:
        lines = [json.loads(line) for line in file]
    return sum(x["what"] == "begun" and x.get("event_id") == event.event_id for x in lines)
