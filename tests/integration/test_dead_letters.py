"""``jetstream.dead_letters``: read without taking, sent again once, deleted when that is stored."""

from __future__ import annotations

import base64
import gzip
import io
import json
import logging
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from celery_jetstream import JetStream, JetStreamTask, dead_letters, deadletter_store, redrive
from celery_jetstream.deadletter_filter import EVERY_LETTER, DeadLetterFilter
from celery_jetstream.delivery import Delivery
from celery_jetstream.exceptions import (
    EventError,
    NotConnectedError,
    PayloadError,
    PermissionDeniedError,
    SubjectError,
    TopologyError,
)
from celery_jetstream.inbox_rows import Entry
from celery_jetstream.outcomes import Message
from celery_jetstream.payloads import payload_type
from celery_jetstream.settlement import DeadLetter
from tests.burials import GEM_BODY, GEM_CONTEXT, Desk, gem_headers
from tests.conftest import Names
from tests.databases import Database
from tests.servers import NatsServer

MakeDesk = Callable[..., Desk]


@pytest.fixture(params=["nats_server", "old_nats_server"])
def any_desk(make_desk: MakeDesk, request: pytest.FixtureRequest) -> Desk:
    """On the newest server and on the oldest."""
    return make_desk(request.getfixturevalue(request.param).url)


# -- reading -----------------------------------------------------------------------------------


def test_a_dead_letter_says_what_died_where_and_why(any_desk: Desk) -> None:
    (event_id,) = any_desk.bury(headers={"trail": "x"})
    (letter,) = any_desk.letters.list()
    assert letter.event_id == event_id
    assert letter.event_type == "order.placed"
    assert letter.source == any_desk.names.destination_app
    assert (letter.reason, letter.handler) == ("unrecoverable_error", "desk.order")
    assert (letter.error_class, letter.error_message) == ("ValueError", "no colour")
    assert (letter.deliveries, letter.redrives) == (1, 0)
    assert (letter.original_subject, letter.original_sequence) == (any_desk.subject, 1)
    assert letter.headers["trail"] == "x"
    assert 0 <= letter.age < 30
    assert letter.problems == ()
    assert json.loads(letter.body)["payload"] == {"id": 0}
    assert any_desk.letters.get(event_id) == letter
    assert any_desk.letters.get(letter.sequence) == letter
    assert any_desk.letters.get(1) is None
    assert any_desk.letters.get("nobody") is None


def test_all_are_read_in_order_among_other_messages(any_desk: Desk) -> None:
    """More than one page, with holes and other subjects in between."""
    expected = []
    for number in range(3):
        any_desk.publish("noise", 60)
        any_desk.take(60, ack=number % 2 == 0)
        expected += any_desk.bury(f"order.{number}", 100)
    letters = any_desk.letters
    assert [one.event_id for one in letters.list(limit=1000)] == expected
    some = letters.list(DeadLetterFilter(event_type="order.1"), limit=10)
    assert [one.event_id for one in some] == expected[100:110]
    rest = letters.list(DeadLetterFilter(event_type="order.1"), 1000, some[-1].sequence)
    assert [one.event_id for one in rest] == expected[110:200]
    counts = letters.count()
    assert counts.total == 300
    assert counts.by_event_type == {f"order.{number}": 100 for number in range(3)}
    assert counts.by_handler == {"desk.order": 300}
    told: list[tuple[int, int]] = []
    assert letters.export(io.StringIO(), progress=lambda *one: told.append(one)) == 300
    assert (told[0], told[-1]) == ((0, 300), (300, 300))
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_a_crowd_behind_a_desert_is_read_in_pages(desk: Desk) -> None:
    """Where there are few the strides grow; a page is not to be all that comes then."""
    desk.put(GEM_BODY, gem_headers())
    for _ in range(6):
        desk.publish("noise", 500)
        desk.put(GEM_BODY, gem_headers())
    crowd = [Message("", desk.letters.store.subject, GEM_BODY, gem_headers()) for _ in range(1500)]
    assert all(desk.jetstream.connection.run(desk.jetstream.publisher.send, crowd, 10))
    pages = [page for page, _ in desk.letters.store.pages(EVERY_LETTER)]
    numbers = [letter.sequence for page in pages for letter in page]
    assert numbers == sorted(set(numbers))
    assert len(numbers) == 1507
    assert max(map(len, pages)) <= 512


