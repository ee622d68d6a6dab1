"""The pipeline against real servers: order for each key, refusals, outages, the window."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any

import pytest
from celery import Celery
from nats.aio.msg import Msg
from nats.protocol.command import hpub_cmd, pub_cmd

from celery_jetstream import JetStream
from celery_jetstream.outcomes import Message, PublishResult, Verdict
from celery_jetstream.pipeline import send_pipelined
from celery_jetstream.session import FULL, Session, _frame
from tests.conftest import Names
from tests.servers import NatsServer, need, wait_until

Keys = Sequence["str | None"]
STORED, OUTAGE, NO_STREAM, REFUSED, UNKNOWN, BEHIND, *_ = Verdict


class Pipeline:
    """An app with a JetStream, its stream, and what the stream has."""

    def __init__(self, url: str, names: Names) -> None:
        app = Celery("test", broker="memory://", set_as_current=False)
        app.conf.update(
            jetstream_nats_urls=url,
            jetstream_stream_name=names.stream_name,
            jetstream_app_name=names.app_name,
            jetstream_destination_app=names.destination_app,
        )
        self.jetstream = JetStream(app)
        self.connection = self.jetstream.connection
        self.subject = f"{names.app_name}.sync.{names.destination_app}"
        self.stream = names.stream_name

    def message(
        self, name: object, body: bytes = b"{}", subject: str = "", **headers: str
    ) -> Message:
        more = {header.replace("_", "-"): value for header, value in headers.items()}
        return Message(str(name), subject or self.subject, body, {"Nats-Msg-Id": str(name), **more})

    def messages(self, count: int, body: bytes = b"{}") -> list[Message]:
        return [self.message(number, body) for number in range(count)]

    def session(self) -> Session:
        return self.connection.run(self.connection.session)

    def send(
        self, messages: Sequence[Message], keys: Keys | None = None, **options: Any
    ) -> list[PublishResult]:
        return self.connection.run(self.sending, messages, keys, options)

    async def sending(
        self, messages: Sequence[Message], keys: Keys | None, options: dict[str, Any]
    ) -> list[PublishResult]:
        session = await self.connection.session()
        return await send_pipelined(session, messages, keys=keys, **{"timeout": 20, **options})

    def attempt(
        self, messages: Sequence[Message], keys: Keys | None, timeout: float
    ) -> list[PublishResult]:
        return self.connection.run(self.jetstream.publisher.attempt, messages, keys, timeout)

    def update(self, **config: Any) -> None:
        found = self._api(f"STREAM.INFO.{self.stream}", {})["config"]
        answer = self._api(f"STREAM.UPDATE.{self.stream}", {**found, **config})
        assert "error" not in answer, answer

    def stored(self) -> list[str]:
        """The ids that the stream has, in its order."""
        found, sequence = [], 1
        while "error" not in (
            answer := self._api(
                f"STREAM.MSG.GET.{self.stream}", {"seq": sequence, "next_by_subj": ">"}
            )
        ):
            sequence = answer["message"]["seq"] + 1
            lines = base64.b64decode(answer["message"]["hdrs"]).decode().split("\r\n")
            found += [line[13:] for line in lines if line.startswith("Nats-Msg-Id: ")]
        return found

    def _api(self, operation: str, request: dict[str, Any]) -> dict[str, Any]:
        return self.connection.run(self.jetstream._api, operation, request)


@pytest.fixture
def make_pipeline(names: Names) -> Iterator[Callable[[str], Pipeline]]:
    made: list[Pipeline] = []

    def make(url: str) -> Pipeline:
        made.append(Pipeline(url, names))
        return made[-1]

    yield make
    for pipeline in made:
        pipeline.jetstream.close()


@pytest.fixture
def pipeline(nats_server: NatsServer, make_pipeline: Callable[[str], Pipeline]) -> Pipeline:
    pipeline = make_pipeline(nats_server.url)
    pipeline.jetstream.provision()
    return pipeline


@pytest.fixture
def hurt(own_server: NatsServer, make_pipeline: Callable[[str], Pipeline]) -> Pipeline:
    pipeline = make_pipeline(own_server.url)
    pipeline.jetstream.provision()
    return pipeline


def verdicts(results: Sequence[PublishResult]) -> list[Verdict]:
    return [result.verdict for result in results]


def of_key(ids: Sequence[str], keys: Keys, key: str | None) -> list[str]:
    return [name for name in ids if keys[int(name)] == key]


# ── order ────────────────────────────────────────────────────────────────────


def test_without_keys_all_are_stored_in_list_order(pipeline: Pipeline) -> None:
    results = pipeline.send(pipeline.messages(600))
    assert set(verdicts(results)) == {STORED}
    assert [result.event_id for result in results] == [str(number) for number in range(600)]
    assert [result.sequence for result in results] == list(range(1, 601))
    assert {result.stream for result in results} == {pipeline.stream}


@pytest.mark.parametrize("window", [1, 3, 256])
def test_the_messages_of_a_key_are_stored_in_list_order(pipeline: Pipeline, window: int) -> None:
    names: list[str | None] = ["a", "b", None, "c", "a", "a", "d"]
    keys = [names[number % 7] for number in range(400)]
    results = pipeline.send(pipeline.messages(400), keys, window=window)
    assert set(verdicts(results)) == {STORED}
    ids = pipeline.stored()
    assert sorted(ids, key=int) == [str(number) for number in range(400)]
    for key in ("a", "b", "c", "d"):
        of_it = of_key(ids, keys, key)
        assert of_it == sorted(of_it, key=int), key
    by_sequence = sorted(results, key=lambda result: result.sequence or 0)
    assert [result.event_id for result in by_sequence] == ids, "each result at its index"


def test_the_oldest_server_keeps_the_order_too(
    old_nats_server: NatsServer, make_pipeline: Callable[[str], Pipeline]
) -> None:
    pipeline = make_pipeline(old_nats_server.url)
    pipeline.jetstream.provision()
    results = pipeline.send(pipeline.messages(100), ["a", "b"] * 50)
    assert set(verdicts(results)) == {STORED}
    ids = pipeline.stored()
    assert of_key(ids, ["a", "b"] * 50, "b") == [str(number) for number in range(1, 100, 2)]


def test_what_was_stored_before_is_a_duplicate_and_goes_on(pipeline: Pipeline) -> None:
    pipeline.send([pipeline.message(1)])
    results = pipeline.send(pipeline.messages(3), ["a", "a", "a"])
    assert verdicts(results) == [STORED] * 3
    assert [result.duplicate for result in results] == [False, True, False]
    assert pipeline.stored() == ["1", "0", "2"]


@pytest.mark.parametrize("keys", [None, []])
def test_no_messages(pipeline: Pipeline, keys: Keys | None) -> None:
    assert pipeline.send([], keys) == []
    assert not pipeline.session()._waiting


# ── atomic batches ───────────────────────────────────────────────────────────


@pytest.fixture
def atomic(pipeline: Pipeline) -> Pipeline:
    pipeline.update(allow_atomic=True)
    return pipeline


@pytest.mark.parametrize("window", [1, 256])
def test_batches_keep_the_order_of_keys(atomic: Pipeline, window: int) -> None:
    count = 600
    keys: Keys = [f"k{number * 7 % 11}" if number % 5 else None for number in range(count)]
    batches: Keys = [f"b{number // 4}" if number % 20 < 16 else None for number in range(count)]
    results = atomic.send(atomic.messages(count), keys, batches=batches, window=window)
    assert verdicts(results) == [STORED] * count
    stored = atomic.stored()
    for key in {*keys} - {None}:
        of_this = of_key(stored, keys, key)
        assert of_this == sorted(of_this, key=int)
    assert sorted(int(one) for one in stored) == list(range(count))
    for number in range(0, count, 20):
        at = stored.index(str(number))
        assert stored[at : at + 4] == [str(number + n) for n in range(4)]
    assert [stored[(result.sequence or 0) - 1] for result in results] == [
        str(number) for number in range(count)
    ]


def test_a_batch_stays_behind_whole(atomic: Pipeline) -> None:
    atomic.update(max_msg_size=500)
    messages = [atomic.message(0, b"x" * 1000), *atomic.messages(6)[1:]]
    keys, batches = ["a", "b", "a", "b", "c", "c"], [None, "x", "x", None, "y", "y"]
    results = atomic.send(messages, keys, batches=batches)
    assert verdicts(results) == [REFUSED, BEHIND, BEHIND, BEHIND, STORED, STORED]
    assert atomic.stored() == ["4", "5"]


def test_a_batch_that_is_refused_goes_singly(atomic: Pipeline) -> None:
    atomic.update(max_msg_size=500)
    messages = [*atomic.messages(2), atomic.message(2, b"x" * 1000), *atomic.messages(6)[3:]]
    keys = ["a", "a", "a", "b", "b", "a"]
    results = atomic.send(messages, keys, batches=["x"] * 5 + [None])
    assert verdicts(results) == [STORED, STORED, REFUSED, STORED, STORED, BEHIND]
    assert sorted(atomic.stored()) == ["0", "1", "3", "4"]


def test_a_batch_that_is_not_answered_is_an_outage_of_all(atomic: Pipeline) -> None:
    async def be_silent() -> None:
        await (await atomic.connection.session()).subscribe("silent", _ignore)

    atomic.connection.run(be_silent)
    messages = [atomic.message(number, subject="silent") for number in range(4)]
    batches = ["x", "x", "x", None]
    results = atomic.send(messages, [*"aaba"], batches=batches, timeout=0.2)
    assert verdicts(results) == [OUTAGE, OUTAGE, OUTAGE, BEHIND]
    assert {result.error for result in results[:3]} == {"JetStream did not confirm within 0.2 s"}
    assert not atomic.session()._waiting


def test_a_batch_that_cannot_be_framed_goes_singly(atomic: Pipeline) -> None:
    messages = [*atomic.messages(2), atomic.message(2, X="a\nb"), *atomic.messages(4)[3:]]
    results = atomic.send(messages, [*"aaba"], batches=["x"] * 4)
    assert verdicts(results) == [STORED, STORED, REFUSED, STORED]
    assert atomic.stored() == ["0", "1", "3"]


def test_an_old_server_is_asked_again_for_each_of_a_batch(
    old_nats_server: NatsServer, make_pipeline: Callable[[str], Pipeline]
) -> None:
    old = make_pipeline(old_nats_server.url)
    old.jetstream.provision()
    results = old.send(old.messages(3), [*"aba"], batches=["x"] * 3)
    assert verdicts(results) == [STORED] * 3
    assert all(result.duplicate for result in results)
    assert old.stored() == ["0", "1", "2"]


def _ignore(_: Msg) -> None:
    pass


# ── refusals ─────────────────────────────────────────────────────────────────


def test_a_message_that_the_stream_refuses_holds_back_its_key_only(pipeline: Pipeline) -> None:
    pipeline.update(max_msg_size=500)
    messages = pipeline.messages(60)
    messages[10] = pipeline.message(10, b"x" * 1000)
    keys = ["abc"[number % 3] for number in range(60)]
    results = pipeline.send(messages, keys)
    assert (results[10].verdict, results[10].error_code) == (REFUSED, 10054)
    behind = [index for index, result in enumerate(results) if result.verdict is BEHIND]
    assert behind == list(range(13, 60, 3)), "those of b after it"
    assert "same key" in str(results[13].error)
    assert len(pipeline.stored()) == 60 - 1 - len(behind)


def test_a_wrong_expectation_holds_back_its_key_only(pipeline: Pipeline) -> None:
    messages = pipeline.messages(6)
    messages[2] = pipeline.message(2, Nats_Expected_Stream="another")
    results = pipeline.send(messages, ["a", "b"] * 3)
    assert verdicts(results) == [STORED, STORED, REFUSED, STORED, BEHIND, STORED]
    assert results[2].error_code == 10060
    assert pipeline.stored() == ["0", "1", "3", "5"]


def test_a_subject_that_no_stream_takes_is_passed_over(pipeline: Pipeline) -> None:
    messages = pipeline.messages(600)
    messages[300] = pipeline.message(300, subject="nobody.there")
    results = pipeline.send(messages, ["a" if n in (300, 400) else None for n in range(600)])
    assert (results[300].verdict, results[400].verdict) == (NO_STREAM, BEHIND)
    assert results[300].transient
    assert "no stream takes the subject nobody.there" in str(results[300].error)
    assert verdicts(results).count(STORED) == 598


def test_what_cannot_be_sent_is_refused_and_harms_no_other(pipeline: Pipeline) -> None:
    session = pipeline.session()
    limit = session.client.max_payload
    bad: list[Message] = [
        pipeline.message("large", b"x" * (limit + 1)),
        pipeline.message("with headers", b"x" * (limit - 20)),
        pipeline.message("line break", X="a\r\nEvil: b"),
        pipeline.message("line feed", X="a\nb"),
        pipeline.message("surrogate", X="\ud800"),
        pipeline.message("subject", subject="a b"),
        pipeline.message("break", subject="a\r\nPUB evil 0\r\n\r\n"),
        Message("no subject", "", b"", {}),
        Message("no text", pipeline.subject, b"", {"X": None}),  # type: ignore[dict-item]
    ]
    good = pipeline.messages(len(bad))
    mixed = [message for pair in zip(good, bad, strict=True) for message in pair]
    results = pipeline.send(mixed)
    assert verdicts(results) == [STORED, REFUSED] * len(bad)
    assert all(result.error for result in results[1::2])
    assert f"{limit + 1 + 32} bytes" in str(results[1].error)
    assert pipeline.stored() == [message.event_id for message in good]
    assert pipeline.session() is session
    assert not session.lost.is_set()
    assert not session._waiting


def test_the_largest_message_is_stored(pipeline: Pipeline) -> None:
    limit = pipeline.session().client.max_payload
    head = len("NATS/1.0\r\nNats-Msg-Id: big\r\n\r\n")
    largest, more = (pipeline.message("big", b"x" * (limit - head + n)) for n in (0, 1))
    assert verdicts(pipeline.send([more, largest])) == [REFUSED, STORED]


def test_what_goes_on_the_wire_is_what_nats_py_sends() -> None:
    block = b"NATS/1.0\r\nA: b\r\nX-Name: \xc3\xa9 \xe2\x98\x83\r\n\r\n"
    framed = _frame("a.b", "in.1", b"body", {"A": " b ", "X-Name": "é ☃"}, 100)
    assert framed == hpub_cmd("a.b", "in.1", block, b"body")
    assert _frame("a.b", "in.1", b"body", {}, 100) == pub_cmd("a.b", "in.1", b"body")


def test_an_answer_that_is_no_pub_ack_is_unknown(pipeline: Pipeline) -> None:
    async def run() -> list[PublishResult]:
        session = await pipeline.connection.session()

        def receive(message: Msg) -> None:
            session.post(message.reply, b'{"pong": 1}', {}, None)
            session.flush()

        await session.subscribe("echo.here", receive)
        messages = [pipeline.message(number, subject="echo.here") for number in range(2)]
        return await send_pipelined(session, messages, keys=["a", "a"], timeout=10)

    assert verdicts(pipeline.connection.run(run)) == [UNKNOWN, BEHIND]


# ── the window ───────────────────────────────────────────────────────────────


class HeldBack:
    """Takes a subject as a stream would, and answers when it is told to."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._held: list[Msg] = []
        self._enough = asyncio.Event()
        self._wanted = 0
        self.ids: list[str] = []

    def receive(self, message: Msg) -> None:
        self._held.append(message)
        self.ids.append((message.headers or {})["Nats-Msg-Id"])
        if len(self._held) >= self._wanted:
            self._enough.set()

    async def held(self, wanted: int) -> int:
        """How many there are, once there are so many and all that was sent has come."""
        self._wanted = wanted
        if len(self._held) < wanted:
            self._enough.clear()
            await asyncio.wait_for(self._enough.wait(), 20)
        for _ in range(3):
            await self._session.ask("$JS.API.INFO")  # behind all that was sent before
        return len(self._held)

    async def answer(self) -> None:
        held, self._held = self._held, []
        for message in held:
            await self._session.publish(message.reply, b'{"stream":"s","seq":1}')


