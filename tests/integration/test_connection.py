"""The supervisor's promises, each against the bare nats-py client that breaks it."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import nats
import nkeys
import pytest
import trustme
from nats.aio.client import Client

from celery_jetstream import JetStream
from celery_jetstream.connection import Connection
from celery_jetstream.exceptions import (
    ConnectionRefusedByServer,
    EventError,
    NotConnectedError,
)
from celery_jetstream.outcomes import Verdict
from celery_jetstream.session import NoResponders, Session
from celery_jetstream.testing import free_port
from tests.connections import (
    INFO,
    SECRET,
    RecordingServer,
    ask,
    fill,
    session_of,
    url_of,
    works,
)
from tests.servers import NatsServer, need, wait_until
from tests.stack import ROOT

T = TypeVar("T")
NATS_PY_LATE = 5.0
"""Seconds after which a bare client that has not come back is taken for lost."""
SHORT_PING = {"ping_interval": 0.5, "max_outstanding_pings": 1, "connect_timeout": 1}


# ── what the tests stand on ──────────────────────────────────────────────────


def with_bare_client(
    url: str, body: Callable[[Client], Coroutine[Any, Any, T]], **options: Any
) -> T:
    """Runs ``body`` with nats-py's own client, as patient as it can be made."""

    async def main() -> T:
        quiet = {"error_cb": _quiet, "max_reconnect_attempts": -1, "reconnect_time_wait": 0.1}
        client = await nats.connect(url, **{**quiet, **options})
        try:
            return await body(client)
        finally:
            writer = client._transport._io_writer
            writer.transport.abort()
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()

    return bare(main())


def bare(main: Coroutine[Any, Any, T]) -> T:
    """Runs nats-py's own client, and sweeps up what it leaves."""
    try:
        return asyncio.run(main)
    finally:
        sweep_up()