def test_where_the_last_one_was_deleted_the_others_are_still_found(any_desk: Desk) -> None:
    """2.9.10 answers then that the subject has no last message."""
    any_desk.bury(count=3)
    last = any_desk.letters.list()[-1]
    assert any_desk.letters.purge(last.sequence).purged == 1
    assert any_desk.letters.count().total == 2


def test_another_consumer_of_the_dead_letters_is_not_disturbed(any_desk: Desk) -> None:
    stream, name = any_desk.names.stream_name, any_desk.names.app_name
    config = {
        "durable_name": "watch",
        "ack_policy": "explicit",
        "filter_subject": f"{name}.sync.dlq",
        "ack_wait": 60_000_000_000,
    }
    made = any_desk.api(
        f"CONSUMER.DURABLE.CREATE.{stream}.watch", stream_name=stream, config=config
    )
    assert "error" not in made
    second = {**config, "durable_name": "second"}
    refused = any_desk.api(
        f"CONSUMER.DURABLE.CREATE.{stream}.second", stream_name=stream, config=second
    )
    assert refused["error"]["err_code"] in (10099, 10100)  # why we read without a consumer
    event_ids = any_desk.bury(count=4)
    (held,) = any_desk.take(1, consumer="watch")
    assert len(any_desk.letters.list()) == 4  # also what that one has in hand
    assert any_desk.letters.redrive(event_ids[2]).redriven == 1
    state = any_desk.api(f"CONSUMER.INFO.{stream}.watch")
    assert (state["num_ack_pending"], state["num_redelivered"]) == (1, 0)
    rest = any_desk.take(2, consumer="watch")
    assert [json.loads(one.data)["event_id"] for one in (held, *rest)] == [
        event_ids[0],
        event_ids[1],
        event_ids[3],
    ]


def test_without_a_stream_it_says_what_to_do(nats_server: NatsServer, names: Names) -> None:
    app = Celery("desk", broker="memory://", set_as_current=False)
    app.conf.update(
        jetstream_nats_urls=nats_server.url,
        jetstream_stream_name=names.stream_name,
        jetstream_app_name=names.app_name,
        jetstream_destination_app=names.destination_app,
    )
    jetstream = JetStream(app)
    with pytest.raises(TopologyError, match="jetstream provision"):
        jetstream.dead_letters.count()
    jetstream.close()


# -- sending again -----------------------------------------------------------------------------


def test_a_redriven_event_is_the_same_again_and_its_dead_letter_is_gone(any_desk: Desk) -> None:
    """At once: the duplicate window still knows the event's own id."""
    body = b'{"event_type": "order.placed",  "payload": {"id": "\\u00e9"}, "event_id": "e-1"}'
    headers = {"Nats-Msg-Id": "e-1", "trail": "x", "traceparent": "00-1-2-01"}
    any_desk.jetstream.connection.run(_store, any_desk, body, headers)
    any_desk.give_up()
    assert any_desk.letters.redrive(EVERY_LETTER, by="ada").redriven == 1
    assert any_desk.count() == 0
    (message,) = any_desk.take(1)
    assert message.subject == any_desk.subject
    assert message.data == body
    again = dict(message.headers)
    assert again.pop("Nats-Msg-Id").startswith(f"redrive-{any_desk.names.stream_name}-")
    assert again.pop("x-redriven-at").endswith("Z")
    assert again == {
        "trail": "x",
        "traceparent": "00-1-2-01",
        "x-redrives": "1",
        "x-redriven-by": "ada",
    }


