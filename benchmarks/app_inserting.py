"""A task with one INSERT: plain, as a handler, and as a handler with an inbox.

All use one kind of engine: what differs is who begins and commits, and the inbox's row.
"""

from __future__ import annotations

import json
import os
from functools import cache
from typing import Any

from celery import Celery
from sqlalchemy import Column, Engine, Integer, MetaData, String, Table, create_engine, insert
from sqlalchemy.orm import Session, sessionmaker

from benchmarks.tally import tick
from celery_jetstream import Event, JetStream, jetstream_handler

app = Celery("inserting")
app.conf.update(json.loads(os.environ["BENCH_CONF"]))

metadata = MetaData()
effects = Table(
    "effects",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("event_id", String(255)),
    Column("name", String(255)),
)


@cache
def _engine(pid: int) -> Engine:
    return create_engine(os.environ["BENCH_DATABASE"], pool_pre_ping=True)


def sessions() -> Session:
    """As ``jetstream_session_factory``, and for the handlers that have none."""
    return sessionmaker(_engine(os.getpid()))()


def effect(event_id: str, payload: dict[str, Any]) -> Any:
    return insert(effects).values(event_id=event_id, name=payload["name"])


@app.task(ignore_result=True)
def handle(event: dict[str, Any]) -> None:
    with sessions() as session, session.begin():
        session.execute(effect(event["event_id"], event["payload"]))
    tick()


if "jetstream_app_name" in app.conf:
    app.conf.jetstream_session_factory = sessions
    jetstream = JetStream(app)


@jetstream_handler("bare.created")
def bare(event: Event) -> None:
    with sessions() as session, session.begin():
        session.execute(effect(event.event_id, event.payload))
    tick()


@jetstream_handler("boxed.created", inbox=True)
def boxed(event: Event, session: Session) -> None:
    session.execute(effect(event.event_id, event.payload))
    tick()
