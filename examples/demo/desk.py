"""``desk`` handles what ``hub`` publishes: one Celery task for each kind of GitHub webhook.

Its worker and its bridge are started as those of any Celery app::

    celery -A examples.demo.desk worker
    celery -A examples.demo.desk jetstream bridge
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from celery import Celery

from celery_jetstream import Event, JetStream, jetstream_handler
from examples import broker
from examples.demo.board import Board

DIRECTORY = Path(os.environ["DEMO_DIRECTORY"])

app = Celery("desk")
app.conf.update(broker.settings(DIRECTORY / "broker"))
app.conf.update(
    jetstream_app_name="desk",
    jetstream_destination_app="hub",
    jetstream_backoff=[0.5, 1, 2],
    task_ignore_result=True,
)
jetstream = JetStream(app)
board = Board(DIRECTORY / "board.sqlite3")


@jetstream.use
def record_runs(event: Event, call_next: Callable[[Event], Any]) -> Any:
    """Around every handler: one row for each run, with how it ended."""
    ended = "handled"
    try:
        return call_next(event)
    except Exception as error:
        ended = type(error).__name__
        raise
    finally:
        board.ran(event, ended)


@jetstream_handler("github.push")
def on_push(event: Event) -> None:
    branch = event.payload["ref"].split("/", 2)[2]
    commits = len(event.payload["commits"])
    board.show(event, f"pushed {commits} commit{'' if commits == 1 else 's'} to {branch}")


@jetstream_handler("github.issues.*")
def on_issue(event: Event) -> None:
    issue = event.payload["issue"]
    board.show(event, f"{event.payload['action']} issue #{issue['number']}: {issue['title']}")


@jetstream_handler("github.pull_request.*")
def on_pull_request(event: Event) -> None:
    pull = event.payload["pull_request"]
    board.show(event, f"{event.payload['action']} pull request #{pull['number']}: {pull['title']}")


@jetstream_handler("github.check_run.*", autoretry_for=(OSError,))
def on_check_run(event: Event) -> None:
    """Its log is kept elsewhere, and that place is away at first: tried again, it is handled."""
    if event.delivery is not None and event.delivery.num_delivered == 1:
        raise ConnectionResetError("the store of build logs closed the connection")
    run = event.payload["check_run"]
    board.show(event, f"check {run['name']}: {run.get('conclusion') or run['status']}")


@jetstream_handler("github.security_advisory.*")
def on_advisory(event: Event) -> None:
    """Takes the severity for a number, but GitHub sends "moderate". Again would not mend that."""
    advisory = event.payload["security_advisory"]
    severity = float(advisory["severity"])
    board.show(event, f"advisory {advisory['ghsa_id']} with severity {severity}")


@jetstream_handler("github.>")
def on_anything_else(event: Event) -> None:
    board.show(event, event.event_type.removeprefix("github.").replace(".", " "))
