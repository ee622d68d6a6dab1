"""``celery -A … jetstream provision``: what it prints, does, and ends with."""

from __future__ import annotations

import json
from collections.abc import Callable

from tests.conftest import Names
from tests.stack import Stack

MakeStack = Callable[..., Stack]


def provision(stack: Stack, *arguments: str, status: int = 0) -> str:
    process = stack.celery("jetstream", "provision", *arguments)
    assert process.wait(30) == status, process.text()
    return process.text()


def forget_everything(stack: Stack, names: Names) -> None:
    stack.api(f"STREAM.DELETE.{names.stream_name}")


def test_dry_run_says_what_it_would_do_and_does_nothing(
    make_stack: MakeStack, names: Names
) -> None:
    stack = make_stack()
    forget_everything(stack, names)
    said = provision(stack, "--dry-run")
    assert f"+ stream {names.stream_name}: create" in said
    assert f"  + subjects: {names.app_name}.sync.{names.destination_app}\n" in said
    assert "error" in stack.api(f"STREAM.INFO.{names.stream_name}")


def test_provision_can_be_repeated(make_stack: MakeStack, names: Names) -> None:
    stack = make_stack()
    forget_everything(stack, names)
    first = json.loads(provision(stack, "--json"))
    assert {change["action"] for change in first["changes"]} == {"create"}
    config = stack.api(f"STREAM.INFO.{names.stream_name}")["config"]
    assert set(config["subjects"]) == {
        f"{names.app_name}.sync.{names.destination_app}",
        f"{names.destination_app}.sync.{names.app_name}",
        f"{names.app_name}.sync.dlq",
        f"{names.destination_app}.sync.dlq",
    }
    again = json.loads(provision(stack, "--json"))
    assert {change["action"] for change in again["changes"]} == {"none"}


def test_what_cannot_be_is_said_with_status_1(make_stack: MakeStack, names: Names) -> None:
    stack = make_stack()
    forget_everything(stack, names)
    taken = [f"{names.app_name}.sync.*"]
    stack.api(
        "STREAM.CREATE.others-" + names.app_name,
        {"name": f"others-{names.app_name}", "subjects": taken},
    )
    try:
        said = provision(stack, status=1)
        assert f"others-{names.app_name}" in said
        assert names.stream_name in said
        assert "Traceback" not in said
        assert "error" in json.loads(provision(stack, "--json", status=1))
    finally:
        stack.api(f"STREAM.DELETE.others-{names.app_name}")


def test_an_app_without_jetstream_is_told_what_to_add(make_stack: MakeStack) -> None:
    stack = make_stack()
    process = stack.celery("jetstream", "provision", app="tests.apps.plain")
    assert process.wait(30) == 1
    assert "JetStream(app)" in process.text()


def test_wrong_settings_are_said_in_one_line_each(make_stack: MakeStack) -> None:
    stack = make_stack(jetstream_ack_wait="soon", jetstream_backoff=[])
    said = provision(stack, status=1)
    assert "jetstream_ack_wait" in said
    assert "jetstream_backoff" in said
    assert "Traceback" not in said


def handlers(stack: Stack, *arguments: str, status: int = 0, **environment: str) -> str:
    process = stack.celery("jetstream", "handlers", *arguments, **environment)
    assert process.wait(30) == status, process.text()
    return process.text()


def test_handlers_are_listed_without_any_server(make_stack: MakeStack) -> None:
    stack = make_stack()
    stack.settings["jetstream_nats_urls"] = "nats://127.0.0.1:1"
    stack.settings["broker_url"] = "redis://127.0.0.1:1/0"
    found = {row["task"]: row for row in json.loads(handlers(stack, "--json"))}
    measured = found["tests.apps.desk.measured"]
    assert (measured["patterns"], measured["payload"]) == (["measured"], "Measure")
    assert measured["queue"] == stack.settings["task_default_queue"]
    assert measured["schema"]["required"] == ["id", "amount"]
    assert measured["inbox"] is None
    assert measured["upcasts"] == [
        {
            "event_type": "measured",
            "from_version": "1.0",
            "to_version": "2.0",
            "by": "tests.apps.desk.with_unit",
        }
    ]
    assert found["tests.apps.desk.typed"]["queue"] == "typed"
    assert found["tests.apps.desk.order"]["schema"] is None
    said = handlers(stack)
    assert "tests.apps.desk.measured\n  events    measured\n" in said
    assert "upcast    1.0 to 2.0: tests.apps.desk.with_unit" in said


def test_handlers_that_cannot_be_are_an_error(make_stack: MakeStack) -> None:
    stack = make_stack()
    said = handlers(stack, status=1, DESK_TWICE="1")
    assert "two handlers for the event type 'order.>'" in said
    assert "Traceback" not in said
