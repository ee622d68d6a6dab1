"""The sender of the chaos runs: ``celery -A tests.apps.chaos_shop …`` flushes its outbox.

``python -m tests.apps.chaos_shop NAME PACE`` writes: numbered orders, each with its event in one
transaction, until SIGTERM. What is in the table of orders was committed, and nothing else was.
Configured by the environment (``CHAOS_SHOP``, JSON).
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time

from celery import Celery
from sqlalchemy import Column, DateTime, MetaData, String, Table, func, insert
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from celery_jetstream import JetStream, signals
from tests.apps import points
from tests.crash.chaos.kinds import KINDS, payload_of

app = Celery("shop")
app.conf.update(json.loads(os.environ["CHAOS_SHOP"]))
jetstream = JetStream(app)

metadata = MetaData()
orders = Table(
    "orders",
    metadata,
    Column("event_id", String(64), primary_key=True),
    Column("kind", String(32), nullable=False),
    Column("at", DateTime(timezone=True), server_default=func.clock_timestamp(), nullable=False),
)

signals.outbox_claimed.connect(points.receiver("outbox-claimed"), weak=False)
signals.outbox_claimed.connect(points.receiver("outbox-sending"), weak=False)
signals.outbox_published.connect(points.receiver("outbox-published"), weak=False)
signals.outbox_flushed.connect(points.receiver("outbox-flushed"), weak=False)

#: Of each writer: of how many keys its events are.
KEYS = 10


def write(name: str, pace: float) -> None:
    """Goes on when the database is back; some transactions stay open while others commit."""
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    dice = random.Random()
    number = 0
    print("writing", flush=True)
    while not stopped.wait(dice.uniform(0, 2 * pace)):
        if points.held():
            continue
        slow, give_up = dice.random() < 0.1, dice.random() < 0.05
        try:
            with Session(jetstream.outbox.database.engine) as session:
                for kind in dice.choices(list(KINDS), KINDS.values(), k=dice.randint(1, 3)):
                    number += 1
                    add(session, f"{name}-{number}", kind, dice)
                    if slow:
                        time.sleep(dice.uniform(0, 0.03))
                if give_up:
                    session.rollback()
                    continue
                points.passes("writer-committing")
                session.commit()
                points.passes("writer-committed")
        except SQLAlchemyError as error:
            print("not written:", str(error)[:200], flush=True)
            jetstream.outbox.database.engine.dispose()


def add(session: Session, event_id: str, kind: str, dice: random.Random) -> None:
    session.execute(insert(orders).values(event_id=event_id, kind=kind))
    jetstream.outbox.add(
        session,
        event_id=event_id,
        event_type=kind,
        resource_id=f"{event_id.partition('-')[0]}-{dice.randrange(KEYS)}",
        payload=payload_of(kind, dice),
    )


if __name__ == "__main__":
    write(sys.argv[1], float(sys.argv[2]))
    jetstream.close()
