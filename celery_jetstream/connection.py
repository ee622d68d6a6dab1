"""The wire: one NATS connection per process and Celery app, in a daemon loop thread.

Hands on a :class:`Session`: one live client, with one reply inbox shared by everything that
waits for an answer. Never reconnects inside nats-py: its reconnect can hang, give up for ever,
or keep a client whose read loop is dead. Here there is one path instead. When a client is lost,
for whatever reason, it is thrown away and the supervisor opens a new one, for ever, with jitter.

Threads: every public method of :class:`Connection` may be called from any thread but the loop
thread itself. Forks: a child starts with no connection and opens its own when it needs one;
the parent is not disturbed.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import random
import socket
import ssl
import sys
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from concurrent.futures import Future as ThreadFuture
from concurrent.futures import TimeoutError as ThreadTimeoutError
from typing import Any, TypeVar

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error as NatsError

from .config import Config
from .exceptions import ConnectionRefusedByServer, EventError, NotConnectedError
from .headers import wire_size

__all__ = ("Connection", "NoResponders", "Session")

logger = logging.getLogger(__name__)

T = TypeVar("T")

DISCONNECTED, CONNECTING, CONNECTED, RECONNECTING = (
    "disconnected",
    "connecting",
    "connected",
    "reconnecting",
)

#: What nats-py is told unless ``jetstream_nats_options`` says otherwise. A peer that hangs is
#: noticed after ``ping_interval * (max_outstanding_pings + 1)`` seconds: soon enough for a publish
#: of 15 s to reach another server.
CLIENT_DEFAULTS: Mapping[str, Any] = {
    "connect_timeout": 2,
    "ping_interval": 2,
    "max_outstanding_pings": 2,
    "flush_timeout": 2,
}
#: Unacknowledged bytes for this long (milliseconds) make the kernel give the socket up (Linux).
TCP_USER_TIMEOUT_MS = 5_000
WATCH_INTERVAL = 0.5
RECONNECT_DELAY = (0.1, 2.0)
REFUSED_DELAY = 5.0
#: A session that lasts less counts as a failed attempt: a server that accepts us and throws us
#: out again is not asked without a pause.
SHORT_LIFE = 5.0
#: Seconds that one ``on_session`` hook may take.
HOOK_TIMEOUT = 5.0


class NoResponders(NotConnectedError):
    """Nobody listens on the subject: no stream, no consumer, or an election (NATS 503)."""


class Session:
    """One live client. Ends once and for all when :attr:`lost` is set; use in the loop thread."""

    def __init__(self, client: _Client) -> None:
        self.client = client
        self.lost: asyncio.Event = asyncio.Event()
        self.error: BaseException | None = None
        self._check = asyncio.Event()
        self._waiting: dict[str, asyncio.Future[Msg]] = {}
        self._tokens = itertools.count()
        self._prefix = ""

    async def open(self, url: str, timeout: float, **options: Any) -> None:
        """Connects, or raises what went wrong and leaves nothing behind."""
        try:
            await asyncio.wait_for(
                self.client.connect(
                    servers=[url],
                    allow_reconnect=False,
                    max_reconnect_attempts=1,
                    reconnect_time_wait=0,
                    error_cb=self._on_error,
                    disconnected_cb=self._on_lost,
                    closed_cb=self._on_lost,
                    lame_duck_mode_cb=self._on_lame_duck,
                    **options,
                ),
                timeout,
            )
            if not self.client.is_connected:  # nats-py takes an EOF for a PONG
                raise NotConnectedError("the NATS server closed the connection at once")
            self.client.tune_socket()
            self._prefix = self.client.new_inbox() + "."
            await self.client.subscribe(self._prefix + "*", cb=self._on_reply)
        except BaseException as error:
            self.client.abort()
            if self.error is None or not isinstance(error, Exception):
                raise
            # nats-py reports the cause to its callback and raises "no servers available"
            raise self.error from error

    async def watch(self) -> None:
        """Returns when the client is of no more use: closed, stale, or its read loop dead."""
        while not self.lost.is_set() and self.client.alive:
            self._check.clear()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._check.wait(), WATCH_INTERVAL)

    def end(self) -> None:
        """Drops the client at once and fails whatever waits for an answer."""
        self.lost.set()
        self._check.set()
        self.client.abort()
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(NotConnectedError("the NATS connection was lost"))
                future.exception()  # whoever stopped waiting is not to be warned about

    async def send(
        self, subject: str, payload: bytes = b"", headers: dict[str, str] | None = None
    ) -> asyncio.Future[Msg]:
        """Publishes with a reply subject; the future is the answer.

        The future fails with :class:`NoResponders` (503) or
        :class:`~celery_jetstream.exceptions.NotConnectedError`; a caller that stops waiting
        cancels it.

        Raises:
            EventError: larger than the server takes; sent, it would cost the connection.
            NotConnectedError: it cannot be sent now.
        """
        if self.lost.is_set():
            raise NotConnectedError("the NATS connection was lost")
        size, limit = wire_size(payload, headers), self.client.max_payload
        if size > limit:
            raise EventError(f"{size} bytes with headers, and the server takes {limit} at most")
        token = str(next(self._tokens))
        future: asyncio.Future[Msg] = asyncio.get_running_loop().create_future()
        self._waiting[token] = future
        future.add_done_callback(lambda _: self._waiting.pop(token, None))
        try:
            await self.client.publish(subject, payload, self._prefix + token, headers)
        except (NatsError, OSError) as error:
            future.cancel()
            raise NotConnectedError(f"could not send to NATS: {error!r}") from error
        except BaseException:
            future.cancel()
            raise
        return future

    async def ask(
        self,
        subject: str,
        payload: bytes = b"",
        headers: dict[str, str] | None = None,
        *,
        timeout: float = 5.0,
    ) -> Msg:
        """Sends and waits for the answer, at most ``timeout`` seconds.

        Raises:
            NotConnectedError: no answer in time, no responders, or the connection was lost.
        """
        future = await self.send(subject, payload, headers)
        try:
            return await asyncio.wait_for(future, timeout)
        except asyncio.TimeoutError:
            raise NotConnectedError(f"no answer from {subject} in {timeout:g} s") from None

    async def publish(
        self, subject: str, payload: bytes = b"", headers: dict[str, str] | None = None
    ) -> None:
        """Publishes without an answer; raises ``NotConnectedError`` where that cannot be."""
        try:
            await self.client.publish(subject, payload, headers=headers)
        except (NatsError, OSError) as error:
            raise NotConnectedError(f"could not send to NATS: {error!r}") from error

    # -- what nats-py calls: never raises (that would kill its read loop), never blocks ----------

    async def _on_reply(self, message: Msg) -> None:
        future = self._waiting.get(message.subject[len(self._prefix) :])
        if future is None or future.done():
            return
        if message.headers and message.headers.get("Status") == "503":
            future.set_exception(NoResponders(f"no responders: {message.subject}"))
        else:
            future.set_result(message)

    async def _on_error(self, error: BaseException) -> None:
        self.error = error
        self._check.set()
        if "permissions violation" in str(error).lower():
            logger.error("NATS denied an operation: %s", error)

    async def _on_lost(self) -> None:
        self.lost.set()
        self._check.set()

    async def _on_lame_duck(self) -> None:
        logger.warning("NATS server is shutting down (lame duck); moving to another")
        await self._on_lost()


class _Client(Client):
    """nats-py's client with the three things that its public API does not give.

    What is not public of nats-py is used here only (tried on 2.10 to 2.16):
    ``_connect_command``, the tasks, ``_status`` and ``_transport._io_writer``.
    """

    def __init__(self, *, tls_wanted: bool) -> None:
        super().__init__()
        self._tls_wanted = tls_wanted
        _clients.add(self)

    def _connect_command(self) -> bytes:
        """Refuses to send credentials in clear text where TLS was asked for."""
        if self._tls_wanted and not self.encrypted:
            raise ConnectionRefusedByServer(
                "TLS was asked for (a tls:// URL or jetstream_nats_options['tls']), but the "
                "server does not offer it: nothing was sent. Turn TLS on at the server, or use "
                "a nats:// URL without TLS options."
            )
        command: bytes = super()._connect_command()
        return command

    @property
    def alive(self) -> bool:
        """Connected, and something still reads what the server sends."""
        reader = self._reading_task
        return bool(self.is_connected and reader is not None and not reader.done())

    @property
    def encrypted(self) -> bool:
        """What is sent now is sent through TLS."""
        server = self._current_server
        over_wss = server is not None and server.uri.scheme == "wss"
        return over_wss or self._socket_info("ssl_object") is not None

    def tune_socket(self) -> None:
        """Lets the kernel notice a hung peer, also while data is unsent."""
        sock = self._socket_info("socket")
        if sock is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            if hasattr(socket, "TCP_USER_TIMEOUT"):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, TCP_USER_TIMEOUT_MS)

    def abort(self) -> None:
        """Closes the socket now, sent or unsent, without waiting for the peer."""
        self._status = Client.CLOSED
        tasks = [self._reading_task, self._ping_interval_task, self._flusher_task]
        tasks += [subscription._wait_for_msgs_task for subscription in self._subs.values()]
        for task in tasks:
            if task is not None:
                task.cancel()
        writer = getattr(self._transport, "_io_writer", None)
        if writer is not None:
            writer.transport.abort()

    def fileno(self) -> int:
        """The socket's descriptor; -1 where there is none."""
        sock = self._socket_info("socket")
        return -1 if sock is None else int(sock.fileno())

    def _socket_info(self, name: str) -> Any:
        writer = getattr(self._transport, "_io_writer", None)
        return None if writer is None else writer.get_extra_info(name)


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
        self._stopped: threading.Event | None = None
        self._session: Session | None = None
        self._waiters: set[asyncio.Future[Session]] = set()
        self._state = DISCONNECTED
        self._server_limit = 2**63
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
                stopped = threading.Event()
                self._forget_attempts()
                self._state = CONNECTING
                _start_native_thread(self._run_loop, started, self._stopped, stopped)
                self._loop, self._stopped = _wait(started, None), stopped
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
        if _running_loop() is not loop and not stopped.wait(timeout):
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
            return _wait(future, timeout)
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
        before: threading.Event | None,
        stopped: threading.Event,
    ) -> None:
        loop = asyncio.new_event_loop()  # here: under gevent it belongs to the thread's own hub
        started.set_result(loop)
        if before is not None:
            before.wait()  # the thread of the last connection still says goodbye
        asyncio.set_event_loop(loop)
        supervisor = loop.create_task(self._supervise())
        try:
            loop.run_forever()
        finally:
            with self._lock:
                if self._loop is loop:  # not by close(): SystemExit in a callback
                    self._loop, self._state = None, DISCONNECTED
            with contextlib.suppress(Exception):
                loop.run_until_complete(self._shut_down(supervisor))
            asyncio.set_event_loop(None)
            loop.close()
            stopped.set()

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
            await asyncio.wait(tasks, timeout=0.2)

    async def _supervise(self) -> None:
        urls = list(self.config.nats_urls)
        random.shuffle(urls)
        rounds = 0  # since the last session that lived
        failures: list[NotConnectedError] = []
        for url in itertools.cycle(urls):
            try:
                session = await self._open(url)
            except NotConnectedError as error:
                self._failed(error)
                failures.append(error)
            else:
                lived = await self._serve(session)
                failures.clear()
                rounds = 0 if lived >= SHORT_LIFE else rounds + 1
                if lived < SHORT_LIFE:
                    await asyncio.sleep(self._pause(rounds))
            if len(failures) == len(urls):
                self._round_failed(failures)
                failures.clear()
                rounds += 1
                await asyncio.sleep(self._pause(rounds))

    async def _open(self, url: str) -> Session:
        options = {**CLIENT_DEFAULTS, "name": self._name(), **self.config.nats_options}
        session = Session(_Client(tls_wanted=self.config.tls_wanted))
        try:
            await session.open(url, 2 * options["connect_timeout"] + 1, **options)
        except Exception as error:
            raise _classify(error) from error
        return session

    async def _serve(self, session: Session) -> float:
        """Hands the session out until it is lost; returns how long it lived."""
        start = time.monotonic()
        self._session, self._state = session, CONNECTED
        if self._ever_connected or self.last_error:
            logger.warning("NATS connection is back")
        self._ever_connected, self.last_error, self._refusal = True, None, None
        self._learn_limit(session.client.max_payload)
        greeting = asyncio.create_task(self._greet(session))
        try:
            await session.watch()
        finally:
            greeting.cancel()
        self._session, self._state = None, RECONNECTING
        self.last_error = session.error or session.client.last_error
        logger.warning("NATS connection lost: %s", self.last_error or "no answer")
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
        """Seconds until the servers are tried again, with jitter."""
        if self._pace is not None:
            return self._pace
        if isinstance(self.last_error, ConnectionRefusedByServer):
            return random.uniform(0.5, 1.0) * REFUSED_DELAY
        least, most = RECONNECT_DELAY
        delay: float = min(most, least * 2 ** min(rounds, 8))
        return random.uniform(0.5, 1.0) * delay

    def _name(self) -> str:
        return f"{self.config.app_name} {socket.gethostname()} {os.getpid()}"


