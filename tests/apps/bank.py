"""The app of the inbox's tests: handlers whose effect is a row, so that one too many shows.

Configured by the environment (``DESK_CONF``, JSON), as ``desk`` is. An event's payload says what is
to happen: ``die`` (``before`` its effect, ``after`` it, or ``committed``), ``fail`` (so many
attempts), ``seconds``. Each run is a line in the file ``DESK_LEDGER`` as well.
"""

from __future__ import annotations

import json
import os
import signal
import time
from typing import Any

from celery import Celery
from sqlalchemy import Column, Integer, MetaData, String, Table, create_engine, insert
from sqlalchemy import event as sqlalchemy_event
from sqlalchemy.orm import Session

from celery_jetstream import Event, JetStream, jetstream_handler
from tests.apps.ledger import note

app = Celery("bank")
app.conf.update(json.loads(os.environ["DESK_CONF"]))
jetstream = JetStream(app)

metadata = MetaData()
effects = Table(
    "effects",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("event_id", String(255)),
    Column("handler", String(64)),
    mysql_engine="InnoDB",
)


def die(event: Event, point: str) -> None:
    """Kills this process, once for each event (or at each of its first ``deaths`` runs)."""
    if event.payload.get("die") != point:
        return
    for death in range(event.payload.get("deaths", 1)):
        try:
            mark = f"{os.environ['DESK_LEDGER']}-{event.payload['id']}-{death}.died"
            os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            continue
        os.kill(os.getpid(), signal.SIGKILL)


def effect(event: Event, handler: str) -> Any:
    return insert(effects).values(event_id=event.event_id, handler=handler)


@jetstream_handler("paid.*", inbox=True, bind=True)
def paid(self: Any, event: Event, session: Session) -> None:
    note(event, "begun", retries=self.request.retries)
    die(event, "before")
    session.execute(effect(event, "paid"))
    time.sleep(event.payload.get("seconds", 0))
    die(event, "after")
    if self.request.retries < event.payload.get("fail", 0):
        raise RuntimeError("not yet")
    if event.payload.get("die") == "committed":
        sqlalchemy_event.listen(session, "after_commit", lambda _: die(event, "committed"))
    note(event, "handled")


@jetstream_handler("retried.*", inbox=True, bind=True, max_retries=2, autoretry_for=(Exception,))
def retried(self: Any, event: Event, session: Session) -> None:
    note(event, "begun", retries=self.request.retries)
    session.execute(effect(event, "retried"))
    if self.request.retries < event.payload.get("fail", 0):
        raise OSError("not yet")
    note(event, "handled")


@jetstream_handler("quiet.*", inbox=True, bind=True)
def quiet(self: Any, event: Event, session: Session) -> None:
    note(event, "begun", retries=self.request.retries)
    session.execute(effect(event, "quiet"))
    if self.request.retries == 0:
        self.retry(countdown=0.2, throw=False)


@jetstream_handler("limited.*", inbox=True, bind=True, time_limit=1)
def limited(self: Any, event: Event, session: Session) -> None:
    note(event, "begun", retries=self.request.retries)
    session.execute(effect(event, "limited"))
    if self.request.retries < 1:
        time.sleep(60)
    note(event, "handled")


@jetstream_handler("passed.on", inbox=True)
def passed_on(event: Event, session: Session) -> None:
    """Its own event leaves with its effect, or not at all."""
    note(event, "begun")
    session.execute(effect(event, "passed_on"))
    jetstream.outbox.add(
        session, event_type="passed", payload={"id": event.payload["id"]}, event_id=event.event_id
    )
    die(event, "after")
    note(event, "handled")


@jetstream_handler("noted.*", inbox=True, bind=True)
def noted(self: Any, event: Event) -> None:
    """Without a session of the inbox's: its effect is in a transaction of its own."""
    note(event, "begun", retries=self.request.retries)
    die(event, "before")
    time.sleep(event.payload.get("seconds", 0))
    if self.request.retries < event.payload.get("fail", 0):
        raise RuntimeError("not yet")
    with _engine().begin() as connection:
        connection.execute(effect(event, "noted"))
    note(event, "handled")


@jetstream_handler("refused.*", inbox=True, inbox_key="refused")
def refused(event: Event, session: Session) -> None:
    note(event, "begun")
    session.execute(effect(event, "refused"))
    if not os.path.exists(os.environ["DESK_LEDGER"] + ".mended"):
        raise ValueError("no such account")
    note(event, "handled")


@jetstream_handler("plain.*", inbox=False)
def plain(event: Event) -> None:
    note(event, "handled")


_engines: dict[int, Any] = {}


def _engine() -> Any:
    """This process's, for the handler that has no session."""
    if os.getpid() not in _engines:
        url = app.conf.jetstream_database_url
        _engines[os.getpid()] = create_engine(url, pool_pre_ping=True)
    return _engines[os.getpid()]
