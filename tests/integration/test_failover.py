"""Servers that hang, leave, change their address or lock us out: another one, in seconds.

Of each fault also: what ``Connection.state`` says while it lasts.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme

from celery_jetstream import JetStream
from celery_jetstream.connection import Connection
from celery_jetstream.exceptions import ConnectionRefusedByServer, NotConnectedError
from celery_jetstream.session import Session
from celery_jetstream.testing import free_port
from tests.connections import (
    SECRET,
    RecordingServer,
    fill,
    session_of,
    url_of,
    works,
)
from tests.operators import Operator
from tests.servers import NatsServer, need, wait_until
from tests.stack import ROOT

STALL = 2.0
"""Seconds that a busy machine may stop without costing the connection."""
NO_PINGS = {"ping_interval": 60}


def stall(server: NatsServer) -> None:
    server.pause()
    time.sleep(STALL)  # this is the fault, and no wait for something
    server.resume()


def lost(session: Session) -> Callable[[], bool]:
    return session.lost.is_set


# ── a server that hangs ──────────────────────────────────────────────────────


@pytest.mark.parametrize("size", [500_000, 16_000_000], ids=["half a MB", "16 MB"])
def test_bytes_that_a_hung_server_does_not_take_tell_of_it(
    own_server: NatsServer,
    connect_to: Callable[..., Connection],
    monkeypatch: pytest.MonkeyPatch,
    size: int,
) -> None:
    """Neither pings nor the kernel's timeout: those take longer."""
    monkeypatch.setattr("celery_jetstream.client.TCP_USER_TIMEOUT_MS", 120_000)
    connection = connect_to(own_server.url, nats_options=NO_PINGS)
    hung = session_of(connection)
    own_server.pause()
    start = time.monotonic()
    connection.call_soon(fill, connection, size)
    wait_until(lost(hung), 20, "the hang to be noticed")
    assert 2 < time.monotonic() - start < 8
    assert connection.state == "reconnecting"
    assert "does not read" in str(connection.last_error)
    own_server.resume()
    wait_until(lambda: works(connection), 20, "the connection to be back")


def test_a_request_at_a_hung_server_fails_in_seconds(
    own_server: NatsServer, connect_to: Callable[..., Connection]
) -> None:
    connection = connect_to(own_server.url)
    session = session_of(connection)
    connection.run(session.client.subscribe, "deaf.ear")
    own_server.pause()
    start = time.monotonic()
    with pytest.raises(NotConnectedError, match="lost"):
        connection.run(_ask_deaf_ears, session)
    assert 2 < time.monotonic() - start < 10
    assert connection.state == "reconnecting"


async def _ask_deaf_ears(session: Session) -> None:
    await session.ask("deaf.ear", timeout=600)


@pytest.mark.parametrize("unsent", [False, True], ids=["idle", "with unsent data"])
def test_a_stall_of_the_server_costs_nothing(
    own_server: NatsServer, connect_to: Callable[..., Connection], unsent: bool
) -> None:
    connection = connect_to(own_server.url)
    session = session_of(connection)
    for _ in range(2):
        if unsent:
            connection.call_soon(fill, connection)
        stall(own_server)
        assert works(connection)
    assert session_of(connection) is session


def test_a_stall_of_our_own_costs_nothing(
    own_server: NatsServer, connect_to: Callable[..., Connection]
) -> None:
    connection = connect_to(own_server.url)
    session = session_of(connection)
    connection.call_soon(fill, connection, 2_000_000)
    connection.call_soon(time.sleep, 5)  # longer than a server may hang
    connection.run(session.ask, "$JS.API.INFO", timeout=20)
    assert session_of(connection) is session


class SlowLink:
    """Passes on what a client sends at so many bytes a second, and answers at once."""

    def __init__(self, port: int, rate: int) -> None:
        self.rate = rate
        self._to = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
                server = socket.create_connection(("127.0.0.1", self._to))
                for ends in ((client, server, self.rate), (server, client, 0)):
                    threading.Thread(target=self._pass_on, args=ends, daemon=True).start()

    @staticmethod
    def _pass_on(source: socket.socket, target: socket.socket, rate: int) -> None:
        with contextlib.suppress(OSError), source, target:
            while data := source.recv(8192):
                target.sendall(data)
                if rate:
                    time.sleep(len(data) / rate)

    def __enter__(self) -> SlowLink:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()