def _classify(error: BaseException) -> NotConnectedError:
    """Tells a refusal (trying again is useless) from an outage; the text has no credentials."""
    if isinstance(error, NotConnectedError):
        return error
    text = str(error).lower()
    if isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError):
        return ConnectionRefusedByServer(f"TLS with the NATS server failed: {error}")
    if "authentication timeout" not in text and (
        "authorization" in text or "authentication" in text
    ):
        return ConnectionRefusedByServer(
            "the NATS server refused the credentials (authorization violation); check the user, "
            "password, token or creds in jetstream_nats_urls or jetstream_nats_options"
        )
    if isinstance(error, asyncio.TimeoutError):
        return NotConnectedError("the NATS server did not answer in time")
    return NotConnectedError(str(error) or repr(error))


# -- threads and forks ---------------------------------------------------------------------------

_connections: weakref.WeakSet[Connection] = weakref.WeakSet()
_clients: weakref.WeakSet[_Client] = weakref.WeakSet()
_inherited: list[object] = []


def _forget_in_child() -> None:
    """In a forked child: no thread, no session. The parent's sockets are closed here only."""
    for client in list(_clients):
        _inherited.append(client)  # for ever: what finalizes it would close another's descriptor
        with contextlib.suppress(OSError):
            os.close(client.fileno())
        _clients.discard(client)
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


def _gevent_hub() -> Any:
    """gevent's hub where gevent has patched threading, else None."""
    monkey = sys.modules.get("gevent.monkey")
    if monkey is None or not monkey.is_module_patched("threading"):
        return None
    import gevent

    return gevent.get_hub()


def _start_native_thread(target: Callable[..., None], *args: Any) -> None:
    """Starts an operating-system thread, also where gevent has replaced threads by greenlets.

    In a greenlet the running loop would be seen by the whole thread, and every ``asyncio.run``
    of a handler would fail.
    """
    hub = _gevent_hub()
    if hub is not None:
        hub.threadpool.spawn(target, *args)
    else:
        threading.Thread(target=target, args=args, name="jetstream-nats", daemon=True).start()


def _wait(future: ThreadFuture[T], timeout: float | None) -> T:
    hub = _gevent_hub()
    if hub is None:
        return future.result(timeout)
    # gevent: wait in a native thread, so that the other greenlets go on
    result: T = hub.threadpool.apply(future.result, (timeout,))
    return result
