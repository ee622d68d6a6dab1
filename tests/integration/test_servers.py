"""The tests' own servers are what the other tests think they are."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import kombu
import nats
import pytest
import redis

from celery_jetstream.testing import LocalServer, ServerError, free_port
from tests.servers import OLD_NATS_SERVER, NatsServer, RabbitServer, RedisServer, need, wait_until


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


async def store(url: str, body: bytes) -> None:
    client = await nats.connect(url)
    try:
        jetstream = client.jetstream()
        await jetstream.add_stream(name="kept", subjects=["kept.>"])
        await jetstream.publish("kept.one", body)
    finally:
        await client.close()


async def stored(url: str) -> bytes | None:
    client = await nats.connect(url)
    try:
        return (await client.jetstream().get_msg("kept", 1)).data
    finally:
        await client.close()


@pytest.fixture(params=["nats", "old-nats"])
def nats_binary(request):
    need(request.param)
    return OLD_NATS_SERVER if request.param == "old-nats" else None


class TestNatsServer:
    def test_a_stored_message_is_there_after_a_kill(self, nats_binary):
        with NatsServer(binary=nats_binary) as server:
            port = server.port
            asyncio.run(store(server.url, b"kept"))
            server.kill()
            assert not answers(port)
            server.start()
            assert server.port == port
            assert asyncio.run(stored(server.url)) == b"kept"

    def test_a_given_directory_is_kept(self, tmp_path):
        with NatsServer(tmp_path) as server:
            asyncio.run(store(server.url, b"kept"))
        with NatsServer(tmp_path) as server:
            assert asyncio.run(stored(server.url)) == b"kept"

    def test_stopped_it_leaves_no_process_no_port_and_no_file(self):
        server = NatsServer().start()
        pid, directory = server.pid, server.directory
        server.stop()
        assert not alive(pid)
        assert not answers(server.port)
        assert not directory.exists()
        server.stop()  # a second time is no error

    def test_it_runs_again_after_a_stop(self):
        server = NatsServer()
        with server:
            url = server.url
        with server:
            assert server.url == url
            assert answers(server.port)

    def test_a_paused_server_takes_connections_and_says_nothing(self):
        with NatsServer() as server:
            server.pause()
            with socket.create_connection(("127.0.0.1", server.port), timeout=0.2) as connection:
                with pytest.raises(TimeoutError):
                    connection.recv(4)
                server.resume()
                connection.settimeout(5)
                assert connection.recv(4) == b"INFO"

    def test_a_paused_server_can_be_stopped(self):
        with NatsServer() as server:
            pid = server.pid
            server.pause()
        assert not alive(pid)

    def test_a_configuration_applies_and_can_change_at_a_restart(self):
        async def connect(url: str, password: str) -> None:
            client = nats.NATS()
            try:
                await client.connect(
                    url, user="api", password=password, allow_reconnect=False, error_cb=ignore
                )
            finally:
                await client.close()  # a refused client does not close its socket by itself

        async def ignore(error: Exception) -> None:
            pass

        users = "authorization {{ users = [{{ user: api, password: {} }}] }}"
        with NatsServer(config=users.format("first")) as server:
            asyncio.run(connect(server.url, "first"))
            server.config = users.format("second")
            server.restart()
            asyncio.run(connect(server.url, "second"))
            with pytest.raises(nats.errors.Error, match="Authorization"):
                asyncio.run(connect(server.url, "first"))

    def test_arguments_are_passed_on(self):
        port = free_port()
        with NatsServer(arguments=["--http_port", str(port)]):
            assert answers(port)

    def test_what_the_server_says_is_in_the_error(self):
        with pytest.raises(ServerError, match="Unexpected EOF"):
            NatsServer(config="nonsense {").start()

    def test_a_missing_binary_is_named_with_the_remedy(self):
        with pytest.raises(ServerError, match=r"/no/such/binary.*celery-jetstream\[embedded\]"):
            NatsServer(binary="/no/such/binary").start()

    def test_it_takes_another_port_when_its_first_is_taken_meanwhile(self):
        server = NatsServer()
        first = server.port
        with socket.create_server(("127.0.0.1", first)), server:
            assert server.port != first
            assert answers(server.port)

    def test_a_port_that_was_asked_for_is_not_changed(self):
        port = free_port()
        with NatsServer(port=port) as server:
            assert server.port == port

    def test_two_servers_do_not_meet(self):
        with NatsServer() as one, NatsServer() as other:
            asyncio.run(store(one.url, b"kept"))
            with pytest.raises(nats.js.errors.NotFoundError):
                asyncio.run(stored(other.url))

    def test_only_a_running_server_can_be_paused(self):
        with pytest.raises(ServerError, match="start it first"):
            NatsServer().pause()

    @pytest.mark.parametrize("end", ["sys.exit()", "os.kill(os.getpid(), signal.SIGKILL)"])
    def test_it_ends_with_the_program_that_started_it(self, end, tmp_path):
        program = textwrap.dedent(f"""
            import os, signal, sys
            from pathlib import Path
            from celery_jetstream.testing import NatsServer
            server = NatsServer(Path({str(tmp_path)!r})).start()
            print(server.pid, flush=True)
            {end}
        """)
        ended = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=False
        )
        assert ended.returncode in (0, -signal.SIGKILL), ended.stderr
        pid = int(ended.stdout)
        wait_until(lambda: not alive(pid), 5, f"process {pid} to end")

    def test_a_forked_child_does_not_end_it(self):
        program = textwrap.dedent("""
            import os, socket, sys
            from celery_jetstream.testing import NatsServer
            server = NatsServer().start()
            if (child := os.fork()) == 0:
                sys.exit()  # with its exit handlers
            os.waitpid(child, 0)
            print(server.running, socket.socket().connect_ex(("127.0.0.1", server.port)))
        """)
        told = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True
        )
        assert told.stdout.split() == ["True", "0"]


class TestRedisServer:
    @pytest.fixture
    def server(self):
        need("redis")
        with RedisServer() as server:
            yield server

    def test_it_comes_back_empty_on_the_same_port(self, server):
        url = server.url
        with redis.Redis.from_url(url) as client:
            client.set("key", "value")
        server.kill()
        server.start()
        assert server.url == url
        with redis.Redis.from_url(url) as client:
            assert client.get("key") is None

    def test_stopped_it_is_gone(self, server):
        pid = server.pid
        server.stop()
        assert not alive(pid)
        assert not answers(server.port)


class TestRabbitServer:
    @pytest.fixture
    def server(self):
        need("rabbitmq")
        with RabbitServer() as server:
            yield server

    @pytest.mark.timeout(180)
    def test_a_stored_message_is_there_after_a_kill_and_no_process_after_a_stop(self, server):
        url, pids = server.url, (server.pid, server._epmd.pid)
        confirmed = {"confirm_publish": True}
        with kombu.Connection(url, transport_options=confirmed) as connection:
            connection.SimpleQueue("kept").put("kept")
        server.kill()
        assert not answers(server.port)
        server.start()
        assert server.url == url
        with kombu.Connection(url) as connection:
            assert connection.SimpleQueue("kept").get(timeout=10).payload == "kept"
        pids += (server.pid,)
        server.stop()
        assert [pid for pid in pids if alive(pid)] == []
        assert not answers(server.port)
        assert not answers(server._epmd.port)


class TestShared:
    """The fixtures that other tests use give servers that run."""

    def test_nats(self, nats_server: NatsServer):
        assert answers(nats_server.port)

    def test_old_nats(self, old_nats_server: NatsServer):
        async def version() -> str:
            client = await nats.connect(old_nats_server.url)
            try:
                return str(client.connected_server_version)
            finally:
                await client.close()

        assert "v2.9." in asyncio.run(version())

    def test_redis(self, redis_server: RedisServer):
        assert answers(redis_server.port)

    def test_rabbit(self, rabbit_server: RabbitServer):
        assert answers(rabbit_server.port)

    def test_names_are_legal_and_differ(self, names):
        texts = {names.app_name, names.destination_app, names.stream_name}
        assert len(texts) == 3
        assert all(text.replace("-", "").isalnum() for text in texts)


class TestWaitUntil:
    def test_it_returns_what_the_condition_returned(self):
        answers = iter([None, 0, "there"])
        assert wait_until(lambda: next(answers), 5, "an answer") == "there"

    def test_it_says_what_was_waited_for(self):
        with pytest.raises(TimeoutError, match=r"waited 0.01 s for the moon; last answer: False"):
            wait_until(lambda: False, 0.01, "the moon")

    def test_a_server_that_never_gets_ready_is_ended_and_its_log_shown(self):
        class Mute(LocalServer):
            name = "mute"
            start_timeout = 0.5

            def command(self):
                return ["sh", "-c", "echo I am mute; exec sleep 60"]

            def is_ready(self):
                return False

        server = Mute()
        with pytest.raises(
            ServerError, match=r"waited 0\.5 s for mute to be ready(.|\n)*I am mute"
        ):
            server.start()
        assert not server.running
        server.stop()
