"""Lines that are said once, and what is kept out of them."""

from __future__ import annotations

import ast
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery

from celery_jetstream import JetStream, tasks
from celery_jetstream.exceptions import OutboxUnavailableError
from celery_jetstream.flusher import FlushResult
from celery_jetstream.privacy import HIDDEN, hide_payloads

PACKAGE = Path(__file__).parents[2] / "celery_jetstream"


def test_an_outage_of_the_outboxs_database_is_said_once_and_its_end(
    caplog: pytest.LogCaptureFixture,
) -> None:
    away = True

    def drain(_: float) -> FlushResult:
        if away:
            raise OutboxUnavailableError("away")
        return FlushResult()

    app = Celery("said", broker="memory://", set_as_current=False)
    config = SimpleNamespace(outbox_max_seconds=1.0)
    app.jetstream = SimpleNamespace(outbox=SimpleNamespace(drain=drain), config=config)
    flush = app.tasks[tasks.flush_outbox.name]
    for _ in range(3):
        assert flush.apply().get() == {"outage": "away"}
    away = False
    flush.apply().get()
    flush.apply().get()
    ours = [record for record in caplog.records if record.name == "celery_jetstream.tasks"]
    assert [record.getMessage() for record in ours if record.levelno >= logging.INFO] == [
        "the outbox was not flushed: away",
        "the outbox is flushed again",
    ]


def test_every_message_is_constant() -> None:
    """Values are arguments or ``extra``; a text that is made each time cannot be searched for."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            if not (isinstance(node.func.value, ast.Name) and node.func.value.id == "logger"):
                continue
            text = node.args[1 if node.func.attr == "log" else 0]
            named = isinstance(text, ast.Name) and path.name == "tasks.py"
            assert named or isinstance(text, ast.Constant), f"{path.name}:{node.lineno}"


@pytest.mark.parametrize(
    "args",
    [
        (KeyError("a"), "[[{'event_type': 'a', 'payload': 'secret'}], {}, {}] (99b)" + " " * 99),
        (KeyError("a"), "x" * 60 + "secret" * 20, {"jetstream": {"k": "secret"}, "task": "a"}),
        ("f", "('a', {'jetstream': {'headers': 'secret'}}, b'secret', 'json')" + " " * 99, "{}"),
    ],
)
def test_celerys_lines_show_nothing_of_a_copy(
    args: tuple[Any, ...], caplog: pytest.LogCaptureFixture
) -> None:
    hide_payloads()
    hide_payloads()
    logger = logging.getLogger("celery.worker.consumer.consumer")
    logger.error("%s " * len(args), *args)
    assert HIDDEN in caplog.text
    assert "secret" not in caplog.text
    assert len(logger.filters) == 1


def test_fields_of_celerys_lines_show_nothing_of_an_event_that_a_task_publishes(
    caplog: pytest.LogCaptureFixture,
) -> None:
    hide_payloads()
    app = Celery("a", broker="memory://", set_as_current=False)
    app.conf.update(jetstream_app_name="a", jetstream_destination_app="b")
    JetStream(app)
    task = app.tasks["celery_jetstream.publish_event"]
    task.apply(kwargs={"payload": "secret" * 1000, "event_type": "no type"})
    (line,) = [record for record in caplog.records if record.name == "celery.app.trace"]
    assert "raised unexpected: EventError" in line.getMessage()
    assert (line.data["name"], line.data["kwargs"]) == (task.name, HIDDEN)  # type: ignore[attr-defined]
    assert not any("secret" in str(vars(record)) for record in caplog.records)


def test_celerys_lines_about_other_tasks_are_as_they_were(
    caplog: pytest.LogCaptureFixture,
) -> None:
    hide_payloads()
    body = "[[1, 2], {}, {}]" + " " * 99
    logging.getLogger("celery.worker.consumer.consumer").error("%s %s", body, {"task": "plain"})
    assert body in caplog.text
    data = {"name": "plain", "args": "(1,)", "kwargs": "{}"}
    logging.getLogger("celery.worker.strategy").error("%(name)s", data, extra={"data": data})
    assert caplog.records[-1].data == data  # type: ignore[attr-defined]