def test_a_long_upload_over_a_slow_link_is_no_hang(
    nats_server: NatsServer, connect_to: Callable[..., Connection]
) -> None:
    with SlowLink(nats_server.port, rate=200_000) as link:
        connection = connect_to(f"nats://127.0.0.1:{link.port}")
        session = session_of(connection)

        async def upload() -> None:
            for _ in range(20):
                await session.publish("any.thing", b"x" * 100_000)
            await session.ask("$JS.API.INFO", timeout=60)

        start = time.monotonic()
        connection.run(upload)
        assert time.monotonic() - start > 6, "too fast to show anything"
        assert session_of(connection) is session
        connection.close()


def test_a_receiver_that_cancels_is_noticed(
    nats_server: NatsServer, connect_to: Callable[..., Connection]
) -> None:
    connection = connect_to(nats_server.url)
    session = session_of(connection)
    subject = f"say.{uuid.uuid4().hex}"

    def cancelled(_: object) -> None:
        raise asyncio.CancelledError

    connection.run(session.subscribe, subject, cancelled)
    connection.run(session.publish, subject)
    wait_until(lost(session), 10, "the client to be thrown away")
    wait_until(lambda: works(connection), 10, "a new client")


# ── a cluster ────────────────────────────────────────────────────────────────


class Cluster:
    """Servers that find each other; ``add()`` starts one more."""

    def __init__(self, config: str = "") -> None:
        self.config = config
        self.nodes: list[NatsServer] = []
        self._routes: list[int] = []

    def add(self) -> NatsServer:
        number = len(self.nodes)
        self._routes.append(free_port())
        routes = ", ".join(f'"nats://127.0.0.1:{port}"' for port in self._routes)
        listen = f"127.0.0.1:{self._routes[-1]}"
        node = NatsServer(
            config=f'cluster {{ name: "ours", listen: "{listen}", routes: [{routes}] }}\n'
            "lame_duck_grace_period: 2s, lame_duck_duration: 30s\n" + self.config,
            arguments=("-n", f"node-{number}"),
        )
        self.nodes.append(node.start())
        return node

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        for node in self.nodes:
            node.kill()
            node.stop()


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    need("nats")
    with Cluster(f'authorization {{ user: us, password: "{SECRET}" }}') as cluster:
        for _ in range(3):
            cluster.add()
        yield cluster


def named(connection: Connection) -> set[int]:
    """The ports of the servers that the newest INFO names."""
    session = connection._session
    found = session.client.info.get("connect_urls") if session else None
    return {int(address.rpartition(":")[2]) for address in found or ()}


def port_of(connection: Connection) -> int:
    """The port of the server that we are connected to; 0 for none."""
    session = connection._session
    connected = session is not None and connection.connected
    return int(session.address.rpartition(":")[2]) if session and connected else 0


def connected_to_one(connection: Connection, cluster: Cluster, servers: list[NatsServer]) -> None:
    ports = [server.port for server in servers]
    wait_until(lambda: port_of(connection) in ports, 20, "a connection to a peer")
    running = {server.port for server in cluster.nodes if server.running}
    wait_until(lambda: named(connection) == running, 20, "the cluster to name who is there")
    assert echoes(connection)


def echoes(connection: Connection) -> bool:
    """An exchange that needs no JetStream (and so no leader)."""

    async def exchange() -> bool:
        session = await connection.session()
        subject = f"echo.{uuid.uuid4().hex}"

        def answer(message: Any) -> None:
            session.post(message.reply, message.data, {}, None)
            session.flush()

        await session.subscribe(subject, answer)
        return (await session.ask(subject, b"x")).data == b"x"

    return connection.run(exchange)


def test_servers_that_the_cluster_names_are_used_and_dead_ones_tolerated(
    cluster: Cluster, connect_to: Callable[..., Connection]
) -> None:
    first, *others = cluster.nodes
    connection = connect_to(url_of(first, f"us:{SECRET}"))
    connection.connect()
    connected_to_one(connection, cluster, cluster.nodes)
    first.kill()  # for good
    connected_to_one(connection, cluster, others)
    (left,) = [node for node in others if node.port != port_of(connection)]
    (used,) = [node for node in others if node is not left]
    used.kill()
    connected_to_one(connection, cluster, [left])