def holding(
    pipeline: Pipeline, function: Callable[[Session, HeldBack], Coroutine[Any, Any, None]]
) -> None:
    async def run() -> None:
        session = await pipeline.connection.session()
        held_back = HeldBack(session)
        await session.subscribe("held.back", held_back.receive)
        await function(session, held_back)

    pipeline.connection.run(run)


def test_no_more_than_the_window_is_unanswered(pipeline: Pipeline) -> None:
    async def run(session: Session, held_back: HeldBack) -> None:
        messages = [pipeline.message(number, subject="held.back") for number in range(35)]
        sending = asyncio.create_task(send_pipelined(session, messages, timeout=30, window=10))
        for wanted in (10, 10, 10, 5):
            assert await held_back.held(wanted) == wanted
            await held_back.answer()
        assert set(verdicts(await sending)) == {STORED}

    holding(pipeline, run)


def test_a_key_waits_for_its_own_answer_and_not_for_others(pipeline: Pipeline) -> None:
    async def run(session: Session, held_back: HeldBack) -> None:
        keys = ["a", "a", "a", "b", "b", None, None]
        messages = [pipeline.message(number, subject="held.back") for number in range(7)]
        sending = asyncio.create_task(send_pipelined(session, messages, keys=keys, timeout=30))
        for wanted in (["0", "3", "5", "6"], ["1", "4"], ["2"]):
            held_back.ids.clear()
            assert await held_back.held(len(wanted)) == len(wanted)
            assert held_back.ids == wanted
            await held_back.answer()
        assert set(verdicts(await sending)) == {STORED}

    holding(pipeline, run)


