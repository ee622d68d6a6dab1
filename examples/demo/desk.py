"""``desk`` handles what ``hub`` publishes: one Celery task for each kind of GitHub webhook.

Its handlers have an inbox: what they write in ``session`` and the inbox's row commit together, so
that an event that comes twice, or whose process is killed in the middle, is on the board once.

Its worker and its bridge are started as those of any Celery app::

    celery -A examples.demo.desk worker
    celery -A examples.demo.desk jetstream bridge
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from celery import Celery
from sqlalchemy.orm import Session

from celery_jetstream import Ack, Event, JetStream, jetstream_handler
from examples import broker
from examples.demo import board
from examples.demo.board import Board, show

DIRECTORY = Path(os.environ["DEMO_DIRECTORY"])

app = Celery("desk")
app.conf.update(broker.settings(DIRECTORY / "broker"))
app.conf.update(
    jetstream_app_name="desk",
    jetstream_destination_app="hub",
    jetstream_database_url=board.url(DIRECTORY),
    jetstream_use_inbox=True,
    jetstream_backoff=[0.5, 1, 2],
    task_ignore_result=True,
    worker_lost_wait=1,  # how soon a killed child's task is given up, and comes again
)
jetstream = JetStream(app)
runs = Board(DIRECTORY)


@jetstream.use
def record_runs(event: Event, call_next: Callable[[Event], Any]) -> Any:
    """Around every handler: one row for each run, with how it ended."""
    ended = "handled"
    try:
        result = call_next(event)
        if isinstance(result, Ack):
            ended = "handled before"
        return result
    except Exception as error:
        ended = type(error).__name__
        raise
    finally:
        runs.ran(event, ended)


def killed_once(kind: str) -> None:
    """Kills this process with SIGKILL, the first time: written, and not committed."""
    try:
        os.close(os.open(DIRECTORY / f"killed-{kind}", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


@jetstream_handler("github.push")
def on_push(event: Event, session: Session) -> None:
    branch = event.payload["ref"].split("/", 2)[2]
    commits = len(event.payload["commits"])
    show(session, event, f"pushed {commits} commit{'' if commits == 1 else 's'} to {branch}")
    killed_once("push")


@jetstream_handler("github.issues.*")
def on_issue(event: Event, session: Session) -> None:
    issue = event.payload["issue"]
    show(session, event, f"{event.payload['action']} issue #{issue['number']}: {issue['title']}")
    killed_once("issues")


@jetstream_handler("github.pull_request.*")
def on_pull_request(event: Event, session: Session) -> None:
    pull = event.payload["pull_request"]
    what = f"{event.payload['action']} pull request #{pull['number']}: {pull['title']}"
    show(session, event, what)


@jetstream_handler("github.check_run.*", autoretry_for=(OSError,), bind=True)
def on_check_run(self: Any, event: Event, session: Session) -> None:
    """Its log is kept elsewhere, and that place is away at first: tried again, it is handled."""
    run = event.payload["check_run"]
    show(session, event, f"check {run['name']}: {run.get('conclusion') or run['status']}")
    if self.request.retries == 0:
        raise ConnectionResetError("the store of build logs closed the connection")


@jetstream_handler("github.security_advisory.*")
def on_advisory(event: Event, session: Session) -> None:
    """Takes the severity for a number, but GitHub sends "moderate". Again would not mend that."""
    advisory = event.payload["security_advisory"]
    severity = float(advisory["severity"])
    show(session, event, f"advisory {advisory['ghsa_id']} with severity {severity}")


@jetstream_handler("github.>")
def on_anything_else(event: Event, session: Session) -> None:
    show(session, event, event.event_type.removeprefix("github.").replace(".", " "))