def test_a_server_that_joins_later_is_used(
    cluster: Cluster, connect_to: Callable[..., Connection]
) -> None:
    first, *others = cluster.nodes
    connection = connect_to(url_of(first, f"us:{SECRET}"))
    connection.connect()
    late = cluster.add()
    wait_until(lambda: late.port in named(connection), 20, "the server to say so")
    for node in (*others, first):
        node.kill()
    connected_to_one(connection, cluster, [late])


def test_a_peer_that_left_is_forgotten(
    cluster: Cluster, connect_to: Callable[..., Connection]
) -> None:
    first, *others = cluster.nodes
    connection = connect_to(url_of(first, f"us:{SECRET}"))
    connection.connect()
    connected_to_one(connection, cluster, [first])
    connection.reconnect()
    connected_to_one(connection, cluster, others)
    (used,) = [node for node in others if node.port == port_of(connection)]
    (gone,) = [node for node in others if node is not used]
    gone.kill()
    wait_until(lambda: gone.port not in named(connection), 20, "it to be named no more")
    with RecordingServer(None, port=gone.port) as where_it_was:
        used.kill()
        connected_to_one(connection, cluster, [first])
        first.kill()
        before = connection._rounds
        wait_until(lambda: connection._rounds > before + 3, 30, "all to be tried")
        assert where_it_was.connections == 0
        first.start()  # of the settings, so never forgotten
        wait_until(lambda: port_of(connection) == first.port, 20, "it to be used")


def test_a_peer_with_a_bare_address_shows_the_certificate_of_our_server(
    tmp_path: Path, connect_to: Callable[..., Connection]
) -> None:
    import ssl

    authority = trustme.CA()
    certificate = authority.issue_cert("localhost")
    certificate.private_key_pem.write_to_path(tmp_path / "key.pem")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    context = ssl.create_default_context()
    authority.configure_trust(context)
    need("nats")
    files = f'cert_file: "{tmp_path / "cert.pem"}", key_file: "{tmp_path / "key.pem"}"'
    with Cluster(f"tls {{ {files} }}") as cluster:
        first, second = cluster.add(), cluster.add()
        connection = connect_to(f"tls://localhost:{first.port}", nats_options={"tls": context})
        connection.connect()
        wait_until(lambda: second.port in named(connection), 20, "the peer to be named")
        first.kill()
        wait_until(lambda: port_of(connection) == second.port, 20, "the peer to be used")
        assert session_of(connection).client.encrypted


# ── lame ducks ───────────────────────────────────────────────────────────────


def quack(server: NatsServer) -> None:
    """Has the server tell its clients to go, and end some seconds later."""
    os.kill(server.pid, signal.SIGUSR2)


def test_a_lame_duck_is_left_at_once_and_for_good(
    cluster: Cluster, connect_to: Callable[..., Connection]
) -> None:
    first, *others = cluster.nodes
    connection = connect_to(url_of(first, f"us:{SECRET}"))
    used: list[str] = []

    async def note(session: Session) -> None:
        used.append(session.address)

    connection.on_session(note)
    connection.connect()
    wait_until(lambda: len(named(connection)) == 3, 20, "the peers to be named")
    quack(first)
    wait_until(lambda: port_of(connection) in [o.port for o in others], 20, "us to move")
    assert first.running, "we have not waited for its end"
    wait_until(lambda: not first.running, 60, "its end")
    assert echoes(connection)
    assert len(used) == 2, used


@pytest.fixture
def duck() -> Iterator[NatsServer]:
    """Alone, and quick to end."""
    need("nats")
    config = "lame_duck_grace_period: 1s, lame_duck_duration: 30s"
    with NatsServer(config=config) as server:
        yield server


def test_a_lame_duck_without_another_server(
    duck: NatsServer, connect_to: Callable[..., Connection]
) -> None:
    connection = connect_to(duck.url)
    connection.connect()
    quack(duck)
    wait_until(lambda: connection.state == "reconnecting", 20, "the state to tell")
    assert duck.running, "and at once"
    wait_until(lambda: not duck.running, 60, "its end")
    assert connection.state == "reconnecting"
    duck.start()
    wait_until(lambda: works(connection), 20, "the connection to be back")