def test_what_is_not_answered_in_time_is_an_outage(pipeline: Pipeline) -> None:
    async def run(session: Session, held_back: HeldBack) -> None:
        keys = ["a", "a", None, None]
        messages = [pipeline.message(number, subject="held.back") for number in range(4)]
        start = time.monotonic()
        results = await send_pipelined(session, messages, keys=keys, timeout=0.3, window=2)
        assert 0.2 < time.monotonic() - start < 3
        assert verdicts(results) == [OUTAGE, BEHIND, OUTAGE, OUTAGE]
        assert "did not confirm within 0.3 s" in str(results[3].error)
        assert await held_back.held(2) == 2
        await held_back.answer()  # late: of no interest any more
        await session.ask("$JS.API.INFO")
        assert not session._waiting

    holding(pipeline, run)


def test_a_pipeline_that_is_cancelled_leaves_nothing_behind(pipeline: Pipeline) -> None:
    async def run(session: Session, held_back: HeldBack) -> None:
        messages = [pipeline.message(number, subject="held.back") for number in range(1000)]
        sending = asyncio.create_task(send_pipelined(session, messages, timeout=600))
        assert await held_back.held(256) == 256
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        assert not session._waiting
        await held_back.answer()
        await session.ask("$JS.API.INFO")

    holding(pipeline, run)
    assert pipeline.connection.connected


