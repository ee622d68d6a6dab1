"""How each end of a task settles its message: a real prefork worker; bridge, push, and direct."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from celery_jetstream import JetStream
from celery_jetstream.testing import NatsServer, wait_until
from tests.conftest import Names
from tests.servers import RedisServer
from tests.stack import Stack

SETTINGS: dict[str, Any] = {
    "jetstream_backoff": [0.2],
    "jetstream_ack_wait": 5,
    "jetstream_max_deliver": 3,
    "jetstream_outage_errors": ["tests.apps.desk.OutOfServiceError"],
}


@pytest.fixture(scope="module", params=["bridge", "push", "direct"])
def desk(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    nats_server: NatsServer,
    redis_server: RedisServer,
) -> Iterator[Stack]:
    """One worker (and one bridge) for all of these tests: starting a worker costs seconds."""
    directory: Path = tmp_path_factory.mktemp("desk")
    mark = f"{request.param}-{os.getpid()}"
    names = Names(f"desk-{mark}", f"hub-{mark}", f"settlement-{mark}")
    stack = Stack(
        directory,
        nats_server.url,
        redis_server.url,
        names,
        direct=request.param == "direct",
        jetstream_consumer_mode="push" if request.param == "push" else "pull",
        **SETTINGS,
    )
    try:
        stack.hub.provision()
        stack.start()
        yield stack
    finally:
        stack.close()


def runs(desk: Stack, event_id: str) -> list[dict[str, Any]]:
    return [line for line in desk.ledger() if line["event_id"] == event_id]


def dead(desk: Stack, event_id: str) -> list[dict[str, Any]]:
    return [d for d in desk.dead_letters() if d["context"]["event_id"] == event_id]


def send(desk: Stack, event_type: str, timeout: float = 30, **payload: Any) -> str:
    """Publishes one event and waits until its message is settled for good."""
    (event_id,) = desk.publish(event_type, **payload)
    desk.wait_ledger(
        lambda: bool(runs(desk, event_id)) or bool(dead(desk, event_id)), timeout, event_type
    )
    wait_until(lambda: desk.left() == 0, timeout, f"{event_type} to be settled")
    return event_id


def test_returns_is_an_ack(desk: Stack) -> None:
    event_id = send(desk, "order.created")
    assert [line["what"] for line in runs(desk, event_id)] == ["handled"]
    assert not dead(desk, event_id)


def test_ignore_is_an_ack(desk: Stack) -> None:
    event_id = send(desk, "ignore")
    assert len(runs(desk, event_id)) == 1
    assert not dead(desk, event_id)


def test_retry_comes_again_by_jetstream_and_counts(desk: Stack) -> None:
    event_id = send(desk, "retry.some", fail=2)
    lines = runs(desk, event_id)
    assert [line.get("retries") for line in lines if line["what"] == "begun"] == [0, 1, 2]
    assert [line["num_delivered"] for line in lines if line["what"] == "begun"] == [1, 2, 3]
    assert lines[-1]["what"] == "handled"


def test_retry_countdown_is_the_delay(desk: Stack) -> None:
    event_id = send(desk, "retry.some", fail=1, countdown=1.5)
    first, second = (line["at"] for line in runs(desk, event_id) if line["what"] == "begun")
    assert 1.4 <= second - first < 4.5  # less than ack_wait: it was asked for, not timed out


def test_retry_with_none_left_is_a_dead_letter(desk: Stack) -> None:
    event_id = send(desk, "retry.some", fail=99)
    assert len(runs(desk, event_id)) == 4  # max_retries=3
    (letter,) = dead(desk, event_id)
    assert letter["reason"] == "max_deliveries_exceeded"
    assert letter["headers"]["x-deliveries"] == "4"


def test_retry_without_throw(desk: Stack) -> None:
    event_id = send(desk, "retry_quietly")
    assert [line["what"] for line in runs(desk, event_id)] == ["begun", "begun", "handled"]


def test_autoretry_gives_up_with_the_error(desk: Stack) -> None:
    event_id = send(desk, "auto.retry")
    assert len(runs(desk, event_id)) == 2  # max_retries=1
    (letter,) = dead(desk, event_id)
    assert letter["reason"] == "max_deliveries_exceeded"
    assert letter["context"]["error_class"] == "OSError"
    assert letter["context"]["error_message"] == "auto"


def test_reject_is_a_dead_letter(desk: Stack) -> None:
    event_id = send(desk, "reject.drop")
    (letter,) = dead(desk, event_id)
    assert letter["reason"] == "rejected"
    assert letter["context"]["error_message"] == "not for us"


def test_reject_and_requeue_comes_again(desk: Stack) -> None:
    event_id = send(desk, "reject.requeue")
    assert [line["num_delivered"] for line in runs(desk, event_id)] == [1, 2, 3, 3]
    assert not dead(desk, event_id)


def test_unrecoverable_error_is_a_dead_letter_at_once(desk: Stack) -> None:
    event_id = send(desk, "error.value")
    assert len(runs(desk, event_id)) == 1
    (letter,) = dead(desk, event_id)
    assert letter["reason"] == "unrecoverable_error"
    assert letter["context"]["error_class"] == "ValueError"
    assert letter["context"]["handler"] == "tests.apps.desk.error_value"


def test_unpicklable_error_is_judged_as_what_it_is(desk: Stack) -> None:
    """Celery's main process sees a stand-in; the settlement must not depend on that."""
    event_id = send(desk, "error.odd")
    (letter,) = dead(desk, event_id)
    assert letter["reason"] == "unrecoverable_error"
    assert letter["context"]["error_class"] == "OddError"