def test_publishing_through_a_lame_duck_loses_nothing(
    duck: NatsServer, make_jetstream: Callable[..., JetStream]
) -> None:
    jetstream = make_jetstream(duck.url)
    jetstream.connect()
    stop = threading.Event()
    results: list[list[Any]] = [[], [], []]

    def publish(mine: list[Any]) -> None:
        while not stop.is_set():
            mine.append(jetstream.publish("user.created", {"id": len(mine)}, timeout=30))

    threads = [threading.Thread(target=publish, args=(mine,), daemon=True) for mine in results]
    for thread in threads:
        thread.start()
    wait_until(lambda: all(len(mine) > 20 for mine in results), 20, "events before")
    quack(duck)
    wait_until(lambda: jetstream.state == "reconnecting", 20, "the state to tell")
    wait_until(lambda: not duck.running, 60, "its end")
    duck.start()
    before = [len(mine) for mine in results]
    wait_until(
        lambda: all(len(mine) > n + 20 for mine, n in zip(results, before, strict=True)),
        30,
        "events after",
    )
    stop.set()
    for thread in threads:
        thread.join(40)
    everything = [result for mine in results for result in mine]
    assert all(result.success for result in everything)
    info = jetstream.connection.run(jetstream.stream_info)
    assert info["state"]["messages"] == len(everything)
    assert jetstream.state == "connected"


# ── many clients ─────────────────────────────────────────────────────────────


def test_many_clients_come_back_one_by_one(
    own_server: NatsServer, connect_to: Callable[..., Connection]
) -> None:
    connections = [connect_to(own_server.url) for _ in range(30)]
    for connection in connections:
        connection.connect()
    own_server.kill()
    with RecordingServer(None, hang_up=True, port=own_server.port) as listener:
        wait_until(lambda: listener.connections >= 300, 60, "ten attempts of each")
        tries = listener.times[180:]  # at the slowest pace
    own_server.start()
    wait_until(lambda: all(works(connection) for connection in connections), 60, "all to be back")
    assert crowd(tries, 0.2) <= 15, tries
    assert tries[-1] - tries[0] > 3, "hammered"


def crowd(times: list[float], window: float) -> int:
    """The most that came within so many seconds."""
    return max(sum(1 for other in times if 0 <= other - t < window) for t in times)


# ── close ────────────────────────────────────────────────────────────────────


def close_in_time(connection: Connection, most: float = 6.0) -> None:
    """Closes, and is back in bounded time; the thread ends too."""
    loop = connection._loop
    assert loop is not None
    start = time.monotonic()
    connection.close()
    assert time.monotonic() - start < most
    assert connection.state == "disconnected"
    wait_until(loop.is_closed, 20, "the thread to end")


def into_a_black_hole(stage: Stage) -> Connection:
    hole = stage.enter_context(RecordingServer(None))
    connection = stage.connect_to(f"nats://127.0.0.1:{hole.port}")
    connection.start()
    wait_until(lambda: hole.connections, 10, "the attempt")
    return connection


def while_the_name_is_looked_up(stage: Stage) -> Connection:
    looking = threading.Event()

    def look(*_: Any, **__: Any) -> None:
        looking.set()
        stage.over.wait(60)

    stage.monkeypatch.setattr("socket.getaddrinfo", look)
    connection = stage.connect_to("nats://far.away.example:4222")
    connection.start()
    assert looking.wait(10)
    return connection


def at_a_hung_server(stage: Stage) -> Connection:
    connection = stage.connected()
    stage.server.pause()
    return connection


def at_a_hung_server_with_unsent_data(stage: Stage) -> Connection:
    connection = at_a_hung_server(stage)
    connection.call_soon(fill, connection)
    return connection


def at_a_hung_server_with_publishes_that_wait(stage: Stage) -> Connection:
    """More than nats-py's own buffer takes, where it forces a flush."""
    connection = at_a_hung_server(stage)
    session = session_of(connection)
    for _ in range(60):  # the kernel may take 10 MB of it
        connection.submit(session.ask, "any.thing", b"x" * 500_000)
    wait_until(lambda: session.client.pending_data_size > 2**21, 10, "the buffer to be full")
    return connection


