"""Users that may do what ``--print-permissions`` says, and no more, on real servers."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from celery_jetstream import JetStream, meters, metrics
from celery_jetstream import bridge as bridge_module
from celery_jetstream import connection as connection_module
from celery_jetstream import health as health_module
from celery_jetstream import pull as pull_module
from celery_jetstream import push as push_module
from celery_jetstream import session as session_module
from celery_jetstream.bridge import Bridge
from celery_jetstream.capabilities import Feature
from celery_jetstream.cli import jetstream as command
from celery_jetstream.config import Config
from celery_jetstream.connection import Connection
from celery_jetstream.deadletter import Original
from celery_jetstream.delivery import Delivery
from celery_jetstream.exceptions import (
    ConfigurationError,
    ConnectionRefusedByServer,
    NotConnectedError,
    PermissionDeniedError,
)
from celery_jetstream.outcomes import Verdict
from celery_jetstream.permissions import ROLES, Role, as_conf
from celery_jetstream.provisioning import roles
from celery_jetstream.schema import create_outbox
from celery_jetstream.settlement import DeadLetter
from celery_jetstream.sweeper import Sweeper
from tests.burials import Desk
from tests.conftest import Names
from tests.connections import session_of
from tests.databases import Database
from tests.errands import Errand
from tests.servers import OLD_NATS_SERVER, NatsServer, RedisServer, need, wait_until
from tests.stack import Stack, handled_once

PASSWORD = "pw-of-all"
ROOT = f'{{user: root, password: "{PASSWORD}"}}'


class Guarded(NatsServer):
    """A server with these users, and ``root``; the passwords are in its environment."""

    def __init__(self, *users: Role, binary: str | None = None, **options: Any) -> None:
        self.users = users
        config = f"authorization {{ users: [\n{ROOT}\n{as_conf(users)}\n] }}"
        super().__init__(config=config, binary=binary, **options)

    def reload(self, *users: Role) -> None:
        """These may what they may now; nothing is restarted."""
        body = f"authorization {{ users: [\n{ROOT}\n{as_conf(users)}\n] }}"
        (self.directory / "nats-server.conf").write_text(body)
        os.kill(self.pid, signal.SIGHUP)

    def environment(self) -> Mapping[str, str]:
        names = (line.split("$")[1] for line in self.config.splitlines() if "password: $" in line)
        return dict.fromkeys(names, PASSWORD)

    def url_of(self, user: str) -> str:
        return f"nats://{user}:{PASSWORD}@127.0.0.1:{self.port}"


def config_of(names: Names, **settings: Any) -> Config:
    return Config(
        app_name=names.app_name,
        destination_app=names.destination_app,
        stream_name=names.stream_name,
        auto_provision=settings.pop("auto_provision", False),
        **settings,
    )


def hub_role(names: Names) -> Role:
    """The user of the app at the other end."""
    there = Names(names.destination_app, names.app_name, names.stream_name)
    return roles(config_of(there))[0]


def without(role: Role, subject: str, name: str) -> Role:
    """A user of that name who may all but this."""
    needs = tuple(
        dataclasses.replace(
            need,
            publish=tuple(s for s in need.publish if s != subject),
            subscribe=tuple(s for s in need.subscribe if s != subject),
        )
        for need in role.needs
    )
    return Role(name, role.what, needs)


# ── the doctor, as each of them ──────────────────────────────────────────────


@pytest.mark.parametrize("mode", ["pull", "push"])
def test_the_doctor_asks_of_each_user_what_it_is_to_be_allowed(names: Names, mode: str) -> None:
    """And where another user would see more, it says which; what it tries changes nothing."""
    need("nats")
    users = dict(zip(ROLES, roles(config_of(names, consumer_mode=mode)), strict=True))
    with Guarded(*users.values()) as server:
        errand = Errand(server.url, names, auto_provision=False, consumer_mode=mode)
        try:
            by = {word: server.url_of(user.name) for word, user in users.items()}
            errand.desk.provision(nats_urls=by["admin"])
            root = errand.make(nats_urls=server.url_of("root"))
            state = root.connection.run(root._api, f"STREAM.INFO.{names.stream_name}", {})["state"]
            found = {
                (user, role): errand.make(nats_urls=by[user]).doctor(role=role)
                for user, role in [*zip(ROLES, ROLES, strict=True), ("operator", "run")]
            }
            after = root.connection.run(root._api, f"STREAM.INFO.{names.stream_name}", {})["state"]
        finally:
            errand.close()
    assert after == state
    for role in ROLES:
        denied = [one for one in found[role, role].findings if one.code == "permissions"]
        assert [one.severity for one in denied] == ["ok"], denied
    skipped = {one.code: one.found for one in found["run", "run"].of("skipped")}
    assert "run the doctor as the operator (--role operator)" in skipped["stream-max-age"]
    seen = {one.code: one.severity for one in found["operator", "operator"].findings}
    assert seen["stream-storage"] == seen["ack-wait"] == "ok"
    wrong = [one for one in found["operator", "run"].errors if one.code == "permissions"]
    assert any(names.destination_app in one.found for one in wrong), "publishing"
    assert all("provision --print-permissions --role run" in str(one.remedy) for one in wrong)


def test_a_denied_command_says_once_who_may_and_not_to_repeat_it(
    names: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    need("nats")
    run, _, operator = roles(config_of(names))
    there, delete = f"{names.destination_app}.sync.{names.app_name}", "$JS.API.STREAM.MSG.DELETE"
    mute = without(operator, there, "mute")
    keeper = without(operator, f"{delete}.{names.stream_name}", "keeper")
    with Guarded(run, operator, mute, keeper) as server:
        desk = Desk(server.url_of("root"), names)
        errand = Errand(server.url, names, auto_provision=False)

        def said(user: str, *arguments: str) -> str:
            app = errand.make(nats_urls=server.url_of(user)).app
            with monkeypatch.context() as patched:  # as a command has it: no log is set up
                patched.setattr(logging.getLogger(), "handlers", [])
                result = CliRunner().invoke(command, ["dlq", *arguments], obj=obj_of(app))
            assert result.exit_code == 1
            return result.output

        try:
            desk.bury(count=2)
            for output, subject in (
                (said("mute", "redrive", "--all"), there),
                (said("keeper", "redrive", "--all"), delete),
                (said("keeper", "purge", "--all", "--yes"), delete),
                (said(run.name, "list"), "$JS.API.STREAM.INFO"),
            ):
                assert output.count("the NATS user may not") == output.count(subject) == 1
                assert "user who may: the operator (--role operator" in output
                assert "again to go on" not in output
            assert json.loads(said("mute", "redrive", "--all", "--json"))["denied"] is True
            assert desk.count() == 2
        finally:
            errand.close()
            desk.close()


def obj_of(app: Any) -> Any:
    return SimpleNamespace(app=app, no_color=True)


# ── all of it goes ───────────────────────────────────────────────────────────


@pytest.mark.parametrize("binary", [None, OLD_NATS_SERVER], ids=["new", "old"])
@pytest.mark.parametrize("mode", ["pull", "push"])
def test_what_is_printed_is_enough(
    names: Names,
    sqlite: Database,
    mode: str,
    binary: str | None,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    need("old-nats" if binary else "nats")
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(session_module, "_not_answered", set())
    monkeypatch.setattr(health_module, "DENIED_KEPT", 0.3)
    settings: dict[str, Any] = {
        "consumer_mode": mode,
        "sources": [names.destination_app, f"third-{names.app_name}"],
        "metrics": True,
    }
    config = config_of(names, **settings)
    run, admin, operator = roles(config)
    asking = dataclasses.replace(roles(config, status=True)[0], name="asking")
    half = without(run, f"$JS.API.STREAM.INFO.{names.stream_name}", "half")
    users = (run, admin, operator, hub_role(names), asking, half)
    with Guarded(*users, binary=binary) as server:
        errand = Errand(
            server.url_of(run.name),
            names,
            hub={"nats_urls": server.url_of(names.destination_app), "sources": [names.app_name]},
            auto_provision=False,
            database_url=sqlite.url,
            **settings,
        )
        try:
            plan = errand.desk.provision(nats_urls=server.url_of(admin.name))
            assert {change.action for change in plan.changes} == {"create"}
            errand.run(3)
            desk = errand.make()
            with desk.outbox.database.engine.begin() as connection:
                create_outbox(connection)
                desk.outbox.add(connection, event_type="order.paid", payload={})
            assert desk.outbox.drain().sent == 1
            told = desk.connection.run(desk.stream_info)  # by the settings: it may not ask
            assert told["config"]["name"] == names.stream_name
            report = errand.make(nats_urls=server.url_of(operator.name)).health_check()
            assert report["problems"] == []
            assert report["unknown"] == []
            assert errand.make(nats_urls=server.url_of("asking")).health_check()["unknown"] == []
            lag, letters = "consumer_pending_messages{", "dead_letters_stored "
            text = looked_up(desk)
            assert (lag in text, letters in text, 'up{collector="nats"} 1' in text) == (True,) * 3
            assert "iolation" not in server.log.read_text()
            text = looked_up(errand.make(nats_urls=server.url_of("half")))
            assert (lag in text, letters in text, 'up{collector="nats"} 0' in text) == (
                *(True, False, True),
            )
            began = time.monotonic()
            assert "$JS.API.INFO" in str(desk.health_check()["unknown"])
            assert promptly(began)
            desk.reconnect()
            assert "$JS.API.INFO" in str(desk.health_check(fresh=True)["unknown"])
            said = [one for one in caplog.records if "$JS.API.INFO" in one.getMessage()]
            assert [one.levelname for one in said] == ["INFO"]
            if binary is None:  # a reload of 2.9's takes its streams away for a while
                server.reload(dataclasses.replace(asking, name=run.name), *users[1:])
                wait_until(lambda: not desk.health_check(fresh=True)["unknown"], 20, "all of it")
        finally:
            errand.close()
            meters.stop()


def looked_up(jetstream: JetStream) -> str:
    """What an endpoint of metrics answers."""
    return metrics.exposition(jetstream)[1].decode()


@pytest.fixture
def quiet_api(names: Names, connect_to: Callable[..., Connection]) -> Callable[..., Any]:
    """Tells what is asked of ``$JS.API`` by whoever hears answers under a prefix."""

    def listen(server: Guarded, prefix: str) -> list[str]:
        asked: list[str] = []
        watching = connect_to(server.url_of("root"))

        async def go() -> None:
            session = await watching.session()
            await session.subscribe(
                "$JS.API.>",
                lambda m: asked.append(m.subject) if m.reply.startswith(prefix) else None,
            )
            await session.round_trip(10)

        watching.run(go)
        return asked

    return listen


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("direct", "mode"),
    [(False, "push"), (True, "pull"), pytest.param(False, "pull", marks=pytest.mark.soak)],
    ids=["bridge, push", "direct, pull", "bridge, pull"],
)
def test_processes_ask_nothing_of_jetstream_but_messages(
    names: Names,
    tmp_path: Path,
    redis_server: RedisServer,
    quiet_api: Callable[..., list[str]],
    direct: bool,
    mode: str,
) -> None:
    """Handled, retried, dead by a worker and by the bridge, and stopped; with an inbox prefix."""
    need("nats")
    prefix = f"_INBOX_{names.app_name}"
    asks: dict[str, Any] = {"consumer_mode": mode, "nats_options": {"inbox_prefix": prefix}}
    run, admin, _ = roles(config_of(names, **asks))
    with Guarded(run, admin) as server:
        stack = Stack(
            tmp_path,
            server.url_of("root"),
            redis_server.url,
            names,
            direct=direct,
            jetstream_auto_provision=False,
            **{f"jetstream_{name}": value for name, value in asks.items()},
        )
        try:
            stack.settings["jetstream_nats_urls"] = server.url_of(run.name)
            provisioning = Errand(server.url_of(admin.name), names, **asks)
            provisioning.desk.provision()
            provisioning.close()
            asked = quiet_api(server, prefix)
            stack.start()
            good = stack.publish("order.created", 20)
            good += stack.publish("retry.twice")
            stack.publish("error.value")
            stack.publish("unheard")
            stack.wait_handled(21)
            stack.wait_settled()
            handled_once(stack, good)
            reasons = sorted(letter["reason"] for letter in stack.dead_letters())
            assert reasons == ["no_handler", "unrecoverable_error"]
            for process in stack._processes:
                assert process.stop() == 0, process.text()
        finally:
            stack.close()
        durable = f"{names.stream_name}.{names.app_name}-workers"
        pulls = {f"$JS.API.CONSUMER.MSG.NEXT.{durable}"} if mode == "pull" else set()
        reads = {f"$JS.API.STREAM.MSG.GET.{names.stream_name}"}
        assert set(asked) - reads == pulls
        assert direct or reads <= set(asked)  # that of the worker's dead letter
        assert "iolation" not in server.log.read_text()
        assert PASSWORD not in "".join(process.text() for process in stack._processes)


# ── each of it is needed, and missed in words ────────────────────────────────


@dataclasses.dataclass
class Missed:
    """One server for all who may not do one thing: ``user(subject)`` gives the URL of who."""

    server: Guarded
    names: Names
    mode: str
    numbers: dict[str, int]

    def url(self, subject: str) -> str:
        return self.server.url_of(f"desk-{self.numbers[subject]}")


@pytest.fixture(scope="module", params=["pull", "push"])
def missed(request: pytest.FixtureRequest) -> Iterator[Missed]:
    need("nats")
    names = Names(f"Desk-{os.getpid()}", f"hub-{os.getpid()}", f"Guarded-{os.getpid()}")
    config = config_of(names, consumer_mode=request.param)
    run, admin, _ = roles(config)
    numbers = {subject: n for n, subject in enumerate((*run.publish, *run.subscribe))}
    # $JS.ACK… is there for both verbs: who lacks it lacks both
    users = [without(run, subject, f"desk-{number}") for subject, number in numbers.items()]
    with Guarded(*users, admin) as server:
        errand = Errand(server.url_of(admin.name), names, consumer_mode=request.param)
        errand.desk.provision()
        errand.close()
        yield Missed(server, names, request.param, numbers)


@pytest.fixture
def desk(missed: Missed) -> Iterator[Callable[..., JetStream]]:
    """``desk(subject)``: the app, as the user who may not use that."""
    errands: list[Errand] = []

    def make(subject: str, **settings: Any) -> JetStream:
        settings = {"consumer_mode": missed.mode, "auto_provision": False, **settings}
        errand = Errand(missed.url(subject), missed.names, **settings)
        errands.append(errand)
        return errand.desk

    yield make
    for errand in errands:
        errand.close()


def promptly(began: float) -> bool:
    return time.monotonic() - began < 3


def test_who_may_not_hear_answers_is_not_connected(
    desk: Callable[..., JetStream], missed: Missed
) -> None:
    began = time.monotonic()
    with pytest.raises(
        ConnectionRefusedByServer, match=r"not subscribe to _INBOX\.>.*inbox_prefix"
    ):
        desk("_INBOX.>").connect()
    assert promptly(began)


def test_an_event_that_may_not_be_published(
    desk: Callable[..., JetStream], missed: Missed, sqlite: Database
) -> None:
    """Said at once to who waits; a row waits, and other subjects go on."""
    subject = f"{missed.names.app_name}.sync.{missed.names.destination_app}"
    jetstream = desk(subject, database_url=sqlite.url)
    began = time.monotonic()
    results = jetstream.publish_batch([{"event_type": "a", "payload": {}}] * 600)
    assert promptly(began)
    assert {result.verdict for result in results} == {Verdict.DENIED}
    assert {result.transient for result in results} == {False}
    assert f"the NATS user may not publish to {subject}: " in str(results[-1].error)
    assert "--print-permissions" in str(results[-1].error)
    assert not jetstream.connection.run(jetstream.connection.session)._waiting
    task = jetstream.app.tasks["celery_jetstream.publish_event"]
    with pytest.raises(NotConnectedError, match="may not publish to"):  # it is retried for ever
        task(event_type="a", payload={})
    with jetstream.outbox.database.engine.begin() as connection:
        create_outbox(connection)
        for number in range(3):
            jetstream.outbox.add(connection, event_type="a", payload={"id": number})
    result = jetstream.outbox.drain()
    assert f"may not publish to {subject}" in str(result.outage)
    assert (result.sent, result.failed, result.retried) == (0, 0, 0)


def test_messages_that_may_not_be_taken_or_settled(
    desk: Callable[..., JetStream], missed: Missed
) -> None:
    """The bridge, and a worker of direct mode, say so at their start."""
    consumer = f"{missed.names.stream_name}.{missed.names.app_name}-workers"
    stream = missed.names.stream_name
    deliver = f"{missed.names.destination_app}.sync.{missed.names.app_name}.worker"
    publish = {
        f"$JS.ACK.{consumer}.>": "no message can be settled",
        f"$JS.API.STREAM.MSG.GET.{stream}": "dead letter",
        f"{missed.names.app_name}.sync.dlq": "no dead letter can be kept",
    }
    if missed.mode == "pull":
        publish[f"$JS.API.CONSUMER.MSG.NEXT.{consumer}"] = "no message can be taken"
    else:
        publish[f"$JS.FC.{consumer}.>"] = "sends no more"
    for subject, why in publish.items():
        jetstream = desk(subject)
        for begin in (jetstream.check_permissions, Bridge(jetstream).run):
            began = time.monotonic()
            with pytest.raises(ConfigurationError) as caught:
                begin()
            assert promptly(began)
            assert f"may not publish to {subject}: else " in str(caught.value)
            assert why in str(caught.value)
    if missed.mode == "push":
        with pytest.raises(PermissionDeniedError, match="may not subscribe to") as denied:
            Bridge(desk(f"{deliver} {missed.names.app_name}-workers")).run()
        assert denied.value.subject == deliver
    with pytest.raises(ConfigurationError, match="would send running tasks again") as hears:
        Bridge(desk(f"$JS.ACK.{consumer}.>")).run()
    assert f"may not subscribe to $JS.ACK.{consumer}.>" in str(hears.value)


def test_a_dead_letter_that_may_not_be_kept_comes_again(
    desk: Callable[..., JetStream], missed: Missed, caplog: pytest.LogCaptureFixture
) -> None:
    subject = f"{missed.names.app_name}.sync.dlq"
    jetstream = desk(subject)
    name = f"{missed.names.stream_name}.{missed.names.app_name}-workers"
    delivery = Delivery.from_reply(f"$JS.ACK.{name}.1.7.7.0.0")
    end = DeadLetter("rejected", "", "")
    for _ in range(2):
        jetstream.settler.settle(delivery, end, Original("a.b", b"{}", {}))
    wait_until(lambda: not jetstream.settler._burials, 5, "both to be tried")
    (said,) = (line for line in caplog.messages if "may not publish" in line)
    assert said.startswith("dead letter of ")
    assert f"may not publish to {subject}: have that allowed" in said
    assert "it comes again in 60 s, and so does each that follows" in said
    assert "Traceback" not in caplog.text
    assert "dead_letter_waits" in [s["code"] for s in jetstream.health_check()["states"]]


def test_a_user_who_may_not_hear_what_is_given_up_is_told_once(
    desk: Callable[..., JetStream], missed: Missed, caplog: pytest.LogCaptureFixture
) -> None:
    name = f"{missed.names.stream_name}.{missed.names.app_name}-workers"
    advisory = f"$JS.EVENT.ADVISORY.CONSUMER.MAX_DELIVERIES.{name}"
    jetstream = desk(advisory)
    connection, settler = jetstream.connection, jetstream.settler
    (consumer,) = connection.run(jetstream.consumers)
    for _ in range(2):
        connection.run(Sweeper(connection, settler, consumer, asks=False)._look)
        assert connection.run(session_of(connection).round_trip, 10)
    told = [line for line in caplog.messages if f"may not subscribe to {advisory}" in line]
    assert len(told) == 1


def test_what_an_admin_may_not_is_said(names: Names, caplog: pytest.LogCaptureFixture) -> None:
    need("nats")
    caplog.set_level(logging.DEBUG)
    config = config_of(names)
    _, admin, _ = roles(config)
    stream, durable = names.stream_name, f"{names.stream_name}.{names.app_name}-workers"
    subject = f"{names.destination_app}.sync.{names.app_name}"
    tried = (
        f"$JS.API.STREAM.INFO.{stream}",
        "$JS.API.STREAM.NAMES",
        f"$JS.API.STREAM.CREATE.{stream}",
        f"$JS.API.CONSUMER.CREATE.{durable}.{subject}",
        f"$JS.API.CONSUMER.INFO.{durable}",
        f"$JS.API.STREAM.UPDATE.{stream}",
        f"$JS.API.CONSUMER.LIST.{stream}",
    )
    users = [without(admin, what, f"admin-{number}") for number, what in enumerate(tried)]
    with Guarded(*users, admin) as server:
        errand = Errand(server.url_of("root"), names)
        desk = errand.desk

        def denied(number: int, app: JetStream = desk) -> None:
            began = time.monotonic()
            with pytest.raises(PermissionDeniedError) as caught:
                app.provision(nats_urls=server.url_of(f"admin-{number}"))
            assert caught.value.subject == tried[number]
            assert promptly(began)

        try:
            for number in range(5):
                denied(number)
            other = errand.make(max_age=3600)
            denied(5, other)
            root = desk.connection
            rival = {"durable_name": "rival", "filter_subject": subject, "ack_policy": "explicit"}
            create = {"stream_name": stream, "config": rival}
            answer = root.run(desk._api, f"CONSUMER.CREATE.{stream}.rival.{subject}", create)
            assert "error" not in answer
            denied(6)
        finally:
            errand.close()
    assert PASSWORD not in caplog.text


def test_what_is_missing_is_said_with_what_to_run(
    names: Names, nats_server: NatsServer, caplog: pytest.LogCaptureFixture
) -> None:
    errand = Errand(nats_server.url, names, auto_provision=False)
    try:
        result = errand.hub.publish("parcel.sent", {}, timeout=0.5)
        assert "jetstream provision" in str(result.error)
        bridge = Bridge(errand.desk, max_messages=1)
        thread = threading.Thread(target=bridge.run, daemon=True)
        thread.start()
        said = f"{names.app_name}-workers) is not there"
        wait_until(lambda: said in caplog.text, 10, "it to be said")
        bridge.stop()
        thread.join(10)
    finally:
        errand.close()


PARCEL = {"event_type": "parcel.sent", "payload": {}}


def working(bridge: Bridge) -> bool:
    return any(intake.asked or intake._subscription for intake in bridge._intakes)


def claims_heard(bridge: Bridge) -> set[int]:
    subscriptions = bridge.jetstream.connection.run(
        bridge.jetstream.connection.session
    ).client._subs
    return {number for number, one in subscriptions.items() if one.subject.startswith("$JS.ACK")}


@pytest.mark.needs_nats(Feature("streams that a reload of users leaves alone", (2, 10, 0), ""))
@pytest.mark.parametrize("mode", ["pull", "push"])
def test_what_is_taken_away_while_it_runs_and_given_back(
    names: Names,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
) -> None:
    """By a reload of the server's configuration; nothing is restarted."""
    need("nats")
    for module in (bridge_module, pull_module, push_module):
        monkeypatch.setattr(module, "DENIED_PAUSE", 0.3)
    monkeypatch.setattr(connection_module, "REFUSED_DELAY", 0.3)
    run, admin, _ = roles(config_of(names, consumer_mode=mode))
    take = next(need for need in run.needs if need.name in ("pulling", "receiving"))
    with Guarded(run, admin) as server:
        errand = Errand(server.url_of("root"), names, consumer_mode=mode, auto_provision=False)
        errand.desk = errand.make(nats_urls=server.url_of(run.name))
        errand.hub.provision(nats_urls=server.url_of("root"))
        errand.make().provision()
        worker = errand.make()

        bridge = Bridge(errand.desk)
        thread = threading.Thread(target=bridge.run, daemon=True)
        thread.start()
        try:
            for missing in ((take.subscribe or take.publish)[0], *run.subscribe[-2:-1], "_INBOX.>"):
                wait_until(lambda: working(bridge), 20, "messages to be taken")
                caplog.clear()
                caplog.set_level(logging.INFO, "celery_jetstream")
                server.reload(without(run, missing, run.name), admin)
                many = 200 if "MSG.NEXT" in missing else 0  # what is asked for comes first
                assert all(errand.hub.publish_batch([PARCEL] * many))
                errand._settle(worker, many, [])
                said = f"{missing.split()[0]}: have that allowed"
                wait_until(lambda said=said: said in caplog.text, 20, said)
                deaf = claims_heard(bridge) if missing.startswith("$JS.ACK") else set()
                if deaf:
                    assert said in str(bridge.tell()["trouble"])
                server.reload(run, admin)
                if deaf:
                    wait_until(lambda deaf=deaf: claims_heard(bridge) != deaf, 20, "ears")
                # while it reloads, a server may refuse who has done nothing
                wait_until(lambda: bool(errand.hub.publish("parcel.sent", {})), 20, "a parcel")
                wait_until(lambda: not bridge.tell()["trouble"], 20, "health to be well again")
                errand._settle(worker, 1, [])
                wait_until(lambda: not bridge._flights.replies, 20, "the worker to be heard")
                begins = [line for line in caplog.messages if said in line]
                ends = [line for line in caplog.messages if re.search(r"\bagain\b|is back", line)]
                assert len(begins) == 1, caplog.messages
                # a reload that has cost the connection is told of as well
                assert 0 < len(ends) == len(set(ends)), caplog.messages
        finally:
            bridge.stop()
            thread.join(10)
            errand.close()