# ── outages ──────────────────────────────────────────────────────────────────


class Trap(list[Message]):
    """Springs when the message at ``index`` is about to be sent."""

    def set(self, index: int, spring: Callable[[], None]) -> Trap:
        self._index, self._spring = index, spring
        return self

    def __getitem__(self, index: Any) -> Any:
        if index == self._index:
            self._index = -1
            self._spring()
        return super().__getitem__(index)


def test_a_server_killed_in_the_middle_has_each_once_and_in_order(
    own_server: NatsServer, hurt: Pipeline
) -> None:
    total, keys = 1500, [None if n % 11 == 0 else f"k{n % 11}" for n in range(1500)]
    messages = Trap(hurt.messages(total)).set(700, own_server.kill)
    results = hurt.send(messages, keys)
    found = set(verdicts(results))
    assert found == {STORED, OUTAGE, BEHIND}
    assert all(result.transient for result in results if not result)
    own_server.start()
    tries = 0
    while todo := [index for index, result in enumerate(results) if not result]:
        again = hurt.attempt([messages[i] for i in todo], [keys[i] for i in todo], 10)
        for index, result in zip(todo, again, strict=True):
            results[index] = result
        tries += 1
        assert tries < 20, results[todo[0]]
    ids = hurt.stored()
    assert sorted(ids, key=int) == [str(number) for number in range(total)], "each once"
    for key in set(keys) - {None}:
        of_it = of_key(ids, keys, key)
        assert of_it == sorted(of_it, key=int), key