def test_any_other_error_is_tried_max_deliver_times(desk: Stack) -> None:
    event_id = send(desk, "error.runtime")
    assert [line["num_delivered"] for line in runs(desk, event_id)] == [1, 2, 3]
    (letter,) = dead(desk, event_id)
    assert letter["reason"] == "max_deliveries_exceeded"


def test_a_redriven_event_runs_with_all_its_attempts_anew(desk: Stack) -> None:
    event_id = send(desk, "error.runtime")
    app = Celery("desk", set_as_current=False)
    app.conf.update({**desk.settings, "jetstream_outage_errors": []})
    operator = JetStream(app)
    try:
        assert operator.dead_letters.redrive(event_id).redriven == 1
    finally:
        operator.close()
    desk.wait_ledger(lambda: len(runs(desk, event_id)) == 6, 30, "it to run again")
    wait_until(lambda: desk.left() == 0, 30, "it to be settled")
    assert [line["num_delivered"] for line in runs(desk, event_id)] == [1, 2, 3, 1, 2, 3]
    (letter,) = dead(desk, event_id)
    assert letter["context"]["handler"] == "tests.apps.desk.error_runtime"
    assert (letter["context"]["redrives"], letter["headers"]["x-redrives"]) == (1, "1")


def test_an_outage_is_never_a_dead_letter(desk: Stack) -> None:
    event_id = send(desk, "outage", fail=2)
    assert [line["what"] for line in runs(desk, event_id)][-1] == "handled"
    assert not dead(desk, event_id)


def test_killed_child_is_tried_again(desk: Stack) -> None:
    event_id = send(desk, "kill.once")
    assert [line["num_delivered"] for line in runs(desk, event_id)] == [1, 2, 2]
    assert not dead(desk, event_id)


def test_handler_that_always_kills_its_process_ends_as_one_dead_letter(desk: Stack) -> None:
    event_id = send(desk, "kill.always", timeout=60)
    assert len(runs(desk, event_id)) == 3
    (letter,) = dead(desk, event_id)
    assert letter["reason"] == "max_deliveries_exceeded"
    assert letter["context"]["error_class"] == "WorkerLostError"


def test_system_exit_is_tried_again(desk: Stack) -> None:
    event_id = send(desk, "exit")
    assert [line["what"] for line in runs(desk, event_id)] == ["begun", "begun", "handled"]


def test_hard_time_limit_is_tried_again(desk: Stack) -> None:
    event_id = send(desk, "limit.hard")
    assert [line["num_delivered"] for line in runs(desk, event_id)] == [1, 2, 2]


