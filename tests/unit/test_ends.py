"""What the inbox has to say of an end: recorded or not, and what it amounts to."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery
from celery.exceptions import Ignore, Retry

from celery_jetstream import Ack, DeadLetter, Nak
from celery_jetstream.delivery import Delivery
from celery_jetstream.ends import settle
from celery_jetstream.exceptions import InboxUnavailableError
from celery_jetstream.handlers import JetStreamTask
from celery_jetstream.inbox_rows import Answer, Verdict
from celery_jetstream.settlement import End, Policy

DELIVERY = Delivery.from_reply("$JS.ACK.s.c.9.1.1.1.0")  # the ninth
LAST = Policy(limit=3, backoff=(1.0, 2.0, 3.0), ack_wait=30.0, handler="shop.pay")


class Recording:
    """An inbox that answers as it is told, and says what it was asked."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.asked: list[str] = []

    def fail(self, entry: Any, error: str, patience: float) -> Answer:
        self.asked.append("fail")
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def release(self, entry: Any) -> None:
        self.asked.append("release")

    def is_outage(self, error: BaseException) -> bool:
        return isinstance(error, InboxUnavailableError)

    def is_lost_conflict(self, error: BaseException) -> bool:
        return "deadlock" in str(error)


def settled(
    end: Any, answer: Any = None, request: Any = None, inbox: Recording | None = None
) -> tuple[list[Any], list[str]]:
    """The settlements, and what the inbox was asked."""
    found: list[Any] = []
    inbox = inbox or Recording(answer or Answer(Verdict.OURS, 1))
    app = Celery("ends", broker="memory://", set_as_current=False)
    app.jetstream = SimpleNamespace(
        inbox=inbox,
        settler=SimpleNamespace(settle=lambda _, settlement, **__: found.append(settlement)),
        config=SimpleNamespace(ack_wait=30.0),
    )

    class Pay(JetStreamTask):
        name = "shop.pay"
        inbox = True

        def policy(self, config: Any) -> Policy:
            return LAST

    task = Pay()
    task.bind(app)
    settle(task, DELIVERY, end, header={"event_id": "e"}, request=request)
    return found, inbox.asked


@pytest.mark.parametrize(
    ("end", "answer", "settlement", "asked"),
    [
        (End.RETURNED, None, Ack(), []),
        (Ignore(), None, Ack(), []),
        (RuntimeError(), Answer(Verdict.OURS, 1), Nak(1.0), ["fail"]),
        (RuntimeError(), Answer(Verdict.OURS, 2), Nak(2.0), ["fail"]),
        (Retry(when=7), Answer(Verdict.OURS, 2), Nak(7.0), ["fail"]),
        (RuntimeError(), Answer(Verdict.PROCESSED), Ack(), ["fail"]),
        (End.REVOKED, Answer(Verdict.PROCESSED), Ack(), ["fail"]),
        (RuntimeError(), Answer(Verdict.BUSY), Nak(30.0), ["fail"]),
        (DeadLetter("odd"), Answer(Verdict.PROCESSED), DeadLetter("odd"), ["fail"]),
        (End.CUT_OFF, None, Nak(0.0), ["release"]),
        (End.NOT_BEGUN, None, Nak(0.0), []),
        (End.UNKNOWN_TASK, None, Nak(3.0), []),
    ],
)
def test_the_row_decides(end: Any, answer: Any, settlement: Any, asked: list[str]) -> None:
    """Whatever ``num_delivered`` says: it is nine here, and three attempts are allowed."""
    assert settled(end, answer) == ([settlement], asked)


def test_none_left_by_the_row_is_a_dead_letter() -> None:
    ((dead,), _) = settled(RuntimeError("no"), Answer(Verdict.OURS, 3))
    assert dead == DeadLetter("max_deliveries_exceeded", "RuntimeError", "no")


def test_an_outage_is_no_failure_and_pauses_the_handler() -> None:
    ((nak,), asked) = settled(InboxUnavailableError("away"))
    assert (nak.pause, asked) == ("shop.pay", ["release"])
    assert 1.5 <= nak.delay <= 3.0
    ((nak,), _) = settled(InboxUnavailableError("deadlock detected"))
    assert nak.pause == ""


def test_a_failure_that_cannot_be_recorded_is_an_outage() -> None:
    ((nak,), _) = settled(ValueError(), InboxUnavailableError("away"))
    assert (type(nak), nak.pause) == (Nak, "shop.pay")


def test_a_record_that_fails_for_no_outage_leaves_a_settlement_all_the_same() -> None:
    ((dead,), _) = settled(RuntimeError("no"), KeyError("a defect"))
    assert isinstance(dead, DeadLetter)


def test_what_the_inbox_did_not_let_run_has_not_failed() -> None:
    """Else a duplicate that came while another ran would cost an attempt."""
    refused = SimpleNamespace(jetstream_refused=True)
    assert settled(Nak(30.0), request=refused) == ([Nak(30.0)], [])
    ran = SimpleNamespace(jetstream_refused=False, jetstream_attempt=1)
    assert settled(Nak(5.0), request=ran) == ([Nak(5.0)], ["fail"])