def sweep_up() -> None:
    """Collects what a loop has lost, so that it is not held against a later test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


async def _quiet(error: BaseException) -> None:
    pass


async def answers(client: Client, timeout: float = 1.0) -> bool:
    try:
        await client.request("$JS.API.INFO", timeout=timeout)
    except (nats.errors.Error, asyncio.TimeoutError):
        return False
    return True


# ── states, connect, close ───────────────────────────────────────────────────


def test_nothing_happens_before_the_first_use(
    nats_server: NatsServer, connect_to: Callable[..., Connection]
) -> None:
    before = threading.active_count()
    connection = connect_to(nats_server.url)
    assert (connection.state, connection.connected) == ("disconnected", False)
    assert threading.active_count() == before


def test_states_from_first_use_to_close(
    own_server: NatsServer, connect_to: Callable[..., Connection]
) -> None:
    own_server.kill()
    connection = connect_to(own_server.url)
    connection.start()
    assert connection.state == "connecting"
    own_server.start()
    wait_until(lambda: connection.connected, 20, "the first connection")
    own_server.kill()
    wait_until(lambda: connection.state == "reconnecting", 20, "the loss to be noticed")
    own_server.start()
    wait_until(lambda: connection.state == "connected", 20, "the connection to be back")
    connection.close()
    assert connection.state == "disconnected"
    assert works(connection), "a closed connection opens again when it is used"


def test_connect_makes_so_many_attempts_so_far_apart(
    connect_to: Callable[..., Connection],
) -> None:
    with RecordingServer(INFO, hang_up=True) as server:
        connection = connect_to(
            f"nats://127.0.0.1:{server.port}", connect_retry_attempts=3, connect_retry_delay=0.5
        )
        with pytest.raises(NotConnectedError, match="unexpected EOF"):
            connection.connect()
        assert server.connections == 3
        gaps = [b - a for a, b in zip(server.times, server.times[1:], strict=False)]
        assert all(0.4 < gap < 3 for gap in gaps), gaps
        assert connection.state == "disconnected", "what failed to start does not go on"


def test_connect_without_a_server_says_where_and_why(
    connect_to: Callable[..., Connection],
) -> None:
    port = free_port()
    connection = connect_to(
        f"nats://us:{SECRET}@127.0.0.1:{port}", connect_retry_attempts=2, connect_retry_delay=0
    )
    with pytest.raises(NotConnectedError, match=f"127.0.0.1:{port}.*Connect call failed") as caught:
        connection.connect()
    assert not isinstance(caught.value, ConnectionRefusedByServer)
    assert SECRET not in str(caught.value)


def test_connect_waits_for_a_server_that_is_late(
    own_server: NatsServer, connect_to: Callable[..., Connection]
) -> None:
    own_server.kill()
    connection = connect_to(own_server.url, connect_retry_attempts=40, connect_retry_delay=0.2)
    late = threading.Timer(1, own_server.start)
    late.start()
    connection.connect()
    late.join()
    assert connection.connected


def test_a_failing_connect_does_not_end_a_connection_that_others_use(
    own_server: NatsServer, connect_to: Callable[..., Connection]
) -> None:
    connection = connect_to(own_server.url, connect_retry_attempts=1, connect_retry_delay=0.1)
    connection.connect()
    own_server.kill()
    wait_until(lambda: not connection.connected, 20, "the loss to be noticed")
    with pytest.raises(NotConnectedError):
        connection.connect()
    own_server.start()
    wait_until(lambda: connection.connected, 20, "the connection to come back by itself")


def test_reconnect_makes_a_new_client(
    nats_server: NatsServer, connect_to: Callable[..., Connection]
) -> None:
    connection = connect_to(nats_server.url)
    before = session_of(connection)
    connection.reconnect()
    after = session_of(connection)
    assert before is not after
    assert before.lost.is_set()
    assert connection.connected
    assert works(connection)


def test_nothing_is_left_of_a_thrown_away_client(
    nats_server: NatsServer, connect_to: Callable[..., Connection], caplog: pytest.LogCaptureFixture
) -> None:
    gc.collect()  # what earlier tests left
    caplog.clear()
    connection = connect_to(nats_server.url)
    connection.connect()

    async def tasks() -> int:
        return len(asyncio.all_tasks())

    before = connection.run(tasks)
    for _ in range(5):
        connection.reconnect()
    wait_until(lambda: connection.run(tasks) <= before, 10, "the old clients' tasks to end")
    connection.close()
    gc.collect()
    assert not [r for r in caplog.records if r.name == "asyncio"], caplog.text


def test_the_server_sees_a_name_that_tells_who_it_is(
    nats_server: NatsServer, connect_to: Callable[..., Connection]
) -> None:
    connection = connect_to(nats_server.url, nats_options={"name": "the shop"})
    assert connection.run(connection.session).client.options["name"] == "the shop"
    other = connect_to(nats_server.url)
    assert session_of(other).client.options["name"].split()[::2] == ["api", str(os.getpid())]


@pytest.mark.parametrize("unsent", [False, True], ids=["idle", "with unsent data"])
def test_close_is_bounded_while_the_server_hangs(
    own_server: NatsServer, connect_to: Callable[..., Connection], unsent: bool
) -> None:
    connection = connect_to(own_server.url)
    connection.connect()
    own_server.pause()
    if unsent:
        connection.call_soon(lambda: fill(connection))
    start = time.monotonic()
    connection.close()
    assert time.monotonic() - start < 6
    assert connection.state == "disconnected"
    own_server.resume()
    assert works(connection)


def test_closing_answers_those_who_still_wait(connect_to: Callable[..., Connection]) -> None:
    connection = connect_to(f"nats://127.0.0.1:{free_port()}")
    caught: list[BaseException] = []

    def wait_for_a_session() -> None:
        try:
            connection.run(connection.session, 60)
        except BaseException as error:  # what it is, is the question
            caught.append(error)

    waiting = threading.Thread(target=wait_for_a_session, daemon=True)
    waiting.start()
    wait_until(lambda: connection._waiters, 10, "the thread to wait")
    connection.close()
    waiting.join(10)
    assert [type(error) for error in caught] == [NotConnectedError]
    assert "closed" in str(caught[0])


def test_closing_an_awaiting_loop_does_not_cancel_its_task(
    connect_to: Callable[..., Connection],
) -> None:
    connection = connect_to(f"nats://127.0.0.1:{free_port()}")

    async def main() -> None:
        future = asyncio.wrap_future(connection.submit(connection.session, 60))
        await asyncio.to_thread(wait_until, lambda: connection._waiters, 10, "the wait")
        await asyncio.to_thread(connection.close)
        with pytest.raises(NotConnectedError):
            await future

    asyncio.run(main())


# before Python 3.12, wait_for() loses a connection that is made in the moment of its cancellation
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_close_and_use_may_race(
    nats_server: NatsServer, connect_to: Callable[..., Connection]
) -> None:
    connection = connect_to(nats_server.url)
    stop = threading.Event()
    broken: list[BaseException] = []

    def use() -> None:
        while not stop.is_set():
            try:
                ask(connection)
            except NotConnectedError:
                pass
            except BaseException as error:
                broken.append(error)

    threads = [threading.Thread(target=use, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        connection.close()
    stop.set()
    for thread in threads:
        thread.join(20)
    sweep_up()
    assert not any(thread.is_alive() for thread in threads), "somebody waits for ever"
    assert not broken, broken
    assert works(connection)


def test_a_blocking_call_in_the_loop_thread_is_an_error_and_no_deadlock(
    nats_server: NatsServer, connect_to: Callable[..., Connection]
) -> None:
    connection = connect_to(nats_server.url)

    async def in_the_loop() -> None:
        connection.run(connection.session)

    with pytest.raises(RuntimeError, match="own thread"):
        connection.run(in_the_loop, timeout=20)
    assert works(connection)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupted_call_leaves_nothing_behind(
    nats_server: NatsServer, connect_to: Callable[..., Connection]
) -> None:
    connection = connect_to(nats_server.url)
    cancelled = threading.Event()

    async def for_ever() -> None:
        try:
            await asyncio.sleep(600)
        finally:
            cancelled.set()

    def interrupt() -> None:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    session_of(connection)
    timer = threading.Timer(0.3, interrupt)
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        connection.run(for_ever)
    assert cancelled.wait(10)
    assert works(connection)


def test_a_callback_that_exits_ends_the_thread_and_not_the_library(
    nats_server: NatsServer, connect_to: Callable[..., Connection]
) -> None:
    connection = connect_to(nats_server.url)
    session_of(connection)
    loop = connection.start()
    crashed: list[object] = []
    hook, threading.excepthook = threading.excepthook, crashed.append
    try:
        connection.call_soon(sys.exit)
        wait_until(loop.is_closed, 20, "the thread to end")
        wait_until(lambda: works(connection), 20, "a new thread to serve")
    finally:
        threading.excepthook = hook


# ── healing: the bare client fails, ours comes back ──────────────────────────


def test_bare_zombie_a_late_pong_ends_the_read_loop(own_server: NatsServer) -> None:
    async def late_pong(client: Client) -> tuple[bool, bool]:
        own_server.pause()
        with pytest.raises(nats.errors.TimeoutError):
            await client.flush(timeout=0.2)
        own_server.resume()
        return await answers(client), client.is_connected

    answered, connected = with_bare_client(own_server.url, late_pong)
    assert (answered, connected) == (False, True), "it says connected, and hears nothing more"


def test_zombie_a_late_pong_heals(
    own_server: NatsServer, connect_to: Callable[..., Connection]
) -> None:
    connection = connect_to(own_server.url)
    before = session_of(connection)

    async def late_pong() -> None:
        own_server.pause()
        with pytest.raises(nats.errors.TimeoutError):
            await before.client.flush(timeout=0.2)
        own_server.resume()

    connection.run(late_pong)
    wait_until(before.lost.is_set, 10, "the zombie to be thrown away")
    wait_until(lambda: works(connection), 10, "a new client")


def test_zombie_a_dead_read_loop_heals(
    nats_server: NatsServer,
    connect_to: Callable[..., Connection],
    caplog: pytest.LogCaptureFixture,
) -> None:
    connection = connect_to(nats_server.url)
    before = session_of(connection)
    connection.call_soon(before.client._reading_task.cancel)
    wait_until(lambda: session_of(connection) is not before, 10, "a new client")
    assert works(connection)
    assert "NATS connection lost" in caplog.text


def oversize(body: int, headers: int) -> tuple[bytes, dict[str, str]]:
    return b"x" * body, {"Filler": "y" * headers}


def test_bare_closed_for_ever_by_headers_over_max_payload(own_server: NatsServer) -> None:
    async def too_large(client: Client) -> tuple[bool, bool]:
        body, headers = oversize(client.max_payload - 100, 4000)
        await client.publish("any", body, headers=headers)
        for _ in range(int(NATS_PY_LATE * 20)):
            if client.is_closed:
                break
            await asyncio.sleep(0.05)
        await asyncio.sleep(1)
        return client.is_closed, await answers(client)

    assert with_bare_client(own_server.url, too_large) == (True, False)


def test_closed_by_the_server_heals(
    nats_server: NatsServer,
    connect_to: Callable[..., Connection],
    caplog: pytest.LogCaptureFixture,
) -> None:
    connection = connect_to(nats_server.url)
    before = session_of(connection)
    body, headers = oversize(before.client.max_payload - 100, 4000)
    connection.run(before.publish, "any", body, headers)
    wait_until(before.lost.is_set, 10, "the server to close it")
    wait_until(lambda: works(connection), 10, "a new client")
    assert "NATS connection lost: " in caplog.text
    assert "lost: None" not in caplog.text  # -ERR, or the reset that overtook it


def test_what_is_larger_than_the_server_takes_never_costs_the_connection(
    nats_server: NatsServer, connect_to: Callable[..., Connection]
) -> None:
    connection = connect_to(nats_server.url)
    session = session_of(connection)
    body, headers = oversize(session.client.max_payload - 100, 4000)
    with pytest.raises(EventError, match="1048576"):
        connection.run(session.ask, "$JS.API.INFO", body, headers)
    assert works(connection)
    assert session_of(connection) is session


def test_bare_connect_hangs_when_tls_verification_fails(tls_server: NatsServer) -> None:
    async def main() -> bool:
        connecting = asyncio.create_task(
            nats.connect(
                url_of(tls_server, scheme="tls"), max_reconnect_attempts=1, error_cb=_quiet
            )
        )
        done, _ = await asyncio.wait([connecting], timeout=NATS_PY_LATE)
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        return bool(done)

    assert not bare(main()), "nats-py has learnt to fail here: simplify?"


def test_failed_tls_verification_is_said_at_once(
    tls_server: NatsServer, connect_to: Callable[..., Connection]
) -> None:
    connection = connect_to(url_of(tls_server, scheme="tls"))
    start = time.monotonic()
    with pytest.raises(ConnectionRefusedByServer, match="certificate verify failed"):
        connection.connect()
    assert time.monotonic() - start < 3


def test_a_peer_that_says_nothing_does_not_hold_connect(
    connect_to: Callable[..., Connection],
) -> None:
    with RecordingServer(None) as server:
        connection = connect_to(
            f"nats://127.0.0.1:{server.port}", connect_retry_attempts=2, connect_retry_delay=0.1
        )
        start = time.monotonic()
        with pytest.raises(NotConnectedError, match="did not answer in time"):
            connection.connect()
        assert time.monotonic() - start < 12


def test_a_server_that_hangs_up_after_the_handshake_is_not_hammered(
    connect_to: Callable[..., Connection],
) -> None:
    with RecordingServer(INFO, hang_up=True) as server:
        connection = connect_to(f"nats://127.0.0.1:{server.port}")
        connection.start()
        wait_until(lambda: server.connections >= 5, 30, "five attempts")
        gaps = [b - a for a, b in zip(server.times, server.times[1:], strict=False)]
        assert gaps[-1] > gaps[0] or min(gaps) > 0.04
        assert sum(gaps[:4]) > 0.5, gaps
        assert not connection.connected


def test_a_session_that_never_lasts_is_not_hammered(
    nats_server: NatsServer, connect_to: Callable[..., Connection]
) -> None:
    connection = connect_to(nats_server.url)
    born: list[float] = []

    async def end_it(session: Session) -> None:
        born.append(time.monotonic())
        session.end()

    connection.on_session(end_it)
    connection.start()
    wait_until(lambda: len(born) >= 5, 30, "five sessions")
    assert born[4] - born[0] > 0.5


def test_bare_hung_peer_with_unsent_data_is_never_left(
    own_server: NatsServer, nats_server: NatsServer
) -> None:
    async def hang(client: Client) -> bool:
        own_server.pause()
        client._transport._io_writer.write(b"PING\r\n" * 3_000_000)
        await asyncio.sleep(NATS_PY_LATE)  # stale after 1 s; a second server is in the list
        return client.is_connected and await answers(client)

    healed = with_bare_client(
        [own_server.url, nats_server.url],  # type: ignore[arg-type]
        hang,
        dont_randomize=True,
        ping_interval=0.5,
        max_outstanding_pings=1,
    )
    own_server.resume()
    assert not healed, "nats-py has learnt to fail over: simplify?"


@pytest.mark.parametrize("unsent", [False, True], ids=["idle", "with unsent data"])
def test_hung_peer_fails_over_in_bounded_time(
    own_server: NatsServer, connect_to: Callable[..., Connection], unsent: bool
) -> None:
    with NatsServer() as other:
        servers = {server.port: server for server in (own_server, other)}
        connection = connect_to([own_server.url, other.url])
        before = session_of(connection)
        hung = servers.pop(before.client.connected_url.port)
        hung.pause()
        if unsent:
            connection.call_soon(lambda: fill(connection))
        start = time.monotonic()
        wait_until(lambda: works(connection), 15, "the other server to be used")
        assert time.monotonic() - start < 12
        assert session_of(connection).client.connected_url.port == servers.popitem()[0]


def test_hung_peer_that_goes_on_is_used_again(
    own_server: NatsServer, connect_to: Callable[..., Connection]
) -> None:
    connection = connect_to(own_server.url, nats_options=SHORT_PING)
    connection.connect()
    own_server.pause()
    wait_until(lambda: not connection.connected, 15, "the hang to be noticed")
    own_server.resume()
    wait_until(lambda: works(connection), 15, "the connection to be back")


def test_bare_gives_up_for_ever(own_server: NatsServer) -> None:
    async def outage(client: Client) -> bool:
        await asyncio.to_thread(own_server.kill)
        for _ in range(200):
            if client.is_closed:
                break
            await asyncio.sleep(0.05)
        await asyncio.to_thread(own_server.start)
        return await answers(client)

    options = {"max_reconnect_attempts": 3, "reconnect_time_wait": 0.1}
    assert not with_bare_client(own_server.url, outage, **options)


def test_reconnects_for_ever(
    own_server: NatsServer,
    connect_to: Callable[..., Connection],
    caplog: pytest.LogCaptureFixture,
) -> None:
    connection = connect_to(own_server.url, connect_retry_attempts=1, connect_retry_delay=0.1)
    connection.connect()
    own_server.kill()
    with pytest.raises(TimeoutError):
        wait_until(lambda: connection.connected and works(connection), 5, "a wonder")
    own_server.start()
    wait_until(lambda: works(connection), 20, "the connection to be back")
    ours = [r.message for r in caplog.records if r.name == "celery_jetstream.connection"]
    assert len(ours) == 2, f"said once each: {ours}"
    assert "lost" in ours[0]
    assert "back" in ours[1]


def test_a_lame_duck_is_left_for_another_server(
    own_server: NatsServer, connect_to: Callable[..., Connection]
) -> None:
    with NatsServer() as other:
        servers = {server.port: server for server in (own_server, other)}
        connection = connect_to([own_server.url, other.url])
        lame = servers.pop(session_of(connection).client.connected_url.port)
        os.kill(lame.pid, signal.SIGUSR2)
        last = servers.popitem()[0]

        def moved() -> bool:
            url = session_of(connection).client.connected_url  # None in between
            return url is not None and url.port == last and works(connection)

        wait_until(moved, 20, "the connection to move")


def test_what_waits_for_an_answer_is_told_of_the_loss_at_once(
    own_server: NatsServer, connect_to: Callable[..., Connection]
) -> None:
    connection = connect_to(own_server.url)
    session = session_of(connection)
    connection.run(session.client.subscribe, "deaf.ear")

    waiting = connection.submit(_ask_for_ever, session)
    wait_until(lambda: session._waiting, 10, "the request to wait")
    own_server.kill()
    start = time.monotonic()
    with pytest.raises(NotConnectedError, match="lost"):
        waiting.result(20)
    assert time.monotonic() - start < 10
    with pytest.raises(NotConnectedError, match="lost"):
        connection.run(session.ask, "deaf.ear")


async def _ask_for_ever(session: Session) -> None:
    await session.ask("deaf.ear", timeout=600)


def test_a_request_that_nobody_hears_or_answers(
    nats_server: NatsServer, connect_to: Callable[..., Connection]
) -> None:
    connection = connect_to(nats_server.url)
    session = session_of(connection)
    with pytest.raises(NoResponders):
        connection.run(session.ask, "nobody.there")
    connection.run(session.client.subscribe, "deaf.ear")

    async def ask_many() -> list[BaseException | Any]:
        asked = [session.ask("deaf.ear", timeout=0.2) for _ in range(300)]
        return await asyncio.gather(*asked, return_exceptions=True)

    assert {type(answer) for answer in connection.run(ask_many)} == {NotConnectedError}
    wait_until(lambda: not session._waiting, 10, "the unanswered to be forgotten")


# ── hooks ────────────────────────────────────────────────────────────────────


def test_hooks_prepare_each_session_before_others_have_it(
    own_server: NatsServer, connect_to: Callable[..., Connection]
) -> None:
    connection = connect_to(own_server.url)
    seen: list[Session] = []

    async def raises(session: Session) -> None:
        raise ValueError("of no account")

    async def note(session: Session) -> None:
        await session.ask("$JS.API.INFO")
        seen.append(session)

    connection.on_session(raises)
    connection.on_session(note)
    assert seen == [session_of(connection)]
    own_server.restart()
    wait_until(lambda: len(seen) == 2, 20, "the hook to run for the new session")


def test_a_hook_that_hangs_holds_neither_waiters_nor_the_watch(
    own_server: NatsServer,
    connect_to: Callable[..., Connection],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("celery_jetstream.connection.HOOK_TIMEOUT", 0.3)
    connection = connect_to(own_server.url)
    sessions: list[Session] = []

    async def hang(session: Session) -> None:
        sessions.append(session)
        await asyncio.sleep(600)

    connection.on_session(hang)
    connection.run(connection.session, 20)
    monkeypatch.setattr("celery_jetstream.connection.HOOK_TIMEOUT", 600)
    connection.call_soon(sessions[0].end)
    wait_until(lambda: len(sessions) == 2, 20, "the next session's hook")
    own_server.restart()  # while that hook hangs
    wait_until(sessions[1].lost.is_set, 20, "the loss to be noticed all the same")
    wait_until(lambda: len(sessions) == 3, 20, "the session after that")


# ── credentials ──────────────────────────────────────────────────────────────


@pytest.fixture
def guarded_server() -> Iterator[NatsServer]:
    """Takes user ``us`` with the secret, and nobody else."""
    need("nats")
    config = f'authorization {{ users: [{{user: us, password: "{SECRET}"}}] }}'
    with NatsServer(config=config) as server:
        yield server


@pytest.mark.parametrize("how", ["url", "options", "callable"])
def test_user_and_password(
    guarded_server: NatsServer, connect_to: Callable[..., Connection], how: str
) -> None:
    password: Any = (lambda: SECRET) if how == "callable" else SECRET
    options = {} if how == "url" else {"user": "us", "password": password}
    connection = connect_to(
        url_of(guarded_server, f"us:{SECRET}" if how == "url" else ""), nats_options=options
    )
    connection.connect()
    guarded_server.restart()
    wait_until(lambda: works(connection), 20, "the credentials to be used again")


@pytest.mark.parametrize("how", ["url", "options"])
def test_token(connect_to: Callable[..., Connection], how: str) -> None:
    need("nats")
    with NatsServer(config=f'authorization {{ token: "{SECRET}" }}') as server:
        if how == "url":
            connection = connect_to(url_of(server, SECRET))
        else:
            connection = connect_to(server.url, nats_options={"token": SECRET})
        connection.connect()
        assert works(connection)


def test_nkey_seed(connect_to: Callable[..., Connection]) -> None:
    need("nats")
    seed = nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER)
    public = nkeys.from_seed(bytearray(seed)).public_key.decode()
    with NatsServer(config=f"authorization {{ users: [{{nkey: {public}}}] }}") as server:
        connection = connect_to(server.url, nats_options={"nkeys_seed_str": seed.decode()})
        connection.connect()
        assert works(connection)
        assert seed.decode() not in repr(connection.config)


@pytest.mark.parametrize(
    ("user", "options"),
    [
        (f"us:{SECRET}-not", {}),
        ("", {"user": "us", "password": f"{SECRET}-not"}),
        ("", {"token": f"{SECRET}-not"}),
        ("", {}),
    ],
    ids=["url", "options", "token", "none"],
)
def test_wrong_credentials_are_said_at_once_and_never_shown(
    guarded_server: NatsServer,
    make_jetstream: Callable[..., JetStream],
    caplog: pytest.LogCaptureFixture,
    user: str,
    options: dict[str, Any],
) -> None:
    caplog.set_level(logging.DEBUG)
    jetstream = make_jetstream(url_of(guarded_server, user), jetstream_nats_options=options)
    start = time.monotonic()
    with pytest.raises(ConnectionRefusedByServer, match="check the user, password") as caught:
        jetstream.connect()
    assert time.monotonic() - start < 2
    result = jetstream.publish("user.created", {"id": 1})
    assert (result.success, result.verdict) == (False, Verdict.DENIED)
    assert not result.transient
    with pytest.raises(NotConnectedError):  # retried for ever, as what is no fault of an event's
        jetstream.app.tasks["celery_jetstream.publish_event"](event_type="a.b", payload={})
    shown = [
        str(caught.value), repr(caught.value), repr(caught.value.__cause__), caplog.text,
        repr(jetstream), repr(jetstream.config), repr(jetstream.connection), repr(result),
    ]  # fmt: skip
    assert not [text for text in shown if SECRET in text]


def test_bare_asks_again_and_again_with_a_wrong_password(guarded_server: NatsServer) -> None:
    async def main() -> bool:
        connecting = nats.connect(
            url_of(guarded_server, "us:wrong"),
            max_reconnect_attempts=-1,
            reconnect_time_wait=0.1,
            error_cb=_quiet,
        )
        done, pending = await asyncio.wait([asyncio.create_task(connecting)], timeout=3)
        for task in pending:
            task.cancel()
        return bool(done)

    assert not bare(main())


def test_a_refusal_is_forgotten_when_the_server_changes_its_mind(
    guarded_server: NatsServer, connect_to: Callable[..., Connection]
) -> None:
    connection = connect_to(url_of(guarded_server, "us:new"))
    for _ in range(2):
        with pytest.raises(ConnectionRefusedByServer):
            connection.connect()
    guarded_server.config = guarded_server.config.replace(SECRET, "new")
    guarded_server.restart()
    connection.connect()


def test_a_password_changed_while_connected_heals_when_it_is_changed_back(
    guarded_server: NatsServer, connect_to: Callable[..., Connection]
) -> None:
    connection = connect_to(url_of(guarded_server, f"us:{SECRET}"))
    connection.connect()
    right = guarded_server.config
    guarded_server.config = right.replace(SECRET, "changed")
    guarded_server.restart()
    wait_until(
        lambda: isinstance(connection.last_error, ConnectionRefusedByServer), 20, "the refusal"
    )
    guarded_server.config = right
    guarded_server.restart()
    wait_until(lambda: works(connection), 30, "the connection to be back")


def test_one_of_two_servers_refuses(
    guarded_server: NatsServer, nats_server: NatsServer, connect_to: Callable[..., Connection]
) -> None:
    for _ in range(4):  # whatever the order
        connection = connect_to([url_of(guarded_server, "us:wrong"), nats_server.url])
        connection.connect()
        assert works(connection)
        connection.close()


def test_credentials_in_urls_are_never_shown_in_an_outage(
    guarded_server: NatsServer,
    make_jetstream: Callable[..., JetStream],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    jetstream = make_jetstream(url_of(guarded_server, f"us:{SECRET}"))
    jetstream.connect()
    guarded_server.kill()
    result = jetstream.publish("user.created", {"id": 1}, timeout=0.5)
    guarded_server.start()
    wait_until(lambda: jetstream.connected, 20, "the connection to be back")
    assert "127.0.0.1" in str(result.error)
    assert SECRET not in caplog.text + repr(result) + repr(jetstream.config)


def test_a_denied_operation_is_logged(
    connect_to: Callable[..., Connection], caplog: pytest.LogCaptureFixture
) -> None:
    need("nats")
    config = (
        "authorization { users: [{user: us, password: pw, "
        "permissions: {publish: {deny: [no.*]}}}] }"
    )
    with NatsServer(config=config) as server:
        connection = connect_to(url_of(server, "us:pw"))
        session = session_of(connection)
        connection.run(session.publish, "no.way", b"")
        wait_until(lambda: "denied an operation" in caplog.text, 10, "the log to say it")
        assert session_of(connection) is session, "which is no reason to reconnect"


# ── TLS ──────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def tls_server(
    authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[NatsServer]:
    need("nats")
    folder = tmp_path_factory.mktemp("tls")
    certificate = authority.issue_cert("127.0.0.1")
    certificate.private_key_pem.write_to_path(folder / "key.pem")
    certificate.cert_chain_pems[0].write_to_path(folder / "cert.pem")
    config = f'tls {{ cert_file: "{folder / "cert.pem"}", key_file: "{folder / "key.pem"}" }}'
    with NatsServer(config=config) as server:
        yield server


def trusting(authority: trustme.CA) -> Any:
    import ssl

    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


@pytest.mark.parametrize("scheme", ["nats", "tls"])
def test_tls(
    tls_server: NatsServer,
    authority: trustme.CA,
    connect_to: Callable[..., Connection],
    scheme: str,
) -> None:
    connection = connect_to(
        url_of(tls_server, scheme=scheme), nats_options={"tls": trusting(authority)}
    )
    connection.connect()
    assert session_of(connection).client.encrypted
    connection.reconnect()
    assert works(connection)


def test_bare_has_asyncio_warn_when_a_tls_connection_ends(
    tls_server: NatsServer, authority: trustme.CA, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        client = await nats.connect(tls_server.url, tls=trusting(authority))
        await client.close()
        await asyncio.sleep(0.1)

    bare(main())
    assert "returning true from eof_received" in caplog.text


def test_a_tls_connection_ends_without_a_word_of_asyncio(
    authority: trustme.CA,
    tls_server: NatsServer,
    connect_to: Callable[..., Connection],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Closed by us, by the server, and by a server that does not let us in."""
    trust = {"tls": trusting(authority)}
    connection = connect_to(tls_server.url, nats_options=trust)
    connection.connect()
    connection.close()
    config = f"{tls_server.config}\nauthorization {{ user: us, password: p }}"
    with NatsServer(config=config) as server:
        stranger = connect_to(server.url, nats_options=trust)
        with pytest.raises(ConnectionRefusedByServer):
            stranger.connect()
        connection = connect_to(server.url, nats_options={**trust, "user": "us", "password": "p"})
        connection.connect()
        server.stop()
        wait_until(lambda: not connection.connected, 10, "the end to be seen")
        connection.close()
    assert [one.getMessage() for one in caplog.records if one.name == "asyncio"] == []


