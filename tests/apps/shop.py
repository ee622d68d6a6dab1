"""The app of the outbox's crash tests, in processes of its own; each can be told to kill itself.

Either ``celery -A tests.apps.shop``, with its settings in ``SHOP_CONF`` (JSON), or :func:`run` in a
fork of a process that has imported this. What happens is a line in the ledger (``SHOP_LEDGER``).

``kill`` has a process end (or stop) itself by a ``signal``, at the ``nth`` batch:

* ``claimed``: before the batch is published;
* ``sent``: ``seconds`` after that, from another thread: some are sent, some are answered;
* ``published``: all is answered, nothing is recorded.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from celery import Celery
from sqlalchemy import func, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from celery_jetstream import JetStream, signals
from celery_jetstream.testing import wait_until

app = Celery("shop")
jetstream = JetStream(app)
ledger = ""
plan: dict[str, Any] = {}

#: Keys of each writer.
KEYS = 10


def open_shop(
    settings: Mapping[str, Any], ledger: str, kill: Mapping[str, Any] | None = None
) -> None:
    """Once per process, before anything is used."""
    app.conf.update(settings)
    plan.update(kill or {})
    globals()["ledger"] = ledger


def note(**line: Any) -> None:
    """One line in the ledger, by a single write."""
    file = os.open(ledger, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(file, (json.dumps({**line, "pid": os.getpid()}) + "\n").encode())
    finally:
        os.close(file)


# -- killed at a named point -----------------------------------------------------------------------


def end() -> None:
    os.kill(os.getpid(), plan["signal"])


def reached(point: str) -> bool:
    """Whether it is the nth time at the point; ``sent`` begins where a batch is claimed."""
    if plan.get("point") != point:
        return False
    plan["nth"] -= 1
    return bool(plan["nth"] == 0)


@signals.outbox_claimed.connect
def on_claimed(**_: Any) -> None:
    if reached("claimed"):
        end()
    if reached("sent"):
        threading.Timer(plan["seconds"], end).start()


@signals.outbox_published.connect
def on_published(results: Sequence[Any], **_: Any) -> None:
    note(
        what="published",
        stored=sum(result.success for result in results),
        duplicates=sum(result.duplicate for result in results),
    )
    if reached("published"):
        end()


# -- programs --------------------------------------------------------------------------------------


def flush() -> None:
    """One flusher, until every row is sent."""
    wait_until(lambda: (drain(), pending() == 0)[1], 120, "all to be sent")


def drain() -> None:
    result = jetstream.outbox.drain()
    if result.failed or result.exceptions or result.retried:
        note(what="not sent", **result.as_dict())


def pending() -> int:
    table = jetstream.outbox.database.tables.outbox
    count = select(func.count()).where(table.c.status == "pending")
    with jetstream.outbox.database.engine.connect() as connection:
        return connection.scalar(count) or 0


def write(name: str, pace: float) -> None:
    """A writer of its own keys, until SIGTERM; goes on when the database is back.

    Some transactions stay open while others commit, so that lower ids become visible late. A
    commit of which nothing is known is not in the ledger, and may have been one.
    """
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    dice = random.Random(name)
    numbers = [0] * KEYS
    while not stopped.wait(dice.uniform(0, 2 * pace)):
        slow = dice.random() < 0.1
        keys = dice.choices(range(KEYS), k=4)
        try:
            with Session(jetstream.outbox.database.engine) as session:
                ids = []
                for key in keys:
                    numbers[key] += 1
                    ids.append(add(session, f"{name}{key}", numbers[key]))
                    if slow and session.get_bind().dialect.name != "sqlite":
                        time.sleep(dice.uniform(0, 0.03))
                if dice.random() < 0.05:
                    session.rollback()
                    note(what="rolled back", ids=ids)
                    continue
                session.commit()
        except SQLAlchemyError as error:
            note(what="not written", error=str(error)[:200])
            jetstream.outbox.database.engine.dispose()
        else:
            note(what="committed", ids=ids)


def hang() -> None:
    """Commits some, and is in the middle of a transaction until it is killed."""
    for number in range(1, 6):
        with Session(jetstream.outbox.database.engine) as session, session.begin():
            ids = [add(session, f"h{key}", number) for key in range(KEYS)]
        note(what="committed", ids=ids)
    with Session(jetstream.outbox.database.engine) as session:
        ids = [add(session, f"h{key}", 6) for key in range(KEYS)]
        savepoint = session.begin_nested()
        ids += [add(session, f"h{key}", 7) for key in range(KEYS)]
        savepoint.commit()
        note(what="in the middle", ids=ids)
        signal.pause()


def add(session: Session, key: str, number: int) -> str:
    event_id: str = jetstream.outbox.add(
        session,
        event_type="order.changed",
        resource_id=key,
        payload={"key": key, "number": number},
    )
    return event_id


PROGRAMS = {"flush": flush, "write": write, "hang": hang}


def run(shop: Mapping[str, Any], log: str, program: str, *arguments: Any) -> None:
    """A program in a fork; it ends with its parent."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    with open(log, "ab") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    open_shop(**shop)
    PROGRAMS[program](*arguments)
    jetstream.close()


if given := os.environ.get("SHOP_CONF"):
    open_shop(json.loads(given), os.environ["SHOP_LEDGER"])
