"""A message is handed back or begins, never both: a pool of greenlets accepts in between."""

from __future__ import annotations

import time
import uuid
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from billiard.einfo import ExceptionInfo
from celery import Celery
from celery.exceptions import TaskRevokedError, WorkerLostError

from celery_jetstream import jetstream_handler
from celery_jetstream.delivery import Delivery
from celery_jetstream.handlers import HEADER, LEASE
from celery_jetstream.request import JetStreamRequest, Keeper, Source
from celery_jetstream.settlement import Nak


@jetstream_handler("handed.back", name="tests.handed_back")
def handed_back(event: Any) -> None: ...


class Bench:
    """A request as the worker makes it, and what was acknowledged and settled, in order."""

    def __init__(self, kind: Callable[..., Any] = SimpleNamespace) -> None:
        self.did: list[object] = []
        self.while_acknowledging: Callable[[], object] = lambda: None
        app = Celery("bench", broker="memory://", set_as_current=False)
        app.jetstream = SimpleNamespace(  # the worker's side; there is no server in this test
            keeper=SimpleNamespace(
                hold=lambda _: None, begun=lambda _: None, child_lost=lambda _: None
            ),
            settler=SimpleNamespace(settle=lambda _, settlement, **__: self.did.append(settlement)),
            config=SimpleNamespace(
                backoff=(1.0,),
                max_deliver=5,
                ack_wait=30.0,
                unrecoverable_errors=(),
                outage_errors=(),
                use_inbox=False,
            ),
        )
        app.finalize()
        task = app.tasks["tests.handed_back"]
        delivery = Delivery.from_reply("$JS.ACK.s.c.1.1.1.1.0")
        header = {**delivery.to_header(), LEASE: None}
        message = kind(
            headers={"id": uuid.uuid4().hex, "task": task.name, HEADER: header},
            properties={},
            delivery_info={},
            body=b"[]",
            content_type="application/json",
            content_encoding="utf-8",
            payload=([{}], {}, {}),
        )
        self.request = JetStreamRequest(
            message, app=app, task=task, on_ack=self._acknowledge, hostname="bench"
        )

    def _acknowledge(self, *_: object) -> None:
        self.did.append("acknowledged")
        self.while_acknowledging()

    def accept(self) -> None:
        self.request.on_accepted(1, time.monotonic())


def test_what_is_being_handed_back_does_not_begin() -> None:
    bench = Bench()

    def accepted_meanwhile() -> None:
        bench.while_acknowledging = lambda: None
        with pytest.raises(TaskRevokedError):
            bench.accept()
        bench.did.append("refused")

    bench.while_acknowledging = accepted_meanwhile
    bench.request.hand_back()
    assert bench.did[-1] == Nak(0)
    assert "refused" in bench.did
    assert bench.request.time_start is None


def test_what_has_begun_is_not_handed_back() -> None:
    bench = Bench()
    bench.accept()
    bench.request.hand_back()
    assert bench.did == ["acknowledged"]


class FromStream(Source):
    """A message of direct mode's, and what it was told of its end."""

    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)
        self.delivery = Delivery.from_reply("$JS.ACK.s.c.1.1.1.1.0")
        self.ends: list[BaseException | None] = []

    def ended(self, error: BaseException | None) -> None:
        self.ends.append(error)


class Result:
    """What a prefork pool makes of a task; Celery keeps a weak reference to it."""

    _write_to: object = None


def test_what_a_child_has_is_not_handed_back_though_the_pool_forgot_it() -> None:
    """A pool that stops drops its results; the child has begun, or will, all the same."""
    bench, result = Bench(), Result()
    bench.request._apply_result = weakref.ref(result)
    result._write_to = "the child's pipe"
    del result
    bench.request.hand_back()
    assert bench.did == ["acknowledged"]


def test_a_child_is_lost_while_others_return() -> None:
    """In a pool with threads another one notes what returns; it once cost a settlement."""
    acked: list[object] = []
    settler: Any = SimpleNamespace(ack_again=acked.append)
    connection: Any = SimpleNamespace(config=None)
    keeper = Keeper(connection, settler, claimant="bench")

    def returned(pid: int) -> None:
        request: Any = SimpleNamespace(worker_pid=pid, delivery=object())
        keeper.returned(request)

    for _ in range(100):
        returned(1)
    settler.ack_again = lambda delivery: (acked.append(delivery), returned(2))
    keeper.child_lost(1)
    assert len(acked) == 100


def test_what_no_child_has_is_handed_back() -> None:
    bench, result = Bench(), Result()
    bench.request._apply_result = weakref.ref(result)
    bench.request.hand_back()
    assert bench.did == ["acknowledged", Nak(0)]


def test_a_child_that_dies_before_it_accepts_leaves_no_copy_unacknowledged() -> None:
    """Else its place in the worker's prefetch (or in what a direct worker holds) is never free."""
    bench = Bench()
    try:
        raise WorkerLostError("killed")
    except WorkerLostError:
        bench.request.on_failure(ExceptionInfo())
    assert bench.did == [Nak(1.0), "acknowledged"]


def test_a_source_hears_of_a_child_that_died() -> None:
    """Else a handler whose probe was killed paused for a minute, though its database was back."""
    bench = Bench(FromStream)
    bench.accept()
    try:
        raise WorkerLostError("killed")
    except WorkerLostError:
        bench.request.on_failure(ExceptionInfo())
    assert bench.request.message.ends == [None]