def in_an_outage(stage: Stage) -> Connection:
    connection = stage.connected()
    stage.server.kill()
    wait_until(lambda: connection.state == "reconnecting", 10, "the loss")
    return connection


def with_requests_that_wait(stage: Stage) -> Connection:
    connection = stage.connected()
    session = session_of(connection)
    connection.run(session.client.subscribe, "deaf.ear")
    for _ in range(500):
        stage.waiting.append(connection.submit(_ask_deaf_ears, session))
    wait_until(lambda: len(session._waiting) == 500, 10, "all to wait")
    return connection


def in_a_hook_that_hangs(stage: Stage) -> Connection:
    connection = stage.connect_to(stage.server.url)
    begun = threading.Event()

    async def hang(_: Session) -> None:
        begun.set()
        await asyncio.sleep(600)

    connection.on_session(hang)
    connection.start()
    assert begun.wait(10)
    return connection


class Stage(contextlib.ExitStack):
    """What a state to be closed in is made of."""

    def __init__(
        self, server: NatsServer, connect_to: Callable[..., Connection], patch: pytest.MonkeyPatch
    ) -> None:
        super().__init__()
        self.server, self.connect_to, self.monkeypatch = server, connect_to, patch
        self.waiting: list[Any] = []
        self.over = threading.Event()
        self.callback(self.over.set)

    def connected(self) -> Connection:
        connection = self.connect_to(self.server.url)
        connection.connect()
        return connection


STATES = [
    into_a_black_hole, while_the_name_is_looked_up, at_a_hung_server,
    at_a_hung_server_with_unsent_data, at_a_hung_server_with_publishes_that_wait, in_an_outage,
    with_requests_that_wait, in_a_hook_that_hangs,
]  # fmt: skip


@pytest.fixture
def stage(
    own_server: NatsServer,
    connect_to: Callable[..., Connection],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Stage]:
    with Stage(own_server, connect_to, monkeypatch) as stage:
        yield stage


# before Python 3.12, wait_for() loses a connection that is made in the moment of its cancellation
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("how", ["close", "signal"])
@pytest.mark.parametrize("state", STATES, ids=lambda state: state.__name__)
def test_close_is_bounded(state: Callable[[Stage], Connection], stage: Stage, how: str) -> None:
    connection = state(stage)
    if how == "close":
        close_in_time(connection)
    else:
        interrupted(connection)
    for future in stage.waiting:
        with pytest.raises(NotConnectedError):
            future.result(5)


def test_close_does_not_wait_for_a_thread_that_is_blocked(
    nats_server: NatsServer, connect_to: Callable[..., Connection], caplog: pytest.LogCaptureFixture
) -> None:
    connection = connect_to(nats_server.url)
    session_of(connection)
    loop, over = connection.start(), threading.Event()
    connection.call_soon(over.wait, 60)
    start = time.monotonic()
    connection.close(timeout=0.5)
    assert time.monotonic() - start < 10
    assert connection.state == "disconnected"
    assert "did not end" in caplog.text
    over.set()
    wait_until(loop.is_closed, 20, "the thread to end all the same")


def interrupted(connection: Connection) -> None:
    """A signal handler closes, while the main thread waits for what does not come."""
    before = signal.signal(signal.SIGTERM, lambda *_: close_in_time(connection, 8))
    main = threading.main_thread().ident or 0
    timer = threading.Timer(0.3, signal.pthread_kill, (main, signal.SIGTERM))
    timer.start()
    try:
        with pytest.raises(NotConnectedError):
            connection.run(asyncio.sleep, 600)
    finally:
        timer.join()
        signal.signal(signal.SIGTERM, before)