async def _store(desk: Desk, body: bytes, headers: dict[str, str]) -> None:
    session = await desk.jetstream.connection.session()
    assert b'"seq"' in (await session.ask(desk.subject, body, headers)).data


def test_what_dies_again_counts_its_redrives_up_to_the_cap(
    make_desk: MakeDesk, nats_server: NatsServer
) -> None:
    desk = make_desk(nats_server.url, jetstream_max_redrives=2)
    (event_id,) = desk.bury()
    for redrives in (1, 2):
        assert desk.letters.redrive(event_id, by=f"ada {redrives}").redriven == 1
        desk.give_up()
        (letter,) = desk.letters.list()
        assert letter.redriven_by == f"ada {redrives}"
        assert letter.redriven_at.endswith("Z")
        assert (letter.redrives, letter.event_id) == (redrives, event_id)
        assert json.loads(letter.headers["x-dlq-context"])["redrives"] == redrives
    refused = desk.letters.redrive(event_id)
    assert (refused.redriven, refused.skipped) == (0, 1)
    assert "jetstream_max_redrives is 2" in refused.problems[0]
    assert desk.count() == 1
    assert desk.letters.redrive(event_id, max_redrives=3, dry_run=True).redriven == 1
    assert desk.letters.redrive(event_id, force=True).redriven == 1
    assert desk.count() == 0


def test_the_count_outlives_headers_that_did_not_fit(desk: Desk) -> None:
    """A dead letter that is too large loses its user's headers, and is counted all the same."""
    context = {**GEM_CONTEXT, "redrives": 7}
    desk.put(GEM_BODY, gem_headers(context))
    assert desk.letters.list()[0].redrives == 7


