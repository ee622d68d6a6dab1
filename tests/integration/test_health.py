"""Health tells the truth within seconds: ``health_check()``, a bridge's HTTP, ``inspect``.

The processes are shared: one server, one broker, one bridge. What is hurt is mended in the same
test.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
from celery.contrib.testing.worker import start_worker
from sqlalchemy import create_engine, event, text

from celery_jetstream import JetStream, cli_status, diagnosis, health, jetstream_handler, status
from celery_jetstream.direct import Intake
from celery_jetstream.exceptions import ConfigurationError, OutboxUnavailableError
from celery_jetstream.http import THREADS, serving
from celery_jetstream.testing import NatsServer, wait_until
from tests.conftest import Names
from tests.databases import Database
from tests.servers import PostgresServer, RedisServer, need
from tests.stack import ROOT, Stack, get

MakeJetStream = Callable[..., JetStream]


DOCUMENTED = set(
    re.findall(r"`(\w+)`", (ROOT / "docs/reference/health.md").read_text(encoding="utf-8"))
)
#: What is below these is named by the user, or documented elsewhere.
OTHERS = {"config", "counts", "queues", "leases", "subjects"}


def keys_of(value: Any) -> set[str]:
    """All keys of a report."""
    if isinstance(value, list):
        return set().union(*map(keys_of, value))
    if not isinstance(value, dict):
        return set()
    below = [keys_of(part) for name, part in value.items() if name not in OTHERS]
    return set(value).union(*below)


def codes(report: dict[str, Any]) -> list[str]:
    return [state["code"] for state in report["states"]]


# -- a bridge, by HTTP -----------------------------------------------------------------------------


class Site:
    """A bridge that serves HTTP, and what it stands on."""

    def __init__(self, nats: NatsServer, broker: RedisServer, stack: Stack) -> None:
        self.nats, self.broker, self.stack = nats, broker, stack
        self.bridge = stack.bridge()
        self.get = self.bridge.get
        self.bridge.get("/livez")
        self.port = int(self.bridge.text().split("http://127.0.0.1:")[1].split()[0])

    def report(self) -> dict[str, Any]:
        report: dict[str, Any] = json.loads(self.get("/status")[1])
        return report

    def wait_for(self, path: str, status: int, timeout: float) -> str:
        def is_so() -> bool:
            return self.get(path)[0] == status

        wait_until(is_so, timeout, f"{path} to answer {status}")
        return self.get(path)[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    need("nats")
    need("redis")
    pid = os.getpid()
    names = Names(f"desk-{pid}", f"hub-{pid}", f"health-{pid}")
    with NatsServer() as nats, RedisServer() as broker:
        directory = tmp_path_factory.mktemp("health")
        stack = Stack(
            directory,
            nats.url,
            broker.url,
            names,
            jetstream_http_address=0,
            jetstream_metrics=True,
            jetstream_ack_wait=0.6,
            jetstream_max_ack_pending=8,
        )
        try:
            stack.hub.provision()
            yield Site(nats, broker, stack)
        finally:
            stack.close()


def test_a_bridge_that_is_well_says_so(site: Site) -> None:
    site.wait_for("/readyz", 200, 10)
    assert site.get("/livez") == (200, "ok\n")
    status, body = site.get("/status")
    report = json.loads(body)
    assert (status, report["healthy"]) == (200, True)
    assert report["process"]["pid"] == site.bridge.pid
    assert report["bridge"]["pulling"] is True
    assert site.get("/status?pretty", "HEAD") == (200, "")
    status, metrics = site.get("/metrics")
    assert (status, 'collector_up{collector="nats"} 1.0' in metrics) == (200, True), metrics
    assert keys_of(report) <= DOCUMENTED, keys_of(report) - DOCUMENTED


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/", 404), ("POST", "/status", 405), ("PUT", "/no", 405)]
)
def test_other_requests_are_refused(site: Site, method: str, path: str, status: int) -> None:
    assert site.get(path, method)[0] == status


def test_no_http_gets_no_answer_that_ends_it(site: Site) -> None:
    for request in (b"\r\n\r\n", b"GET /livez\r\n\r\n", b"\x00" * 20_000 + b"\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", site.port), timeout=10) as client:
            client.sendall(request)
            assert client.recv(100).startswith((b"HTTP/1.1 400", b"HTTP/1.1 431"))
    assert site.get("/livez")[0] == 200


def test_slow_clients_hold_nothing(site: Site) -> None:
    clients = [socket.create_connection(("127.0.0.1", site.port)) for _ in range(40)]
    try:
        for client in clients:
            client.sendall(b"GET /livez HTTP/1.1\r\n")
        began = time.monotonic()
        assert site.get("/livez")[0] == 200
        assert site.get("/status")[0] == 200
        assert time.monotonic() - began < 3
    finally:
        for client in clients:
            client.close()


def test_it_turns_red_when_nats_stops_and_green_again_after(site: Site) -> None:
    site.wait_for("/readyz", 200, 10)
    site.nats.kill()
    reasons = site.wait_for("/readyz", 503, 5)
    assert reasons.startswith("not_connected: no connection to NATS at nats://127.0.0.1")
    status, body = site.get("/status")
    assert (status, json.loads(body)["connection"]["connected"]) == (503, False)
    assert "not_connected" in codes(json.loads(body))
    assert site.get("/livez")[0] == 200, "an outage is no reason to be started anew"
    site.nats.start()
    site.wait_for("/readyz", 200, 10)
    site.wait_for("/status", 200, 10)


def test_it_is_not_ready_while_the_broker_is_away_though_idle(site: Site) -> None:
    site.wait_for("/readyz", 200, 10)
    site.broker.kill()
    assert site.wait_for("/readyz", 503, 10).startswith("broker_away: the Celery broker is away")
    assert site.get("/livez")[0] == 200
    site.broker.start()
    site.wait_for("/readyz", 200, 10)
    assert site.bridge.text().count("the Celery broker is away") == 1


def test_a_queue_that_no_worker_takes_is_named(site: Site) -> None:
    """Two are its share of eight; the others wait in the bridge."""
    site.stack.publish("order.nobody", 5)

    def is_named() -> bool:
        return "queue_crowded" in codes(site.report())

    wait_until(is_named, 15, "the queue to be named")
    report = site.report()
    queue = site.stack.settings["task_default_queue"]
    assert report["bridge"]["crowded"] == [queue]
    found = report["bridge"]["queues"][queue]
    assert (found["unclaimed"], found["waiting"]) == (2, 3)
    assert any(queue in warning for warning in report["warnings"])
    assert (report["status"], site.get("/readyz")[0]) == ("degraded", 200)


@pytest.mark.parametrize("host", ["127.0.0.1", "192.0.2.1"])
def test_an_address_that_cannot_be_had_is_said_at_the_start(site: Site, host: str) -> None:
    """A port that is taken, and a host that is not this one."""
    shown = rf"--http-address={re.escape(host)}:{site.port} cannot be served: .*port 0 for any"
    with (
        pytest.raises(ConfigurationError, match=shown),
        serving(None, (host, site.port), "--http-address"),
    ):
        pass


# -- health_check ----------------------------------------------------------------------------------


def test_it_is_kept_but_for_what_this_process_knows(
    own_server: NatsServer, make_jetstream: MakeJetStream
) -> None:
    jetstream = make_jetstream(own_server.url)
    jetstream.provision()
    first = jetstream.health_check()
    assert (first["status"], first["states"]) == ("healthy", [])
    jetstream.publish("dead.letter", {}, subject=jetstream.config.dead_letter_subject)
    assert jetstream.health_check()["dead_letters"]["count"] == 0
    fresh = jetstream.health_check(fresh=True)
    assert fresh["dead_letters"]["count"] == 1
    assert 0 <= fresh["dead_letters"]["oldest"] < 30
    assert (fresh["status"], codes(fresh)) == ("degraded", ["dead_letters"])
    own_server.kill()
    wait_until(lambda: not jetstream.health_check()["healthy"], 2, "a lost connection to show")
    lost = jetstream.health_check()
    assert codes(lost) == ["not_connected"]
    assert lost["dead_letters"]["count"] is None
    own_server.start()
    wait_until(lambda: jetstream.health_check()["healthy"], 10, "it to be green again")
    assert jetstream.health_check()["dead_letters"]["count"] == 1


def test_what_was_wrong_is_asked_about_again_soon(
    nats_server: NatsServer, make_jetstream: MakeJetStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "HASTE", 0.3)
    jetstream = make_jetstream(nats_server.url)
    assert codes(jetstream.health_check()) == ["stream_missing", "consumer_missing"]
    jetstream.provision()
    wait_until(lambda: jetstream.health_check()["healthy"], 5, "it to be green")


def test_what_is_known_to_be_wrong_keeps_nobody_waiting(
    nats_server: NatsServer,
    make_jetstream: MakeJetStream,
    sqlite: Database,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A database that hangs until the driver gives up, and again at the next look."""
    monkeypatch.setattr(health, "HASTE", 0.0)
    jetstream = make_jetstream(nats_server.url, jetstream_database_url=sqlite.url)
    jetstream.provision()
    released = threading.Event()

    def status() -> dict[str, Any]:
        raise OutboxUnavailableError("it is away")

    monkeypatch.setattr(jetstream.outbox, "status", status)
    assert "database_away" in codes(jetstream.health_check())
    monkeypatch.setattr(jetstream.outbox, "status", lambda: released.wait(20) and status())
    for _ in range(3):
        began = time.monotonic()
        assert "database_away" in codes(jetstream.health_check())
        assert time.monotonic() - began < 2
    released.set()


