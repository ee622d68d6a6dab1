"""What a worker and a bridge log, at DEBUG, as JSON: fields for machines, and no payload."""

from __future__ import annotations

from typing import Any

from celery import Celery

from celery_jetstream import JetStream
from tests.servers import wait_until
from tests.watching import Watched

MARK = "payload-of-nobodys-concern"


def line_about(watched: Watched, event_id: str, text: str) -> dict[str, Any]:
    def found() -> list[dict[str, Any]]:
        lines = [*watched.lines(watched.worker), *watched.lines(watched.bridge)]
        return [
            line for line in lines if line.get("event_id") == event_id and text in line["message"]
        ]

    return wait_until(found, 10, f"a line {text!r}")[0]


def publish_raw(jetstream: JetStream, subject: str, body: bytes) -> None:
    async def send() -> None:
        session = await jetstream.connection.session()
        await session.publish(subject, body, {"secret": MARK})
        await session.flush()

    jetstream.connection.run(send)


def test_a_line_has_its_values_as_fields(watched: Watched) -> None:
    (event_id,) = watched.stack.publish("error.value")
    line = line_about(watched, event_id, "is a dead letter")
    assert line["levelname"] == "ERROR"
    assert line["name"] == "celery_jetstream.settler"
    assert line["handler"] == "tests.apps.desk.error_value"
    assert line["outcome"] == "dead_letter"
    assert line["reason"] == "unrecoverable_error"
    assert line["num_delivered"] == 1
    assert line["stream_sequence"] > 0
    names = watched.stack.names
    assert line["subject"] == f"{names.destination_app}.sync.{names.app_name}"


def test_payloads_are_logged_nowhere(watched: Watched) -> None:
    """Also not by Celery at DEBUG, of a task that the worker does not know, or a body like that."""
    stack = watched.stack
    for event_type in (
        *("order.made", "retry.x", "error.value", "error.runtime", "reject.drop", "kill.once"),
        *("measured", "nobody-handles.this"),
    ):
        stack.publish(event_type, secret=MARK, fail=1, amount=MARK)
    stack.hub.publish("order.made", {"id": 1}, headers={"secret": MARK}).raise_for_error()
    subject = f"{stack.names.destination_app}.sync.{stack.names.app_name}"
    for body in (b'{"%s": ' % MARK.encode(), b'{"payload": "%s"}' % MARK.encode(), b"\xff\x00"):
        publish_raw(stack.hub, subject, body)
    stack.wait_settled(30)
    assert not stack.hub.publish("order.made", {"id": MARK}, subject="no.where", timeout=0.1)
    unknown = stack.hub.publish("looped.x", {"id": 1, "secret": MARK})  # to this worker it is
    watched.worker.wait_for("is handed back: this worker cannot run it")
    stack.api(f"STREAM.MSG.DELETE.{stack.names.stream_name}", {"seq": unknown.sequence})
    stack.wait_settled(20)
    with Celery("web", broker=stack.settings["broker_url"], set_as_current=False) as web:
        event = {"payload": MARK, "event_type": "not a type"}
        queue = stack.settings["task_default_queue"]
        task = web.send_task("celery_jetstream.publish_event", kwargs=event, queue=queue)
        watched.worker.wait_for(f"publish_event[{task.id}] raised unexpected")
    for process in (watched.worker, watched.bridge):
        text = process.text()
        leaks = [line[:400] for line in text.splitlines() if MARK in line]
        assert not leaks, leaks
    logged = watched.worker.text()
    assert "TaskPool: Apply" in logged  # DEBUG it was
    assert "Received unregistered task" in logged
    assert "tests.apps.desk.looped" in logged


def test_every_line_of_ours_is_json(watched: Watched) -> None:
    watched.stack.publish("order.made")
    watched.stack.wait_settled(20)
    for process in (watched.worker, watched.bridge):
        lines = watched.lines(process)
        assert lines
        assert all({"asctime", "levelname", "name", "message"} <= line.keys() for line in lines)
        ours = [line for line in lines if line["name"].startswith("celery_jetstream")]
        assert not [line for line in ours if line["levelname"] == "DEBUG"]