AT_EXIT = """
import socket, sys, threading, time
from celery_jetstream.config import Config
from celery_jetstream.connection import Connection

look_up = socket.getaddrinfo
looking = threading.Event()

def slow(host, *rest, **options):
    if host == "far.away.example":
        looking.set()
        time.sleep(60)
    return look_up(host, *rest, **options)

socket.getaddrinfo = slow
connection = Connection(Config(nats_urls=sys.argv[1], app_name="a", destination_app="b"))
connection.start()
if "far.away" in sys.argv[1]:
    assert looking.wait(10)
elif "connect" in sys.argv[2:]:
    connection.connect()
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("state", ["name", "hole", "outage", "hung"])
def test_the_end_of_a_process_is_bounded(own_server: NatsServer, state: str) -> None:
    with contextlib.ExitStack() as stack:
        url = own_server.url
        if state == "name":
            url = "nats://far.away.example:4222"
        elif state == "hole":
            url = f"nats://127.0.0.1:{stack.enter_context(RecordingServer(None)).port}"
        process = stack.enter_context(
            subprocess.Popen(
                [sys.executable, "-c", AT_EXIT, url, "connect" if url == own_server.url else ""],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=ROOT,
            )
        )
        stack.callback(process.kill)
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        if state == "outage":
            own_server.kill()
        elif state == "hung":
            own_server.pause()
        process.stdin.close()
        assert process.wait(15) == 0


# ── credentials that expire ──────────────────────────────────────────────────


@pytest.fixture
def operator(tmp_path: Path) -> Operator:
    return Operator(tmp_path / "user.creds")


@pytest.fixture
def trusting_server(operator: Operator) -> Iterator[NatsServer]:
    need("nats")
    with NatsServer(config=operator.config) as server:
        yield server


def with_creds(
    connect_to: Callable[..., Connection], server: NatsServer, operator: Operator
) -> Connection:
    return connect_to(server.url, nats_options={"user_credentials": str(operator.creds)})


def test_credentials_that_were_renewed_before_they_expire(
    trusting_server: NatsServer, operator: Operator, connect_to: Callable[..., Connection]
) -> None:
    operator.renew(6)
    connection = with_creds(connect_to, trusting_server, operator)
    before = session_of(connection)
    operator.renew(600)
    wait_until(lost(before), 20, "the server to end the old ones")
    wait_until(lambda: works(connection), 10, "the connection to be back by itself")


def test_credentials_that_are_renewed_late(
    trusting_server: NatsServer,
    operator: Operator,
    connect_to: Callable[..., Connection],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("celery_jetstream.connection.REFUSED_DELAY", 2)
    operator.renew(3)
    connection = with_creds(connect_to, trusting_server, operator)
    connection.connect()
    wait_until(lambda: connection.state == "reconnecting", 20, "the state to tell")
    wait_until(lambda: "expired at 2" in str(connection.last_error), 5, "the reason")
    assert "renew the creds file" in str(connection.last_error)

    def attempts() -> int:
        return trusting_server.log.read_text().count("authentication error")

    wait_until(lambda: attempts() >= 1, 20, "an attempt")
    start, before = time.monotonic(), attempts()
    wait_until(lambda: attempts() > before, 20, "another")
    assert time.monotonic() - start > 0.7, "hammered"
    assert connection.state == "reconnecting"
    assert "renew the creds file" in str(connection.last_error), "still"
    operator.renew(600)
    wait_until(lambda: works(connection), 20, "the connection to be back")
    assert operator._user.seed.decode() not in caplog.text


def test_credentials_that_have_expired_before_the_start(
    trusting_server: NatsServer, operator: Operator, connect_to: Callable[..., Connection]
) -> None:
    operator.renew(-60)
    connection = with_creds(connect_to, trusting_server, operator)
    with pytest.raises(ConnectionRefusedByServer, match="renew the creds file"):
        connection.connect()


@pytest.mark.parametrize("content", ["", "-----BEGIN NATS USER JWT-----\nx.y"])
def test_a_creds_file_that_is_being_written(
    trusting_server: NatsServer,
    operator: Operator,
    connect_to: Callable[..., Connection],
    content: str,
) -> None:
    """nats-py reads such a file for ever, and with it the whole loop thread stands."""
    operator.renew(600)
    connection = with_creds(connect_to, trusting_server, operator)
    connection.connect()
    operator.creds.write_text(content)
    trusting_server.restart()
    wait_until(lambda: "no user JWT" in str(connection.last_error), 20, "it to be said")
    assert connection.state == "reconnecting"
    operator.creds.unlink()
    wait_until(lambda: "No such file" in str(connection.last_error), 20, "that to be said")
    operator.renew(600)
    wait_until(lambda: works(connection), 20, "the connection to be back")