def test_bare_sends_credentials_in_clear_where_tls_was_asked_for() -> None:
    with RecordingServer(INFO) as server:

        async def main() -> None:
            url = f"tls://us:{SECRET}@127.0.0.1:{server.port}"
            options = {"allow_reconnect": False, "error_cb": _quiet}
            with pytest.raises(asyncio.TimeoutError):
                await nats.connect(url, connect_timeout=1, **options)

        bare(main())
        wait_until(lambda: SECRET.encode() in server.received, 10, "the secret in clear")


@pytest.mark.parametrize("how", ["url", "options"])
def test_tls_asked_for_of_a_plain_server_is_refused_and_nothing_sent(
    authority: trustme.CA, connect_to: Callable[..., Connection], how: str
) -> None:
    with RecordingServer({**INFO, "auth_required": True}) as server:
        scheme = "tls" if how == "url" else "nats"
        options = {} if how == "url" else {"tls": trusting(authority)}
        connection = connect_to(
            f"{scheme}://us:{SECRET}@127.0.0.1:{server.port}", nats_options=options
        )
        start = time.monotonic()
        with pytest.raises(ConnectionRefusedByServer, match="TLS was asked for") as caught:
            connection.connect()
        assert time.monotonic() - start < 3
        assert SECRET not in str(caught.value)
        assert server.connections == 1
        assert server.received == b""