def test_a_redrive_that_was_cut_off_before_the_deletion_does_not_double(
    any_desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    event_ids = any_desk.bury(count=5)

    def cut_off(*_: Any) -> None:
        raise NotConnectedError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(deadletter_store.DeadLetterStore, "remove", cut_off)
        assert "killed" in str(any_desk.letters.redrive(EVERY_LETTER).error)
    assert any_desk.count() == 5
    again = any_desk.letters.redrive(EVERY_LETTER)
    assert (again.redriven, again.duplicates, again.error) == (5, 5, None)
    assert any_desk.count() == 0
    assert any_desk.event_ids() == event_ids


def test_what_dies_while_it_runs_is_not_sent_again_by_the_same_redrive(desk: Desk) -> None:
    """Else an event that fails at once would go round for ever."""
    desk.bury(count=20)
    rounds = 0

    def fail_at_once() -> bool:
        nonlocal rounds
        if rounds:
            desk.give_up(desk.count(desk.subject))
        rounds += 1
        return False

    result = desk.letters.redrive(EVERY_LETTER, rate=1000, limit=None, stop=fail_at_once)
    assert result.redriven == 20
    assert rounds > 1


def test_a_purge_counts_what_it_has_deleted_and_not_what_another_did(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.bury(count=3)
    remove = desk.letters.store.remove

    def after_another(sequences: Sequence[int]) -> int:
        assert remove(sequences[:2]) == 2
        return remove(sequences)

    monkeypatch.setattr(desk.letters.store, "remove", after_another)
    assert desk.letters.purge(EVERY_LETTER).purged == 1


def test_filters_limits_and_stopping(desk: Desk) -> None:
    desk.bury("order.placed", 6)
    desk.bury("user.created", 4)
    letters = desk.letters
    orders = DeadLetterFilter(event_type="order.*")
    dry = letters.redrive(orders, dry_run=True)
    assert (dry.redriven, desk.count()) == (6, 10)
    some = letters.redrive(orders, limit=2)
    assert (some.redriven, desk.count()) == (2, 8)
    stopped = letters.redrive(EVERY_LETTER, stop=lambda: True)
    assert (stopped.redriven, stopped.error) == (0, "stopped")
    ids = tuple(str(one.sequence) for one in letters.list(orders))
    assert letters.redrive(DeadLetterFilter(ids=(*ids[:2], "999999"))).redriven == 2
    assert letters.purge(orders, dry_run=True).purged == 2
    assert letters.purge(EVERY_LETTER, stop=lambda: True).error == "stopped"
    assert letters.purge(EVERY_LETTER, limit=1).purged == 1
    assert letters.purge(orders).purged == 1
    assert letters.purge(EVERY_LETTER, limit=0).purged == 0
    assert letters.count().by_event_type == {"user.created": 4}


def test_progress_is_told_in_letters_that_were_counted_first(desk: Desk) -> None:
    """Also where other messages lie between them, and where they are deleted one by one."""
    desk.bury("order.placed", 6)
    desk.publish("noise", 50)
    desk.bury("user.created", 4)
    letters, orders = desk.letters, DeadLetterFilter(event_type="order.*")
    told: list[tuple[int, int]] = []

    def tell(*one: int) -> None:
        told.append((one[0], one[1]))

    letters.redrive(orders, rate=1000, limit=2, dry_run=True, progress=tell)
    letters.redrive(orders, rate=10, limit=2, progress=tell)
    letters.purge(orders, progress=tell)
    letters.export(io.StringIO(), progress=tell)
    letters.purge(EVERY_LETTER, limit=3, progress=tell)
    letters.redrive(EVERY_LETTER, progress=tell)
    assert told == [
        *[(0, 2), (2, 2)],
        *[(0, 2), (1, 2), (2, 2)],
        *[(0, 4), (4, 4)],
        *[(0, 4), (4, 4)],
        *[(0, 3), (3, 3)],
        *[(0, 1), (1, 1)],
    ]


def test_a_rate_is_kept(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the clock that it looks at: 30 events at 100 a second begin in 0.3 s less one page."""
    desk.bury(count=30)
    slept = []
    monkeypatch.setattr(dead_letters.time, "monotonic", lambda: 100.0 + sum(slept))
    monkeypatch.setattr(dead_letters.time, "sleep", slept.append)
    assert desk.letters.redrive(EVERY_LETTER, rate=100).redriven == 30
    assert sum(slept) == pytest.approx(0.3, abs=0.11)


def test_what_a_pause_has_cost_is_not_made_up_for_beyond_the_rate(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An outage in the middle, or a long way to the next: then not all at once."""
    desk.bury(count=40)
    slept, gone = list[float](), list[float]()
    monkeypatch.setattr(dead_letters.time, "monotonic", lambda: 100.0 + sum(slept) + sum(gone))
    monkeypatch.setattr(dead_letters.time, "sleep", slept.append)

    def lose_time() -> bool:
        if slept and not gone:
            gone.append(60.0)
        return False

    assert desk.letters.redrive(EVERY_LETTER, rate=100, stop=lose_time).redriven == 40
    assert sum(slept) == pytest.approx(0.3, abs=0.11)


def test_a_letter_that_is_purged_before_its_turn_is_not_sent(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also at a rate at which a page would last for minutes: it is read when it is sent."""
    first, second, third = desk.bury(count=3)
    slept = list[float]()

    def meanwhile(seconds: float) -> None:
        if not slept:
            assert desk.letters.purge(second).purged == 1
        slept.append(seconds)

    monkeypatch.setattr(dead_letters.time, "monotonic", lambda: 100.0 + sum(slept))
    monkeypatch.setattr(dead_letters.time, "sleep", meanwhile)
    assert desk.letters.redrive(EVERY_LETTER, rate=1).redriven == 2
    assert desk.event_ids() == [first, third]


@pytest.mark.parametrize("wrong", [{"rate": 0}, {"rate": "200/s"}, {"limit": -1}])
def test_a_rate_or_limit_that_is_none_is_refused(desk: Desk, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
        desk.letters.redrive(EVERY_LETTER, **wrong)


def test_bodies_that_are_packed_or_no_text_are_restored(desk: Desk) -> None:
    desk.put(
        gzip.compress(GEM_BODY),
        {**_our_headers(desk), "x-dlq-encoding": "gzip"},
    )
    desk.put(b"\xff\xfe", _our_headers(desk))
    desk.put(b"not packed", {**_our_headers(desk), "x-dlq-encoding": "gzip"})
    packed, binary, damaged = desk.letters.list()
    assert packed.body == GEM_BODY
    assert "cannot be unpacked" in damaged.problems[0]
    lines = io.StringIO()
    assert desk.letters.export(lines) == 3
    records = [json.loads(line) for line in lines.getvalue().splitlines()]
    assert records[0]["schema"] == 1
    assert records[0]["body"] == GEM_BODY.decode()
    assert records[1]["body_base64"] == "//4="
    result = desk.letters.redrive(EVERY_LETTER)
    assert (result.redriven, result.skipped) == (2, 1)
    assert [one.sequence for one in desk.letters.list()] == [damaged.sequence]
    first, second = desk.take(2)
    assert (first.data, second.data) == (GEM_BODY, b"\xff\xfe")
    assert not {"x-dlq-encoding", "x-dlq-context"} & set(first.headers)
    assert binary.event_id == ""


def _our_headers(desk: Desk) -> dict[str, str]:
    return {
        "Nats-Msg-Id": f"dlq-{uuid.uuid4()}",
        "x-dlq-reason": "odd",
        "x-dlq-context": json.dumps({"original_subject": desk.subject, "stream_sequence": 1}),
    }


def test_a_letter_that_names_a_foreign_subject_is_not_sent_there(desk: Desk) -> None:
    """Whoever may publish a dead letter could else have an administrator publish anything."""
    for subject in (f"$JS.API.STREAM.DELETE.{desk.names.stream_name}", "a.b", "x.sync.dlq", "*"):
        desk.put(b"", {"x-dlq-context": json.dumps({"original_subject": subject})})
    result = desk.letters.redrive(EVERY_LETTER)
    assert (result.redriven, result.skipped) == (0, 4)
    assert all("--subject" in problem for problem in result.problems)
    assert desk.letters.redrive(EVERY_LETTER, subject=desk.subject).redriven == 4
    with pytest.raises(SubjectError):
        desk.letters.redrive(EVERY_LETTER, subject="a..b")


def test_a_subject_that_no_stream_takes_holds_up_no_other_letter(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of another app: of ours it is known whose events we take."""
    monkeypatch.setattr(redrive, "TIMEOUT", 0.3)
    hub, name = desk.names.destination_app, desk.names.app_name
    for source in ("ghost", "ghost", name, name):
        context = {"original_subject": f"{source}.sync.{hub}"}
        desk.put(b"{}", {"x-dlq-context": json.dumps(context)}, app_name=hub)
    result = desk.letters.of(hub).redrive(EVERY_LETTER)
    assert (result.redriven, result.skipped, result.error) == (2, 2, None)
    assert desk.count(f"{hub}.sync.dlq") == 2


def test_an_event_is_not_sent_to_where_nobody_takes_it(desk: Desk) -> None:
    """An app was renamed: the stream still has the old subject, and no consumer takes it."""
    stream = desk.api(f"STREAM.INFO.{desk.names.stream_name}")["config"]
    old = f"old.sync.{desk.names.app_name}"
    stream["subjects"].append(old)
    assert "error" not in desk.api(f"STREAM.UPDATE.{desk.names.stream_name}", **stream)
    desk.put(b"{}", {"x-dlq-context": json.dumps({"original_subject": old})})
    result = desk.letters.redrive(EVERY_LETTER)
    assert (result.redriven, result.skipped, desk.count(old)) == (0, 1, 0)
    assert "nobody takes it" in result.problems[0]
    assert desk.letters.redrive(EVERY_LETTER, subject=desk.subject).redriven == 1


def test_an_outage_ends_a_redrive_and_nothing_is_lost(
    make_desk: MakeDesk, own_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deadletter_store, "PATIENCE", 0.2)
    monkeypatch.setattr(deadletter_store, "ASK_TIMEOUT", 0.5)
    monkeypatch.setattr(redrive, "TIMEOUT", 0.5)
    desk = make_desk(own_server.url)
    event_ids = desk.bury(count=40)
    last = desk.letters.list()[-1].sequence

    killed: list[bool] = []

    def kill_it() -> bool:
        if not killed and desk.letters.count().total < 40:
            killed.append(True)
            own_server.kill()
        return False

    result = desk.letters.redrive(EVERY_LETTER, rate=100, stop=kill_it)
    assert result.error
    assert result.redriven == 10
    own_server.start()
    monkeypatch.setattr(deadletter_store, "PATIENCE", 10.0)
    rest = desk.letters.redrive(EVERY_LETTER)
    # 2.9.10 has those again that it had deleted, and acknowledged, just before it was killed
    assert (rest.redriven - rest.duplicates, rest.error) == (30, None)
    assert desk.event_ids(after=last) == event_ids
    own_server.kill()
    monkeypatch.setattr(deadletter_store, "PATIENCE", 0.2)
    with pytest.raises(NotConnectedError):
        desk.letters.count()


# -- forced, edited ----------------------------------------------------------------------------


def test_force_has_a_processed_event_handled_once_more(
    make_desk: MakeDesk, nats_server: NatsServer, sqlite: Database
) -> None:
    desk = make_desk(nats_server.url, jetstream_database_url=sqlite.url)
    inbox = desk.jetstream.inbox
    assert desk.letters.redrive(desk.bury()[0], force=True).redriven == 1  # there is no inbox
    inbox.create_tables()
    desk.take(1)
    first, second = desk.bury(count=2)
    for event_id in (first, second):
        delivery = Delivery.from_reply("$JS.ACK.stream.workers.1.1.1.1.0")
        entry = Entry(event_id, "desk.order", "order.placed", delivery)
        inbox.run_within(entry, lambda session: None, lambda failures: None)
    desk.letters.redrive(first)
    desk.letters.redrive(second, force=True)
    assert [inbox.get(one)[0].status for one in (first, second)] == ["processed", "received"]


def test_force_sends_nothing_while_the_inbox_is_away(
    make_desk: MakeDesk, nats_server: NatsServer, tmp_path: Path
) -> None:
    desk = make_desk(nats_server.url, jetstream_database_url=f"sqlite:///{tmp_path}/no/inbox.db")
    desk.bury()
    result = desk.letters.redrive(EVERY_LETTER, force=True)
    assert (result.redriven, desk.count()) == (0, 1)
    assert "unable to open" in str(result.error)
    assert desk.event_ids() == []


@dataclass
class Order:
    id: int


def test_an_edited_event_is_read_as_its_handler_will_before_it_is_sent(desk: Desk) -> None:
    class Handle(JetStreamTask):  # type: ignore[misc]
        name = "desk.order"
        event_types = ("order.placed",)
        payload_type = payload_type(Order)

        def run(self, event: Any) -> None: ...

    desk.app.register_task(Handle())
    (event_id,) = desk.bury()
    letters = desk.letters
    with pytest.raises(PayloadError, match="id"):
        letters.edited(event_id, payload={"id": "seven"})
    with pytest.raises(EventError, match="payload is null"):
        letters.edited(event_id, payload=None)
    with pytest.raises(EventError, match="not JSON"):
        letters.edited(event_id, envelope=b"{")
    with pytest.raises(EventError, match="another event"):
        letters.edited(
            event_id, envelope=b'{"event_id":"x","event_type":"order.placed","payload":{"id":1}}'
        )
    with pytest.raises(EventError, match="no handler"):
        letters.edited(
            event_id,
            envelope=json.dumps(
                {"event_id": event_id, "event_type": "user.x", "payload": {}}
            ).encode(),
        )
    with pytest.raises(EventError, match="no dead letter"):
        letters.edited("nobody", payload={})
    letter = letters.edited(event_id, payload={"id": 7})
    assert letters.redrive_edited(letter, dry_run=True).redriven == 1
    assert letters.redrive_edited(letter).redriven == 1
    (message,) = desk.take(1)
    envelope = json.loads(message.data)
    assert (envelope["event_id"], envelope["payload"]) == (event_id, {"id": 7})
    assert desk.count() == 0


def test_an_edit_is_sent_also_where_the_letter_as_it_was_has_just_been(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    (event_id,) = desk.bury()
    with monkeypatch.context() as patch:
        patch.setattr(deadletter_store.DeadLetterStore, "remove", lambda *_: None)
        desk.letters.redrive(event_id)
        letter = desk.letters.edited(event_id, payload={"id": 7})
        for duplicates in (0, 1):
            assert desk.letters.redrive_edited(letter).duplicates == duplicates
    assert desk.event_ids() == [event_id, event_id]


# -- the gem's ---------------------------------------------------------------------------------


def test_the_gems_dead_letters_are_read(desk: Desk) -> None:
    desk.put(GEM_BODY, gem_headers())
    desk.put(GEM_BODY, gem_headers({**GEM_CONTEXT, "sequence": None}))  # with its inbox
    first, second = desk.letters.list()
    assert first.reason == "max_deliver_exceeded"
    assert (first.event_type, first.source, first.handler) == ("fail", "py_b", "")
    assert (first.error_class, first.error_message) == ("RuntimeError", "boom")
    assert (first.deliveries, first.original_sequence) == (5, 1)
    assert first.failed_at.isoformat() == "2026-11-23T07:05:31+00:00"
    assert second.original_sequence is None
    assert not first.is_ours
    ours = DeadLetterFilter(reason="max_deliveries_exceeded")
    assert len(desk.letters.list(ours)) == 2


@pytest.mark.parametrize(
    ("headers", "problem"),
    [
        ({"x-dlq-reason": "unrecoverable"}, "no x-dlq-context"),
        ({"x-dlq-context": "{nope"}, "x-dlq-context is no JSON object"),
        ({"x-dlq-context": "[1]"}, "x-dlq-context is no JSON object"),
        (gem_headers({"original_subject": 7, "deliveries": [], "published_at": "now"}), None),
        ({}, "no x-dlq-context"),
    ],
)
def test_what_is_missing_or_damaged_is_named_and_the_envelope_stands_in(
    desk: Desk, headers: dict[str, str], problem: str | None
) -> None:
    body = GEM_BODY.replace(b"py_b", desk.names.destination_app.encode())
    desk.put(body, headers)
    (letter,) = desk.letters.list()
    assert letter.problems == ((problem,) if problem else ())
    assert letter.event_id == "5ed8021b-8d4d-45bc-99bd-d55acef02d1a"
    assert letter.source == desk.names.destination_app
    assert desk.letters.redrive(letter.sequence).redriven == 1  # where its producer sends it
    (message,) = desk.take(1)
    assert message.data == body


def test_of_another_app_whose_consumer_is_the_gems(desk: Desk) -> None:
    """It copies every header to its dead letter: a Nats-Msg-Id would have the stream drop that."""
    gem = desk.names.destination_app
    where = f"{desk.names.app_name}.sync.{gem}"
    desk.put(GEM_BODY, gem_headers({**GEM_CONTEXT, "original_subject": where}), app_name=gem)
    letters = desk.letters.of(gem)
    assert desk.letters.count().total == 0
    assert letters.count().by_reason == {"max_deliver_exceeded": 1}
    assert letters.redrive(EVERY_LETTER).redriven == 1
    assert letters.count().total == 0
    stored = desk.api(f"STREAM.MSG.GET.{desk.names.stream_name}", last_by_subj=where)
    block = base64.b64decode(stored["message"]["hdrs"]).decode()
    assert f"nats-msg-id: {GEM_CONTEXT['event_id']}\r\n" in block
    assert "Nats-Msg-Id" not in block
    with pytest.raises(SubjectError):
        desk.letters.of("dlq")


# -- who may, who did --------------------------------------------------------------------------


def test_permissions(names: Names, make_desk: MakeDesk) -> None:
    """Exactly these subjects; each one that is taken away is named, at once."""
    stream, name, hub = names.stream_name, names.app_name, names.destination_app
    get, delete = f"$JS.API.STREAM.MSG.GET.{stream}", f"$JS.API.STREAM.MSG.DELETE.{stream}"
    info, events = f"$JS.API.STREAM.INFO.{stream}", f"{hub}.sync.{name}"
    users = {
        "all": [info, get, delete, events],
        "look": [info, get],
        "blind": [info, delete, events],
        "mute": [info, get, delete],
    }
    told = "".join(
        f"{{user: {user}, password: p, permissions: {{publish: {{allow: {json.dumps(allowed)}}}, "
        'subscribe: "_INBOX.>"}}\n'
        for user, allowed in users.items()
    )
    config = f"authorization {{ users = [ {{user: admin, password: p}}\n{told} ] }}"
    with NatsServer(config=config) as server:
        desk = make_desk(server.url.replace("nats://", "nats://admin:p@"))
        desk.bury(count=3)

        def letters_of(user: str) -> Any:
            app = Celery(user, broker="memory://", set_as_current=False)
            app.conf.update(desk.app.conf)
            app.conf.jetstream_nats_urls = server.url.replace("nats://", f"nats://{user}:p@")
            made.append(JetStream(app))
            return made[-1].dead_letters

        made: list[JetStream] = []
        every = letters_of("all")
        assert every.redrive(EVERY_LETTER, limit=1).redriven == 1
        assert every.purge(EVERY_LETTER, limit=1).purged == 1
        began = time.monotonic()
        looking = letters_of("look")
        assert looking.count().total == 1
        assert delete in str(looking.purge(EVERY_LETTER).error)
        assert events in str(letters_of("mute").redrive(EVERY_LETTER).error)
        with pytest.raises(PermissionDeniedError, match=r"STREAM\.MSG\.GET"):
            letters_of("blind").count()
        assert time.monotonic() - began < 3
        for one in made:
            one.close()


def test_who_and_what_is_logged(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "celery_jetstream")
    (event_id,) = desk.bury()
    desk.letters.redrive(event_id, by="ada\r\nNats-Evil: 1")
    (record,) = [one for one in caplog.records if "redriven to" in one.getMessage()]
    assert "by ada" in record.getMessage()
    assert (record.event_id, record.redrives) == (event_id, 1)  # type: ignore[attr-defined]
    (message,) = desk.take(1)
    assert message.headers["x-redriven-by"] == "adaNats-Evil: 1"


def test_as_tasks(desk: Desk) -> None:
    event_ids = desk.bury(count=5)
    app = desk.app

    def result(name: str, **arguments: Any) -> Any:
        task = app.tasks[f"celery_jetstream.{name}_dead_letters"]
        found = task.apply(kwargs=arguments, throw=True).get()
        return json.loads(json.dumps(found))

    assert result("count", handler="desk.order")["total"] == 5
    assert result("redrive", ids=event_ids[:2], rate=1000)["redriven"] == 2
    assert result("redrive", handler="nobody")["redriven"] == 0
    assert result("purge", limit=1, everything=True)["purged"] == 1
    assert result("redrive", everything=True, dry_run=True)["redriven"] == 2
    for name in ("redrive", "purge"):
        with pytest.raises(ValueError, match="give a filter"):
            result(name)
        with pytest.raises(ValueError, match="give a filter"):
            result(name, reason="odd", everything=True)
    by = desk.take(1)[0].headers["x-redriven-by"]
    assert by.startswith("task ")


def test_dead_letters_are_those_of_the_settlement(desk: Desk) -> None:
    """Each of the ways to die has its reason in the filter."""
    for reason in ("rejected", "revoked", "mine"):
        desk.bury(end=DeadLetter(reason))
    assert desk.letters.count().by_reason == {"rejected": 1, "revoked": 1, "mine": 1}
    assert desk.letters.count(DeadLetterFilter(reason="mine")).total == 1
