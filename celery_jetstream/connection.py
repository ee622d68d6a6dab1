"""The wire: one NATS connection per process and Celery app, in a daemon loop thread.

Hands on a :class:`~celery_jetstream.session.Session`. Never reconnects inside nats-py: its
reconnect can hang, give up for ever, or keep a client whose read loop is dead. Here there is one
path instead. When a client is lost, for whatever reason, it is thrown away and the supervisor
opens a new one, for ever, with jitter: to another server first, of the settings or of the cluster.

Threads: every public method of :class:`Connection` may be called from any thread but the loop
thread itself. Forks: a child starts with no connection and opens its own when it needs one;
the parent is not disturbed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import socket
import ssl
import threading
import time
import weakref
from collections import UserString
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from concurrent.futures import Future as ThreadFuture
from concurrent.futures import TimeoutError as ThreadTimeoutError
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from . import signals
from .client import Client, clients
from .config import Config
from .exceptions import ConnectionRefusedByServer, NotConnectedError
from .rotation import Rotation, Server
from .session import Session
from .threads import NativeEvent, in_native_thread, start_native_thread, wait

__all__ = ("Connection",)

logger = logging.getLogger(__name__)

T = TypeVar("T")

DISCONNECTED, CONNECTING, CONNECTED, RECONNECTING = (
    "disconnected",
    "connecting",
    "connected",
    "reconnecting",
)

#: What nats-py is told unless ``jetstream_nats_options`` says otherwise. A peer that hangs is
#: noticed when it leaves ``max_outstanding_pings`` unanswered: after 3 to 4 s, and not for a stall
#: of 2 s. (While bytes wait to be sent, :meth:`Session.watch` notices it within 3 s.)
CLIENT_DEFAULTS: Mapping[str, Any] = {
    "connect_timeout": 2,
    "ping_interval": 1,
    "max_outstanding_pings": 3,
    "flush_timeout": 2,
}
RECONNECT_DELAY = (0.1, 2.0)
REFUSED_DELAY = 5.0
#: A session that lasts less counts as a failed attempt: a server that accepts us and throws us
#: out again is not asked without a pause.
SHORT_LIFE = 5.0
#: Seconds that one ``on_session`` hook may take.
HOOK_TIMEOUT = 5.0


class Connection:
    """Keeps a session open for ever, from the first use to :meth:`close`."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._hooks: list[Callable[[Session], Awaitable[None]]] = []
        self._reset()
        _connections.add(self)

    def _reset(self) -> None:
        self._lock = threading.RLock()  # a signal handler may come in between and close
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopped: NativeEvent | None = None
        self._session: Session | None = None
        self._waiters: set[asyncio.Future[Session]] = set()
        self._state = DISCONNECTED
        self._server_limit = 2**63
        self._turn_of: asyncio.AbstractEventLoop | None = None
        self._turn_asked = self._turned = 0.0
        self._pace: float | None = None  # connect() sets how long to pause between attempts
        self._forget_attempts()

    def _forget_attempts(self) -> None:
        self._rounds = 0  # attempts at each of the servers
        self._ever_connected = False
        self._refusal: ConnectionRefusedByServer | None = None
        self.last_error: BaseException | None = None

    # -- from any thread -------------------------------------------------------------------------

    @property
    def state(self) -> str:
        """``disconnected``, ``connecting``, ``connected`` or ``reconnecting``."""
        session = self._session
        if self._state == CONNECTED and (session is None or not session.client.alive):
            return RECONNECTING
        return self._state

    @property
    def connected(self) -> bool:
        """Whether there is a live session now."""
        return self.state == CONNECTED

    @property
    def live_session(self) -> Session | None:
        """The session while there is one, else None; its methods are for the loop thread."""
        session = self._session
        return None if session is None or session.lost.is_set() else session

    @property
    def silent_for(self) -> float:
        """Seconds for which the loop thread has not turned, as far as was asked before.

        Asks anew, and does not wait: what a hook or a receiver blocks is told by the next calls.
        """
        now, loop = time.monotonic(), self._loop
        if loop is None:
            return 0.0
        if self._turn_of is not loop or self._turned >= self._turn_asked:
            self._turn_of, self._turn_asked, self._turned = loop, now, 0.0
            with contextlib.suppress(RuntimeError):  # it has just been closed
                loop.call_soon_threadsafe(self._turn)
        return now - self._turn_asked

    def _turn(self) -> None:
        self._turned = time.monotonic()

    @property
    def max_payload(self) -> int:
        """Bytes that a message may have with its headers: our setting's or the server's limit."""
        return min(self.config.max_payload, self._server_limit)

    def start(self) -> asyncio.AbstractEventLoop:
        """Starts the loop thread and its supervisor where they do not run.

        Waits for the thread, not for the server.
        """
        with self._lock:
            if self._loop is None:
                started: ThreadFuture[asyncio.AbstractEventLoop] = ThreadFuture()
                self._forget_attempts()
                self._state = CONNECTING
                stopped = start_native_thread(self._run_loop, started, self._stopped)
                self._loop, self._stopped = wait(started, None), stopped
            return self._loop

    def connect(self) -> None:
        """Blocks until connected.

        Makes ``jetstream_connect_retry_attempts`` attempts (at each of the servers),
        ``jetstream_connect_retry_delay`` seconds apart. Where they fail, a connection that this
        call began is closed again.

        Raises:
            ConnectionRefusedByServer: credentials or TLS are wrong; at once.
            NotConnectedError: no server answered.
        """
        was_running = self._loop is not None
        before = self._rounds if was_running else 0
        self._pace = self.config.connect_retry_delay
        try:
            self.run(self._connect, before + self.config.connect_retry_attempts)
        except NotConnectedError:
            if not was_running:
                self.close()
            raise
        finally:
            self._pace = None

    def reconnect(self, timeout: float = 10.0) -> None:
        """Drops the connection and waits, at most ``timeout`` seconds, for a new one."""

        async def renew() -> None:
            if self._session is not None:
                self._session.end()
                self._session = None
            await self.session(timeout)

        self.run(renew)

    def close(self, timeout: float = 5.0) -> None:
        """Ends the connection and its thread, in ``timeout`` seconds at the most.

        Whoever still waits for an answer gets a ``NotConnectedError``.
        """
        with self._lock:
            loop, stopped = self._loop, self._stopped
            self._loop, self._state = None, DISCONNECTED
            if loop is None or stopped is None:
                return
            loop.call_soon_threadsafe(loop.stop)
        if _running_loop() is not loop and not stopped.wait_among_greenlets(timeout):
            logger.warning("the NATS connection's thread did not end in %g s", timeout)

    def run(
        self,
        function: Callable[..., Coroutine[Any, Any, T]],
        *args: Any,
        timeout: float | None = None,
    ) -> T:
        """Runs a coroutine function in the loop thread and waits for its result.

        Crossing threads costs more than a publish: cross once per block of messages.

        Raises:
            NotConnectedError: not done within ``timeout`` seconds, or closed meanwhile.
            RuntimeError: called in the loop thread, which would wait for itself.
        """
        if self._loop is not None and _running_loop() is self._loop:
            raise RuntimeError(
                "this blocks and was called in the JetStream connection's own thread (a receiver "
                "of message_dead_lettered, or a hook): hand it to another thread or to a task"
            )
        future = self.submit(function, *args)
        try:
            return wait(future, timeout)
        except ThreadTimeoutError:
            if future.done():  # the coroutine's own
                raise
            future.cancel()
            raise NotConnectedError(f"NATS did not answer in {timeout:g} s") from None
        except BaseException:  # e.g. SoftTimeLimitExceeded raised into this thread
            future.cancel()
            raise

    def submit(
        self, function: Callable[..., Coroutine[Any, Any, T]], *args: Any
    ) -> ThreadFuture[T]:
        """Runs a coroutine function in the loop thread; does not wait."""
        with self._lock:  # what gets in before close() stops the loop is run, or ended by it
            return asyncio.run_coroutine_threadsafe(self._run(function, *args), self.start())

    def call_soon(self, function: Callable[..., object], *args: Any) -> None:
        """Calls a plain function in the loop thread; does not wait."""
        with self._lock:
            self.start().call_soon_threadsafe(function, *args)

    def on_session(self, hook: Callable[[Session], Awaitable[None]]) -> None:
        """Has ``hook(session)`` awaited in the loop thread for each new session.

        Register before the first use. A hook that raises, or takes longer than 5 s, is logged
        and the session is used.
        """
        self._hooks.append(hook)

    # -- in the loop thread ----------------------------------------------------------------------

    async def session(self, timeout: float = 5.0) -> Session:
        """The live session, waiting for one at most ``timeout`` seconds.

        Raises:
            ConnectionRefusedByServer: there never was one, and the server refuses us.
            NotConnectedError: there is none in time.
        """
        session = self._session
        if session is not None and not session.lost.is_set():
            return session
        if self._refusal is not None:
            raise self._refusal
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        try:
            return await asyncio.wait_for(waiter, timeout)
        except asyncio.TimeoutError:
            raise self._not_connected() from None
        finally:
            self._waiters.discard(waiter)

    async def _connect(self, rounds: int) -> None:
        while True:
            try:
                await self.session(0.1)
                return
            except ConnectionRefusedByServer:
                raise
            except NotConnectedError:
                if self._rounds >= rounds:
                    raise

    async def _run(self, function: Callable[..., Coroutine[Any, Any, T]], *args: Any) -> T:
        try:
            return await function(*args)
        except asyncio.CancelledError:
            if self._loop is asyncio.get_running_loop():
                raise
            raise NotConnectedError("the NATS connection was closed") from None

    def _not_connected(self) -> NotConnectedError:
        cause = self.last_error
        why = f": {cause}" if cause is not None and str(cause) else f": {cause!r}" if cause else ""
        return NotConnectedError(
            f"no connection to NATS at {', '.join(self.config.safe_urls)}{why}"
        )

    def _run_loop(
        self,
        started: ThreadFuture[asyncio.AbstractEventLoop],
        before: NativeEvent | None,
    ) -> None:
        loop = asyncio.new_event_loop()  # here: under gevent it belongs to the thread's own hub
        started.set_result(loop)
        if before is not None:
            before.wait()  # the thread of the last connection still says goodbye
        asyncio.set_event_loop(loop)
        loop.getaddrinfo = _getaddrinfo  # type: ignore[method-assign]
        supervisor = loop.create_task(self._supervise())
        try:
            loop.run_forever()
        finally:
            with self._lock:
                if self._loop is loop:  # not by close(): SystemExit in a callback
                    self._loop = None
                if self._loop is None:  # again: the supervisor may have told of a loss meanwhile
                    self._state = DISCONNECTED
            with contextlib.suppress(Exception):
                loop.run_until_complete(self._shut_down(supervisor))
            asyncio.set_event_loop(None)
            loop.close()

    async def _shut_down(self, supervisor: asyncio.Task[None]) -> None:
        supervisor.cancel()
        session, self._session = self._session, None
        if session is not None:
            with contextlib.suppress(Exception):
                await asyncio.wait_for(session.client.close(), 2)
            session.end()
        for _ in range(10):  # more than once: nats-py swallows a cancellation here and there
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            if not tasks:
                break
            for task in tasks:
                task.cancel()
            ended, _ = await asyncio.wait(tasks, timeout=0.2)
            for task in ended:  # asyncio is not to complain of an attempt that failed at the end
                if not task.cancelled():
                    task.exception()
        for _ in range(3):  # an aborted transport closes its socket in the next rounds
            await asyncio.sleep(0)

    async def _supervise(self) -> None:
        rotation = Rotation(self.config.nats_urls)
        rounds = 0  # since the last session that lived
        while True:
            lived = await self._round(rotation)
            rounds = 0 if lived >= SHORT_LIFE else rounds + 1
            await asyncio.sleep(self._pause(rounds))

    async def _round(self, rotation: Rotation) -> float:
        """Tries each of the servers, up to the first that has us; returns for how long it had."""
        failures: list[NotConnectedError] = []
        for server in rotation.servers():
            try:
                session = await self._open(server)
            except NotConnectedError as error:
                self._failed(error)
                failures.append(error)
            else:
                lived = await self._serve(session)
                rotation.learn(server, session.address, session.client.info.get("connect_urls"))
                return lived
        self._round_failed(failures)
        return 0.0

    async def _open(self, server: Server) -> Session:
        session = Session(Client(tls_wanted=self.config.tls_wanted))
        options = {**CLIENT_DEFAULTS, "name": self._name(), "tls_hostname": server.tls_name}
        options.update(self.config.nats_options)
        try:
            if "user_credentials" in options:
                options["user_credentials"] = _credentials(options["user_credentials"])
            await session.open(server.url, 2 * options["connect_timeout"] + 1, **options)
        except Exception as error:
            raise _classify(error, session.client.expires) from error
        return session

    async def _serve(self, session: Session) -> float:
        """Hands the session out until it is lost; returns how long it lived."""
        start = time.monotonic()
        self._session, self._state = session, CONNECTED
        if self._ever_connected or self.last_error:
            logger.warning("NATS connection is back")
        self._ever_connected, self.last_error, self._refusal = True, None, None
        self._learn_limit(session.client.max_payload)
        signals.connection_opened.send(sender=self, url=session.safe_url)
        greeting = asyncio.create_task(self._greet(session))
        try:
            await session.watch()
        finally:
            greeting.cancel()
        self._session, self._state = None, RECONNECTING
        cause = session.cause
        self.last_error = _classify(cause, session.client.expires) if cause else None
        logger.warning("NATS connection lost: %s", self.last_error or "no answer")
        signals.connection_lost.send(sender=self, error=self.last_error)
        session.end()
        return time.monotonic() - start

    async def _greet(self, session: Session) -> None:
        """Lets the hooks prepare the session, and then those have it who wait for one."""
        for hook in self._hooks:
            try:
                await asyncio.wait_for(hook(session), HOOK_TIMEOUT)
            except Exception:
                logger.exception("NATS session hook failed")
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(session)

    def _learn_limit(self, limit: int) -> None:
        if limit < self.config.max_payload and limit != self._server_limit:
            logger.warning(
                "the NATS server takes %d bytes per message at most, less than "
                "jetstream_max_payload=%d: larger events are refused. Set its max_payload higher, "
                "or jetstream_max_payload to what it takes",
                limit,
                self.config.max_payload,
            )
        self._server_limit = limit

    def _failed(self, error: NotConnectedError) -> None:
        if self.last_error is None:
            logger.warning("NATS connection failed; trying on: %s", error)
            signals.connection_lost.send(sender=self, error=error)
        self.last_error = error

    def _round_failed(self, errors: list[NotConnectedError]) -> None:
        """Each server was tried: a refusal is passed on to a start that waits for it."""
        self._rounds += 1
        refusals = [error for error in errors if isinstance(error, ConnectionRefusedByServer)]
        if refusals and not self._ever_connected:
            self._refusal = refusals[-1]
            for waiter in self._waiters:
                if not waiter.done():
                    waiter.set_exception(self._refusal)

    def _pause(self, rounds: int) -> float:
        """Seconds until the servers are tried again, with jitter: many lose the same server."""
        least, most = RECONNECT_DELAY
        if rounds == 0:
            return random.uniform(0, least)
        if self._pace is not None:
            return self._pace
        if isinstance(self.last_error, ConnectionRefusedByServer):
            return random.uniform(0.5, 1.0) * REFUSED_DELAY
        delay: float = min(most, least * 2 ** min(rounds, 8))
        return random.uniform(0.5, 1.0) * delay

    def _name(self) -> str:
        return f"{self.config.app_name} {socket.gethostname()} {os.getpid()}"