def test_a_server_that_hangs_gives_no_answer_in_time(
    own_server: NatsServer, make_jetstream: MakeJetStream
) -> None:
    jetstream = make_jetstream(own_server.url)
    jetstream.provision()
    assert jetstream.health_check()["healthy"]
    own_server.pause()
    began = time.monotonic()
    report = jetstream.health_check(fresh=True, timeout=0.5)
    assert time.monotonic() - began < 2
    assert codes(report) == ["no_answer"]
    own_server.resume()
    wait_until(lambda: jetstream.health_check()["healthy"], 20, "it to be green again")


def test_many_threads_share_one_look(
    nats_server: NatsServer, make_jetstream: MakeJetStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    look, looks = status.look, list[None]()

    async def counted(*arguments: Any) -> dict[str, Any]:
        looks.append(None)
        return await look(*arguments)

    monkeypatch.setattr(status, "look", counted)
    jetstream = make_jetstream(nats_server.url)
    jetstream.provision()
    with ThreadPoolExecutor(32) as threads:
        reports = list(threads.map(lambda _: jetstream.health_check(), range(64)))
    assert {report["status"] for report in reports} == {"healthy"}
    assert len(looks) == 1


def test_without_a_server_nobody_is_kept_waiting(make_jetstream: MakeJetStream) -> None:
    jetstream = make_jetstream("nats://desk:seCret@127.0.0.1:1")
    jetstream.connection.start()
    wait_until(lambda: jetstream.connection.last_error, 5, "it to have been tried")
    began = time.monotonic()
    report = jetstream.health_check()
    assert time.monotonic() - began < 1
    assert codes(report) == ["not_connected"]
    assert "seCret" not in json.dumps(report)


def test_wrong_credentials_are_told_from_an_outage(make_jetstream: MakeJetStream) -> None:
    need("nats")
    users = 'authorization {users: [{user: desk, password: "right"}]}'
    with NatsServer(config=users) as server:
        options = {"user": "desk", "password": "seCret"}
        jetstream = make_jetstream(server.url, jetstream_nats_options=options)
        report = jetstream.health_check()
        assert codes(report) == ["refused"]
        assert "seCret" not in json.dumps(report)


def test_what_may_not_be_asked_is_unknown_and_not_unhealthy(
    make_jetstream: MakeJetStream, names: Names
) -> None:
    need("nats")
    config = (
        "authorization {users: [{user: admin, password: a}, {user: desk, password: d, "
        'permissions: {publish: {deny: ["$JS.API.>"]}}}]}'
    )
    with NatsServer(config=config) as server:
        admin = make_jetstream(server.url.replace("//", "//admin:a@"))
        admin.provision()
        desk = make_jetstream(server.url.replace("//", "//desk:d@"), jetstream_auto_provision=False)
        began = time.monotonic()
        report = desk.health_check()
        assert time.monotonic() - began < 3
        assert (report["status"], report["states"]) == ("healthy", [])
        assert report["connection"]["rtt_ms"] > 0
        assert report["stream"]["exists"] is report["consumers"][0]["exists"] is None
        asked = " ".join(report["unknown"])
        assert "$JS.API.INFO" in asked
        assert f"$JS.API.STREAM.INFO.{names.stream_name}" in asked
        assert "API level" not in "".join(cli_status._lines(report))  # not known is not "none"


def test_a_hung_loop_is_not_alive(
    nats_server: NatsServer, make_jetstream: MakeJetStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diagnosis, "HUNG", 0.2)
    jetstream = make_jetstream(nats_server.url)
    jetstream.connection.connect()
    released = threading.Event()
    with serving(jetstream, ("127.0.0.1", 0)) as port:
        assert port
        assert get(port, "/livez") == (200, "ok\n")
        jetstream.connection.call_soon(released.wait, 20)
        wait_until(lambda: get(port, "/livez")[0] == 503, 5, "the hung loop to be told")
        assert "loop_hangs" in get(port, "/livez")[1]
        released.set()
        wait_until(lambda: get(port, "/livez")[0] == 200, 5, "the loop to turn again")


def test_a_slow_client_is_dropped_and_so_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("celery_jetstream.http.CLIENT_TIMEOUT", 0.3)
    monkeypatch.setattr("celery_jetstream.http.MOST_CLIENTS", 3)
    with serving(None, ("127.0.0.1", 0)) as port, contextlib.ExitStack() as stack:
        assert port
        address = ("127.0.0.1", port)
        clients = [stack.enter_context(socket.create_connection(address, 5)) for _ in range(4)]
        began = time.monotonic()
        with contextlib.suppress(ConnectionResetError):
            assert clients[3].recv(1) == b""
        assert time.monotonic() - began < 0.3
        clients[0].sendall(b"GET /livez")
        with contextlib.suppress(ConnectionResetError):
            assert clients[0].recv(1) == b""
        assert time.monotonic() - began < 3
        wait_until(lambda: get(port, "/nothing")[0] == 404, 5, "room for others")


def test_a_status_that_waits_keeps_no_probe_waiting() -> None:
    released, asked = threading.Event(), list[None]()

    def check() -> dict[str, Any]:
        asked.append(None)
        released.wait(20)
        return {"healthy": True}

    told = {"alive": True, "ready": True}
    watched = SimpleNamespace(running={}, health=SimpleNamespace(check=check, now=lambda: told))
    with serving(watched, ("127.0.0.1", 0)) as port, ThreadPoolExecutor(6) as threads:
        assert port
        waiting = [threads.submit(get, port, "/status") for _ in range(6)]
        try:
            wait_until(lambda: len(asked) == THREADS, 5, "/status to be busy")
            began = time.monotonic()
            assert get(port, "/readyz") == (200, "ok\n")
            assert time.monotonic() - began < 2
        finally:
            released.set()
        assert {answer.result()[0] for answer in waiting} == {200}


# -- outbox and inbox ------------------------------------------------------------------------------


def test_outbox_and_inbox_are_told(
    nats_server: NatsServer, make_jetstream: MakeJetStream, sqlite: Database
) -> None:
    jetstream = make_jetstream(
        nats_server.url,
        jetstream_database_url=sqlite.url,
        jetstream_use_outbox=True,
        jetstream_use_inbox=True,
        jetstream_outbox_nudge=False,
        jetstream_health_cache_ttl=0,
    )
    jetstream.provision()
    assert codes(jetstream.health_check()) == ["tables_missing", "tables_missing"]
    jetstream.outbox.create_tables()
    jetstream.inbox.create_tables()
    jetstream.outbox.publish("order.placed", {})
    report = jetstream.health_check()
    assert (report["status"], report["outbox"]["counts"]["pending"]) == ("healthy", 1)
    assert report["inbox"]["counts"]["processed"] == 0
    assert keys_of(report) <= DOCUMENTED, keys_of(report) - DOCUMENTED
    engine = create_engine(sqlite.url)
    with engine.begin() as connection:
        late = "UPDATE jetstream_outbox SET created_at = '2020-01-01 00:00:00.000000'"
        connection.execute(text(late))
        given_up = "UPDATE jetstream_inbox SET attempts = 1"
        connection.execute(text(given_up))
    engine.dispose()
    assert codes(jetstream.health_check()) == ["outbox_late"]
    jetstream.outbox.flusher.breaker.fail("a.sync.b", "no stream takes it")
    assert codes(jetstream.health_check()) == ["outbox_late", "breaker_open"]


def test_a_database_that_hangs_does_not_hang_it(
    nats_server: NatsServer, make_jetstream: MakeJetStream, sqlite: Database
) -> None:
    """One look at a time: those who come meanwhile do not wait for one that has had its time."""
    jetstream = make_jetstream(nats_server.url, jetstream_database_url=sqlite.url)
    jetstream.provision()
    jetstream.outbox.create_tables()
    jetstream.inbox.create_tables()
    released, looks = threading.Event(), list[None]()

    @event.listens_for(jetstream.outbox.database.engine, "before_cursor_execute")
    def hang(*_: Any) -> None:
        looks.append(None)
        released.wait(30)

    began = time.monotonic()
    jetstream.health_check(timeout=0.6)
    report = jetstream.health_check(timeout=0.1)
    assert time.monotonic() - began < 4
    assert "database_away" in codes(report)
    assert report["stream"]["exists"] is True, "NATS is told all the same"
    assert len(looks) == 1
    released.set()
    wait_until(lambda: jetstream.health_check()["healthy"], 10, "the database to be back")


@pytest.mark.soak
def test_a_frozen_postgresql_is_told_and_does_not_hang_it(
    nats_server: NatsServer, make_jetstream: MakeJetStream
) -> None:
    need("postgresql")
    with PostgresServer(fsync=False) as server:
        server.create_user("desk")
        jetstream = make_jetstream(
            nats_server.url, jetstream_database_url=server.url("postgres", "desk")
        )
        jetstream.provision()
        jetstream.outbox.create_tables()
        jetstream.inbox.create_tables()
        assert jetstream.health_check()["healthy"]
        server.pause()
        began = time.monotonic()
        assert codes(jetstream.health_check(fresh=True, timeout=3)) == ["database_away"] * 2
        assert time.monotonic() - began < 4
        server.resume()
        wait_until(lambda: jetstream.health_check()["healthy"], 10, "the database to be back")


# -- workers ---------------------------------------------------------------------------------------


def test_a_pull_that_ends_by_a_defect_is_begun_anew_and_told(
    nats_server: NatsServer,
    make_jetstream: MakeJetStream,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A direct worker in this process: it would take nothing any more, and look alive."""
    look_again, breaks = Intake._look_again, threading.Event()

    async def break_off(intake: Intake) -> None:
        while not breaks.is_set():
            await asyncio.sleep(0.01)
        breaks.clear()
        monkeypatch.setattr(Intake, "_look_again", look_again)
        raise ZeroDivisionError

    monkeypatch.setattr(Intake, "_look_again", break_off)
    monkeypatch.setattr("celery_jetstream.direct.WATCH_INTERVAL", 0.1)
    monkeypatch.setattr("celery_jetstream.direct.BEGIN_PAUSE", 0.3)
    jetstream = make_jetstream(nats_server.url, jetstream_direct=True)
    handled: list[str] = []

    @jetstream_handler("order.>", name="health.order")
    def order(event: Any) -> None:
        handled.append(event.event_type)

    jetstream.provision()
    with start_worker(jetstream.app, pool="solo", perform_ping_check=False):

        def direct() -> dict[str, Any]:
            return jetstream.health.now()["direct"] or {"pulling": False}

        wait_until(lambda: direct()["pulling"], 10, "it to pull")
        breaks.set()
        wait_until(lambda: not direct()["pulling"], 10, "the end of pulling to be told")
        assert codes(jetstream.health.now()) == ["not_pulling"]
        wait_until(lambda: direct()["pulling"], 10, "it to pull again")
        subject = jetstream.config.consume_subjects[0]
        jetstream.publish("order.placed", {}, subject=subject)
        wait_until(lambda: handled == ["order.placed"], 10, "an event to be handled")
        assert codes(jetstream.health.now()) == ["pull_restarted"]
        assert direct()["restarts"] == 1
        assert "ZeroDivisionError" in direct()["error"]
    assert jetstream.health.now()["direct"] is None
