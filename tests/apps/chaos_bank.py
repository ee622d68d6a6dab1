"""The receiver of the chaos runs: ``celery -A tests.apps.chaos_bank …``; an effect is a row.

Configured by the environment (``CHAOS_BANK``, JSON).
"""

from __future__ import annotations

import json
import os
import time
from typing import Any

from celery import Celery
from celery import signals as celery_signals
from celery.exceptions import Reject
from sqlalchemy import (
    BigInteger,
    Column,
    DateTime,
    Integer,
    MetaData,
    String,
    Table,
    create_engine,
    func,
    insert,
)
from sqlalchemy import event as sqlalchemy_event
from sqlalchemy.orm import Session

from celery_jetstream import Event, JetStream, jetstream_handler, signals
from tests.apps import points

app = Celery("bank")
app.conf.update(json.loads(os.environ["CHAOS_BANK"]))
jetstream = JetStream(app)

metadata = MetaData()
effects = Table(
    "effects",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("event_id", String(64), nullable=False),
    Column("sequence", BigInteger, nullable=False),
    Column("num_delivered", Integer, nullable=False),
    Column("at", DateTime(timezone=True), server_default=func.clock_timestamp(), nullable=False),
)

celery_signals.before_task_publish.connect(points.receiver("bridge-received"), weak=False)
celery_signals.after_task_publish.connect(points.receiver("bridge-dispatched"), weak=False)
celery_signals.task_received.connect(points.receiver("worker-received"), weak=False)
signals.message_settled.connect(points.receiver("settled"), weak=False)
signals.message_dead_lettered.connect(points.receiver("dead-lettered"), weak=False)
sqlalchemy_event.listen(Session, "after_commit", points.receiver("handler-committed"))


def effect(event: Event) -> Any:
    delivery = event.delivery
    assert delivery is not None
    return insert(effects).values(
        event_id=event.event_id,
        sequence=delivery.sequence,
        num_delivered=delivery.num_delivered,
    )


@jetstream_handler("paid.*", "slow.*", inbox=True)
def paid(event: Event, session: Session) -> None:
    points.passes("handler-begun")
    session.execute(effect(event))
    time.sleep(event.payload.get("seconds", 0))
    points.passes("handler-done")


@jetstream_handler("passed.on", inbox=True)
def passed_on(event: Event, session: Session) -> None:
    """Its own event leaves with its effect; a second one would break the outbox's unique index."""
    session.execute(effect(event))
    jetstream.outbox.add(session, event_type="passed", payload={}, event_id=event.event_id)
    points.passes("handler-done")


@jetstream_handler("retried.*", inbox=True, bind=True, max_retries=20, autoretry_for=(OSError,))
def retried(self: Any, event: Event, session: Session) -> None:
    session.execute(effect(event))
    if self.request.retries < event.payload["fail"]:
        points.passes("handler-failing")
        raise OSError("not yet")


@jetstream_handler("noted.*", inbox=True)
def noted(event: Event) -> None:
    """Its effect is in a transaction of its own."""
    write_aside(event)
    points.passes("around-effect")


@jetstream_handler("plain.*", inbox=False)
def plain(event: Event) -> None:
    write_aside(event)


@jetstream_handler("poison.value", inbox=True)
def poison(event: Event, session: Session) -> None:
    session.execute(effect(event))
    raise ValueError("no such account")


@jetstream_handler("poison.rejected", inbox=True)
def rejected(event: Event, session: Session) -> None:
    session.execute(effect(event))
    raise Reject("not for us", requeue=False)


def write_aside(event: Event) -> None:
    if os.getpid() not in _engines:
        url = app.conf.jetstream_database_url
        _engines[os.getpid()] = create_engine(url, pool_pre_ping=True)
    with _engines[os.getpid()].begin() as connection:
        connection.execute(effect(event))


_engines: dict[int, Any] = {}