async def _getaddrinfo(host: Any, port: Any, **options: Any) -> Any:
    """As a loop's own, but in a thread that holds no exit up."""
    resolve = partial(socket.getaddrinfo, host, port, **options)
    return await asyncio.wrap_future(in_native_thread(resolve))


def _credentials(given: Any) -> Any:
    """The text of a creds file as it is now.

    nats-py reads the file twice, and never ends where it has no JWT, as while it is being renewed.
    """
    if not isinstance(given, (str, UserString, os.PathLike)):
        return given
    text = str(given) if isinstance(given, UserString) else Path(given).read_text()
    if not all(f"-----BEGIN {part}" in text for part in ("NATS USER JWT", "USER NKEY SEED")):
        raise NotConnectedError(
            "there is no user JWT and seed in the creds file of jetstream_nats_options; perhaps it "
            "is being written"
        )
    return UserString(text)


def _classify(error: BaseException, expires: float | None = None) -> NotConnectedError:
    """Tells a refusal (trying again is useless) from an outage; the text has no credentials.

    ``expires``: when the JWT does, that was sent.
    """
    if isinstance(error, NotConnectedError):
        return error
    text = str(error).lower()
    if isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError):
        return ConnectionRefusedByServer(f"TLS with the NATS server failed: {error}")
    if "authentication timeout" not in text and (
        "authorization" in text or "authentication" in text
    ):
        return ConnectionRefusedByServer(_refusal(text, expires))
    if isinstance(error, asyncio.TimeoutError):
        return NotConnectedError("the NATS server did not answer in time")
    return NotConnectedError(str(error) or repr(error))