def test_tls_asked_for_of_a_real_plain_server_is_refused(
    nats_server: NatsServer, connect_to: Callable[..., Connection]
) -> None:
    with pytest.raises(ConnectionRefusedByServer, match="TLS was asked for"):
        connect_to(url_of(nats_server, scheme="tls")).connect()


# ── processes ────────────────────────────────────────────────────────────────


def in_a_fork(body: Callable[[], object]) -> str:
    """Runs ``body`` in an os.fork() child; returns the repr of its result, or its error."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            answer = repr(body())
        except BaseException as error:
            answer = f"raised {error!r}"
        os.write(write, answer.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        answer = pipe.read().decode()
    os.waitpid(pid, 0)
    return answer


fork_warns = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


@fork_warns
def test_a_forked_child_opens_its_own(
    nats_server: NatsServer, connect_to: Callable[..., Connection]
) -> None:
    connection = connect_to(nats_server.url)
    before = session_of(connection)
    parents = before.client.client_id

    def child() -> list[object]:
        first = connection.state
        own = session_of(connection).client.client_id
        return [first, own != parents, works(connection)]

    assert in_a_fork(child) == "['disconnected', True, True]"
    assert session_of(connection) is before
    assert works(connection)


@fork_warns
def test_a_child_forked_while_the_parent_connects(
    own_server: NatsServer, connect_to: Callable[..., Connection]
) -> None:
    own_server.pause()
    connection = connect_to(own_server.url)
    connection.start()
    wait_until(lambda: connection.run(_count_tasks) > 2, 10, "the parent to connect")
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(write)
        os.read(read, 1)
        os._exit(0 if works(connection) else 1)
    own_server.resume()
    wait_until(lambda: works(connection), 20, "the parent's connection")
    os.write(write, b"x")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    os.close(read)
    os.close(write)


async def _count_tasks() -> int:
    return len(asyncio.all_tasks())


@fork_warns
def test_forks_while_the_parent_publishes(
    nats_server: NatsServer, make_jetstream: Callable[..., JetStream]
) -> None:
    jetstream = make_jetstream(nats_server.url)
    jetstream.connect()
    session = session_of(jetstream.connection)
    stop = threading.Event()
    results = []

    def publish() -> None:
        while not stop.is_set():
            results.append(jetstream.publish("user.created", {"id": len(results)}))

    threads = [threading.Thread(target=publish, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(results) > 10, 20, "the parent to publish")
    for _ in range(5):
        assert in_a_fork(lambda: jetstream.publish("child.born", {}).success) == "True"
    stop.set()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert all(results)
    assert session_of(jetstream.connection) is session, "the parent was not disturbed"


@fork_warns
def test_multiprocessing_children_publish(
    nats_server: NatsServer, make_jetstream: Callable[..., JetStream]
) -> None:
    import multiprocessing

    jetstream = make_jetstream(nats_server.url)
    jetstream.connect()
    context = multiprocessing.get_context("fork")
    with context.Pool(3, initializer=_keep, initargs=(jetstream,)) as pool:
        assert pool.map(_publish_one, range(30), 1) == [True] * 30
    assert jetstream.publish("user.created", {"id": 1})


_kept: list[JetStream] = []


def _keep(jetstream: JetStream) -> None:
    _kept.append(jetstream)


def _publish_one(number: int) -> bool:
    return _kept[0].publish("child.born", {"id": number}).success


def test_a_process_that_never_closes_ends(nats_server: NatsServer, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "from celery import Celery\n"
        "from celery_jetstream import JetStream\n"
        "app = Celery('x', broker='memory://')\n"
        f"app.conf.update(jetstream_nats_urls={nats_server.url!r}, jetstream_app_name='end-a',\n"
        "    jetstream_destination_app='end-b', jetstream_stream_name='end-stream')\n"
        "print(JetStream(app).publish('user.created', {'id': 1}).success)\n"
    )
    done = subprocess.run(
        [sys.executable, "-X", "dev", str(script)],
        capture_output=True,
        text=True,
        timeout=40,
        cwd=ROOT,
        check=True,
    )
    assert done.stdout == "True\n"
    assert done.stderr == ""


def test_under_gevent_other_greenlets_go_on_and_handlers_may_run_loops(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from gevent import monkey; monkey.patch_all()\n"
        "import asyncio, gevent\n"
        "from celery import Celery\n"
        "from celery_jetstream import JetStream\n"
        "app = Celery('x', broker='memory://')\n"
        f"app.conf.update(jetstream_nats_urls={nats_server.url!r}, jetstream_app_name='gev-a',\n"
        "    jetstream_destination_app='gev-b', jetstream_stream_name='gev-stream')\n"
        "jetstream = JetStream(app)\n"
        "ticks = []\n"
        "def tick():\n"
        "    while True:\n"
        "        ticks.append(1); gevent.sleep(0.001)\n"
        "gevent.spawn(tick)\n"
        "async def nothing(): return 7\n"
        "def work(n):\n"
        "    return jetstream.publish('user.created', {'id': n}).success\n"
        "jobs = [gevent.spawn(work, n) for n in range(30)]\n"
        "gevent.joinall(jobs, timeout=30)\n"
        "assert asyncio.run(nothing()) == 7\n"
        "print(all(job.value for job in jobs), len(ticks) > 3)\n"
        "jetstream.close()\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=50,
        cwd=ROOT,
        check=False,
    )
    assert done.stdout == "True True\n", done.stderr[-3000:]
