"""What a process tells by HTTP: ``/livez``, ``/readyz``, ``/status``, ``/metrics``.

A thread of its own with an event loop, so that a slow client holds a socket for some seconds, and
no thread. ``/livez`` and ``/readyz`` ask nobody outside of the process but, for a bridge, the
Celery broker; the others may have to wait, each in a few threads at the most.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from http import HTTPStatus
from typing import Any, NamedTuple

from celery.signals import worker_ready

from . import metrics
from .exceptions import ConfigurationError
from .threads import in_native_thread, start_native_thread, wait

__all__ = ("serving",)

logger = logging.getLogger(__name__)

#: Seconds for a request to come, and for its answer to be read.
CLIENT_TIMEOUT = 5.0
#: Seconds for an answer to be made.
ANSWER_TIMEOUT = 10.0
#: Seconds that ``/readyz`` waits for the Celery broker; a probe of Kubernetes' waits for 1 s.
BROKER_PATIENCE = 0.7
#: Bytes of a request.
LARGEST_REQUEST = 16 * 1024
#: Clients at a time; others are turned away.
MOST_CLIENTS = 64
#: Answers that are made at a time, of each page: one that waits for a server delays no other.
THREADS = 4

TEXT, JSON = "text/plain; charset=utf-8", "application/json"


class _Answer(NamedTuple):
    status: HTTPStatus
    body: bytes
    content_type: str = TEXT
    headers: tuple[str, ...] = ()


@contextlib.contextmanager
def serving(
    jetstream: Any, address: tuple[str, int] | None, name: str = "jetstream_http_address"
) -> Iterator[int | None]:
    """Serves while the block runs.

    Args:
        jetstream: the app's :class:`~celery_jetstream.extension.JetStream`.
        address: host and port (0: any that is free); None to serve nothing.
        name: what the address was set by, for the message.

    Yields:
        The port.

    Raises:
        ConfigurationError: the address cannot be had.
    """
    if address is None:
        yield None
        return
    server = _Server(jetstream, _listen(address, name))
    server.start()
    server.announce()
    worker_ready.connect(server.announce)  # a worker's log is set up later
    try:
        yield server.port
    finally:
        server.stop()


def _listen(address: tuple[str, int], name: str) -> socket.socket:
    host, port = address
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server(address, family=family, backlog=MOST_CLIENTS)
    except OSError as error:
        shown = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        raise ConfigurationError(
            f"{name}={shown} cannot be served: {error.strerror or error}; give an address of this "
            "host and a port that no other process (another bridge?) has, or port 0 for any",
            setting="jetstream_http_address",
        ) from error


class _Server:
    """One thread that serves a socket."""

    def __init__(self, jetstream: Any, listener: socket.socket) -> None:
        self._jetstream = jetstream
        self._listener = listener
        self.port: int = listener.getsockname()[1]
        self._clients = 0
        self._pages = {
            "/readyz": (self._readyz, asyncio.Semaphore(THREADS)),
            "/status": (self._status, asyncio.Semaphore(THREADS)),
            "/metrics": (self._metrics, asyncio.Semaphore(1)),
        }

    def start(self) -> None:
        started: Future[asyncio.AbstractEventLoop] = Future()
        self._ended = start_native_thread(self._run, started)
        self._loop = wait(started, None)
        os.register_at_fork(after_in_child=self._listener.close)  # or a child keeps the port

    def announce(self, **_: Any) -> None:
        host = self._listener.getsockname()[0]
        shown = f"[{host}]" if ":" in host else host
        logger.info("http://%s:%d serves /livez, /readyz, /status and /metrics", shown, self.port)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._ended.wait_among_greenlets(1)

    def _run(self, started: Future[asyncio.AbstractEventLoop]) -> None:
        loop = asyncio.new_event_loop()  # here: under gevent it belongs to the thread's own hub
        started.set_result(loop)
        try:
            starting = asyncio.start_server(self._serve, sock=self._listener, limit=LARGEST_REQUEST)
            self._server = loop.run_until_complete(starting)
            loop.run_forever()
        finally:
            self._listener.close()
            tasks = asyncio.all_tasks(loop)
            for task in tasks:
                task.cancel()
            if tasks:
                loop.run_until_complete(asyncio.wait(tasks, timeout=1))
            loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._clients += 1
        try:
            if self._clients <= MOST_CLIENTS:
                request = reader.readuntil(b"\r\n\r\n")
                head = await asyncio.wait_for(request, CLIENT_TIMEOUT)
                writer.write(await self._answer(head))
                await asyncio.wait_for(writer.drain(), CLIENT_TIMEOUT)
        except (asyncio.IncompleteReadError, asyncio.TimeoutError, OSError):
            writer.transport.abort()  # it was slow, or is gone
        except asyncio.LimitOverrunError:
            writer.write(_bytes(_Answer(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, b""), True))
        except Exception:
            logger.exception("an HTTP request could not be served")
        finally:
            self._clients -= 1
            writer.close()

    async def _answer(self, head: bytes) -> bytes:
        method, _, rest = head.partition(b"\r\n")[0].decode("latin-1").partition(" ")
        target, _, version = rest.partition(" ")
        if not version.startswith("HTTP/1."):
            return _bytes(_Answer(HTTPStatus.BAD_REQUEST, b"this is no HTTP/1 request\n"), True)
        if method not in ("GET", "HEAD"):
            wrong = _Answer(
                HTTPStatus.METHOD_NOT_ALLOWED, b"GET or HEAD\n", TEXT, ("Allow: GET, HEAD",)
            )
            return _bytes(wrong, True)
        return _bytes(await self._page(target.partition("?")[0]), method == "GET")

    async def _page(self, path: str) -> _Answer:
        if path == "/livez":
            return self._livez()
        if path not in self._pages:
            known = f"{path} is not here; there are /livez, {', '.join(self._pages)}\n"
            return _Answer(HTTPStatus.NOT_FOUND, known.encode())
        try:
            return await asyncio.wait_for(self._aside(*self._pages[path]), ANSWER_TIMEOUT)
        except asyncio.TimeoutError:
            text = f"no answer in {ANSWER_TIMEOUT:g} s\n"
            return _Answer(HTTPStatus.SERVICE_UNAVAILABLE, text.encode())
        except Exception as error:
            logger.exception("%s failed", path)
            text = f"{type(error).__name__}: this is a defect of ours\n"
            return _Answer(HTTPStatus.INTERNAL_SERVER_ERROR, text.encode())

    async def _aside(self, page: Callable[[], _Answer], turns: asyncio.Semaphore) -> _Answer:
        """In a thread of its own; so many at a time, also of those that nobody waits for now."""
        await turns.acquire()
        try:
            future = in_native_thread(page)
        except BaseException:  # there can be no more threads
            turns.release()
            raise
        future.add_done_callback(lambda _: self._release(turns))
        return await asyncio.wrap_future(future)

    def _release(self, turns: asyncio.Semaphore) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(turns.release)

    # -- pages -------------------------------------------------------------------------------------

    def _livez(self) -> _Answer:
        return _verdict(self._jetstream.health.now(), "alive")

    def _readyz(self) -> _Answer:
        bridge = self._jetstream.running.get("bridge")
        if bridge is not None:
            bridge.prove(BROKER_PATIENCE)
        return _verdict(self._jetstream.health.now(), "ready")

    def _status(self) -> _Answer:
        report = self._jetstream.health.check()
        well = HTTPStatus.OK if report["healthy"] else HTTPStatus.SERVICE_UNAVAILABLE
        return _Answer(well, json.dumps(report).encode() + b"\n", JSON)

    def _metrics(self) -> _Answer:
        try:
            content_type, body = metrics.exposition(self._jetstream)
        except ConfigurationError as error:
            return _Answer(HTTPStatus.NOT_IMPLEMENTED, f"{error}\n".encode())
        return _Answer(HTTPStatus.OK, body, content_type)


def _verdict(report: dict[str, Any], what: str) -> _Answer:
    """``ok``, or the reasons why not, one a line."""
    if report[what]:
        return _Answer(HTTPStatus.OK, b"ok\n")
    reasons = [state for state in report["states"] if not state[what]]
    text = "".join(f"{state['code']}: {state['text']}\n" for state in reasons)
    return _Answer(HTTPStatus.SERVICE_UNAVAILABLE, text.encode())


def _bytes(answer: _Answer, with_body: bool) -> bytes:
    lines = (
        f"HTTP/1.1 {answer.status.value} {answer.status.phrase}",
        f"Content-Type: {answer.content_type}",
        f"Content-Length: {len(answer.body)}",
        "Cache-Control: no-store",
        "Connection: close",
        *answer.headers,
    )
    head = "\r\n".join((*lines, "", "")).encode("latin-1")
    return head + answer.body if with_body else head