def test_a_lost_connection_ends_it_at_once(own_server: NatsServer, hurt: Pipeline) -> None:
    session = hurt.session()
    messages = Trap(hurt.messages(1000)).set(500, own_server.kill)
    start = time.monotonic()
    results = hurt.send(messages, timeout=600)
    assert time.monotonic() - start < 30
    lost = [result for result in results if not result]
    assert set(verdicts(lost)) == {OUTAGE}
    assert "lost" in str(lost[-1].error)
    wait_until(lambda: not session._waiting, 10, "nothing to wait")
    with pytest.raises(ConnectionError, match="lost"):
        hurt.connection.run(_post, session)


async def _post(session: Session) -> None:
    session.post("a.b", b"", {}, lambda *_: None)


def test_a_server_that_hangs_is_an_outage_in_time_and_fills_no_memory(
    own_server: NatsServer, hurt: Pipeline
) -> None:
    session = hurt.session()
    body = b"x" * 900_000
    keys = [None if n % 2 else "a" for n in range(100)]
    own_server.pause()
    for _ in range(2):
        start = time.monotonic()
        results = hurt.send(hurt.messages(100, body), keys, timeout=1)
        assert time.monotonic() - start < 4
        assert set(verdicts(results)) == {OUTAGE, BEHIND}
        assert results[0].verdict is OUTAGE
        assert session.client.pending_data_size < FULL + 2 * len(body)
    own_server.resume()
    wait_until(lambda: all(hurt.attempt(hurt.messages(3), None, 5)), 30, "it to work again")


def test_an_attempt_without_a_server_is_an_outage(own_server: NatsServer, hurt: Pipeline) -> None:
    own_server.kill()
    start = time.monotonic()
    results = hurt.attempt(hurt.messages(3), ["a", "a", None], 0.5)
    assert time.monotonic() - start < 4
    assert len(results) == 3
    assert {(result.success, result.transient) for result in results} == {(False, True)}


def test_credentials_that_are_refused_are_no_fault_of_a_message(
    make_pipeline: Callable[[str], Pipeline],
) -> None:
    need("nats")
    with NatsServer(config="authorization { user: us, password: pw }") as server:
        pipeline = make_pipeline(f"nats://us:wrong@127.0.0.1:{server.port}")
        (result,) = pipeline.attempt(pipeline.messages(1), None, 5)
        assert (result.verdict, result.transient) == (OUTAGE, True)
        assert "credentials" in str(result.error)
        assert json.dumps(result.as_dict())