def _refusal(text: str, expires: float | None) -> str:
    """What the server says, and what to do."""
    if "account authentication expired" in text:
        return "the NATS account has expired: whoever operates the NATS servers must renew its JWT"
    if "authentication expired" in text or (expires is not None and expires < time.time()):
        when = "" if expires is None else f" at {datetime.fromtimestamp(expires, timezone.utc)}"
        return (
            f"the NATS credentials expired{when}: renew the creds file of "
            "jetstream_nats_options['user_credentials']; it is read again at each attempt"
        )
    return (
        "the NATS server refused the credentials (authorization violation); check the user, "
        "password, token or creds in jetstream_nats_urls or jetstream_nats_options"
    )


# -- threads and forks ---------------------------------------------------------------------------

_connections: weakref.WeakSet[Connection] = weakref.WeakSet()
_inherited: list[object] = []


def _forget_in_child() -> None:
    """In a forked child: no thread, no session. The parent's sockets are closed here only."""
    for client in list(clients):
        _inherited.append(client)  # for ever: what finalizes it would close another's descriptor
        with contextlib.suppress(OSError):
            os.close(client.fileno())
        clients.discard(client)
    for connection in list(_connections):
        _inherited.append((connection._loop, connection._session, connection._waiters))
        connection._reset()


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
