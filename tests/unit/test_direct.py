"""The pure parts of direct mode: how much to hold, and messages made from a template."""

from __future__ import annotations

import os
import select
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from celery import Celery
from celery.worker import state as worker_state

from celery_jetstream import JetStream, jetstream_handler
from celery_jetstream.config import Config
from celery_jetstream.delivery import Delivery
from celery_jetstream.direct import Direct, Intake
from celery_jetstream.dispatcher import TaskMessages
from celery_jetstream.handlers import Handlers
from celery_jetstream.inflight import Flight
from celery_jetstream.pace import MOST_AHEAD, Pace
from celery_jetstream.settlement import Nak
from celery_jetstream.threads import Wake


@pytest.fixture(autouse=True)
def _nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Celery's set is the process's: the requests of other tests are in it until they are freed."""
    monkeypatch.setattr(worker_state, "active_requests", set())


class Clock:
    now = 100.0
    total = 0

    def __call__(self) -> float:
        return self.now


def began(pace: Pace, clock: Clock, count: int, each: float) -> None:
    for _ in range(count):
        clock.now += each
        clock.total += 1
        pace.began()


@pytest.mark.parametrize(("each", "ahead"), [(0.01, 20), (0.001, 200), (0.0001, MOST_AHEAD)])
def test_a_fifth_of_a_second_of_work(each: float, ahead: int) -> None:
    clock = Clock()
    pace = Pace(clock, lambda: clock.total)
    assert pace.ahead() == 0
    began(pace, clock, int(0.5 / each), each)
    assert pace.ahead() == pytest.approx(ahead, rel=0.1)


def test_what_was_fast_a_moment_ago_is_forgotten() -> None:
    clock = Clock()
    pace = Pace(clock, lambda: clock.total)
    began(pace, clock, 500, 0.001)
    clock.now += 0.3
    assert pace.ahead() == 0
    began(pace, clock, 3, 0.3)
    assert pace.ahead() == 0


def test_a_wake_is_seen_once_and_again() -> None:
    wake = Wake()
    for _ in range(3):
        wake.set()
    assert select.select([wake.fileno()], [], [], 1)[0]
    wake.clear()
    assert not select.select([wake.fileno()], [], [], 0)[0]
    wake.set()
    assert select.select([wake.fileno()], [], [], 1)[0]
    wake.close()
    wake.set()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(wake.fileno())


@jetstream_handler("taken.*", name="tests.taken")
def taken(event: object) -> None: ...


class Desk:
    """An intake between what is no server and what is no worker: one message, one strategy."""

    def __init__(self, strategy: Callable[..., object] | None) -> None:
        self.settled: list[object] = []
        self.asked = 0
        app = Celery("desk", broker="memory://", set_as_current=False)
        config = Config(app_name="a", destination_app="b", backoff=(3.0,))
        app.conf.worker_disable_prefetch = False
        app.finalize()
        jetstream = SimpleNamespace(
            app=app,
            config=config,
            check=lambda: Handlers([app.tasks["tests.taken"]]),
            ensure_topology=None,
            connection=SimpleNamespace(call_soon=lambda _: self._ask()),
            settler=SimpleNamespace(
                settle=lambda _, settlement, **__: self.settled.append(settlement)
            ),
            keeper=SimpleNamespace(held=list),
        )
        consumer = SimpleNamespace(
            app=app,
            hub=None,
            timer=None,
            pool=SimpleNamespace(is_green=False, num_processes=2),
            strategies={} if strategy is None else {"tests.taken": strategy},
            on_task_message=set(),
            initial_prefetch_count=0,
            connection_errors=(),
        )
        self.intake = Intake(jetstream, consumer)
        self.intake._feeds = [SimpleNamespace(is_short=lambda _: True)]  # type: ignore[list-item]

    def _ask(self) -> None:
        self.asked += 1

    def arrive(self) -> None:
        body = b'{"event_id": "e", "event_type": "taken.one", "payload": {}}'
        message = SimpleNamespace(subject="b.sync.a", data=body)
        delivery = Delivery.from_reply("$JS.ACK.s.c.1.1.1.1700000000000000000.0", None)
        self.intake.arrive(delivery, message)  # type: ignore[arg-type]
        self.intake._hand_over()


def fail(*_: object) -> None:
    raise LookupError("of Celery")


@pytest.mark.parametrize("strategy", [None, fail])
def test_what_celery_cannot_take_comes_again_and_leaves_its_place(
    strategy: Callable[..., object] | None,
) -> None:
    desk = Desk(strategy)
    desk.arrive()
    assert desk.settled == [Nak(3.0)]
    assert desk.intake.room(0, 0) == 2
    assert desk.asked == 1


def test_what_it_holds_takes_its_room_until_it_begins() -> None:
    taken = []
    desk = Desk(lambda message, body, ack, reject, callbacks: taken.append((message, ack)))
    desk.arrive()
    assert not desk.settled
    ((message, ack),) = taken
    assert message.headers["jetstream"]["direct"] is True
    before = desk.intake._ahead
    ack(None, ())
    ack(None, ())
    assert (before, desk.intake._ahead) == (1, 0)


@pytest.mark.parametrize(
    ("direct", "dedicated", "handlers", "included"),
    [
        (False, False, True, False),
        (True, False, True, True),
        (False, True, True, True),
        (True, False, False, False),
    ],
)
def test_who_takes_messages(
    direct: bool, dedicated: bool, handlers: bool, included: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a handler each message would become a dead letter."""
    jetstream = SimpleNamespace(
        dedicated=dedicated, config=SimpleNamespace(direct=direct), check=lambda: handlers
    )
    consumer = SimpleNamespace(app=SimpleNamespace(jetstream=jetstream))
    assert Direct(consumer).include_if(consumer) is included
    assert ("knows no @jetstream_handler" in caplog.text) is (not handlers)


@jetstream_handler("template.*", name="templates.one", time_limit=7)
def one(event: object) -> None: ...


@pytest.fixture
def app() -> Celery:
    app = Celery("templates", broker="memory://", set_as_current=False)
    app.conf.update(jetstream_app_name="a", jetstream_destination_app="b")
    JetStream(app)
    app.finalize()
    return app


@pytest.mark.parametrize("protocol", [1, 2])
def test_a_message_of_the_template_is_the_one_that_celery_writes(
    app: Celery, protocol: int
) -> None:
    app.conf.update(task_protocol=protocol, task_send_sent_event=True)
    task, messages = app.tasks["templates.one"], TaskMessages(app, "here")
    made = [messages.make(flight(task, number)) for number in (1, 2)]
    for number, message in enumerate(made, 1):
        written = app.amqp.as_task_v2(
            f"s-{number}",
            task.name,
            ({"event_type": f"template.{number}"},),
            {},
            retries=number - 1,
            time_limit=7,
            argsrepr=f"('template.{number}',)",
            kwargsrepr="{}",
            ignore_result=task.ignore_result,
            origin="here",
            create_sent_event=True,
        )
        assert message.sent_event == written.sent_event
        assert message.headers == written.headers
        assert message.properties == written.properties
        assert message.body == written.body
    assert made[0].headers is not made[1].headers


def flight(task: object, number: int) -> Flight:
    delivery = Delivery.from_reply(f"$JS.ACK.s.c.{number}.{number}.1.1.0")
    envelope = {"event_type": f"template.{number}"}
    return Flight(delivery, "b.sync.a", b"", task, "e", envelope)