def test_soft_time_limit_is_tried_again(desk: Stack) -> None:
    event_id = send(desk, "limit.soft")
    assert [line["num_delivered"] for line in runs(desk, event_id)] == [1, 2, 2]


def test_middleware_settles_without_the_handler(desk: Stack) -> None:
    event_id = send(desk, "passed_over")
    assert [line["what"] for line in runs(desk, event_id)] == ["passed over"]


def test_headers_reach_the_handler(desk: Stack) -> None:
    result = desk.hub.publish("traced", {"id": 1}, headers={"Trail": "from here"})
    desk.wait_ledger(lambda: bool(runs(desk, result.event_id)), 30, "traced")
    assert runs(desk, result.event_id)[0]["trail"] == "from here"


def test_a_payload_that_fits_is_typed(desk: Stack) -> None:
    event_id = send(desk, "measured", amount=2)
    (line,) = runs(desk, event_id)
    assert (line["what"], line["amount"]) == ("handled", 2.0)


def test_a_payload_that_does_not_fit_is_a_dead_letter_with_the_paths(desk: Stack) -> None:
    event_id = send(desk, "measured", amount="2", unit="stone")
    assert not runs(desk, event_id)
    (letter,) = dead(desk, event_id)
    assert letter["reason"] == "invalid_payload"
    assert letter["context"]["error_class"] == "PayloadError"
    assert letter["context"]["error_message"] == (
        "payload.amount: must be a number, and is str; "
        "payload.unit: must be one of 'kg', 'lb', and is str"
    )
    assert letter["context"]["deliveries"] == 1


def test_no_handler_is_a_dead_letter_with_the_original_bytes(desk: Stack) -> None:
    before = desk.dead_count()
    body = json.dumps({"event_id": "e-1", "event_type": "unheard", "payload": 1, "x": "é"}).encode()
    publish_raw(desk, body, {"trail": "t", "Nats-Msg-Id": "e-1"})
    wait_until(lambda: desk.dead_count() > before, 30, "the dead letter")
    letter = desk.dead_letters()[-1]
    assert letter["reason"] == "no_handler"
    assert letter["body"] == body
    assert letter["headers"]["trail"] == "t"
    assert letter["headers"]["Nats-Msg-Id"].startswith(f"dlq-{desk.names.stream_name}-")
    assert letter["context"]["original_subject"] == subject(desk)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"not json", "malformed_json"),
        (b"\xff\xfe", "malformed_json"),
        (b"[1, 2]", "invalid_envelope"),
        (b"{}", "invalid_envelope"),
        (b'{"event_type": 7, "payload": {}}', "invalid_envelope"),
        (b'{"event_type": "order.x", "payload": NaN}', "malformed_json"),
    ],
)
def test_what_is_no_event_is_a_dead_letter(desk: Stack, body: bytes, reason: str) -> None:
    before = desk.dead_count()
    publish_raw(desk, body, {})
    wait_until(lambda: desk.dead_count() > before, 30, "the dead letter")
    letter = desk.dead_letters()[-1]
    assert (letter["reason"], letter["body"]) == (reason, body)


def test_dead_letter_keeps_the_bytes_of_a_foreign_producer(desk: Stack) -> None:
    """The worker has the envelope as Python values only; the bytes come from the stream."""
    body = b'{ "event_type":"error.value",  "event_id":"spaced",\n "payload": {"id": 1.50} }'
    publish_raw(desk, body, {"Nats-Expected-Stream": desk.names.stream_name, "kept": "yes"})
    wait_until(lambda: bool(dead(desk, "spaced")), 30, "the dead letter")
    (letter,) = dead(desk, "spaced")
    assert letter["body"] == body
    assert letter["headers"]["kept"] == "yes"
    assert "Nats-Expected-Stream" not in letter["headers"]


def subject(desk: Stack) -> str:
    return f"{desk.names.destination_app}.sync.{desk.names.app_name}"


def publish_raw(desk: Stack, body: bytes, headers: dict[str, str]) -> None:
    async def go() -> None:
        session = await desk.hub.connection.session()
        answer = await session.ask(subject(desk), body, headers or None)
        assert "seq" in json.loads(answer.data), answer.data

    desk.hub.connection.run(go)
