"""Threads of the operating system, also where gevent has replaced threads by greenlets."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

__all__ = (
    "NativeEvent",
    "Wake",
    "blocking",
    "in_native_thread",
    "native_lock",
    "start_native_thread",
    "wait",
)

T = TypeVar("T")


def _gevent_hub() -> Any:
    """gevent's hub where gevent has patched threading, else None."""
    monkey = sys.modules.get("gevent.monkey")
    if monkey is None or not monkey.is_module_patched("threading"):
        return None
    import gevent

    return gevent.get_hub()


def native_lock() -> Any:
    """A lock between operating-system threads; gevent's is one between greenlets.

    Nothing may switch greenlets while it is held.
    """
    monkey = sys.modules.get("gevent.monkey")
    if monkey is None:
        return threading.Lock()
    return monkey.get_original("_thread", "allocate_lock")()


def start_native_thread(target: Callable[..., None], *args: Any) -> None:
    """Starts an operating-system thread, also where gevent has replaced threads by greenlets.

    In a greenlet the running loop would be seen by the whole thread, and every ``asyncio.run``
    of a handler would fail.
    """
    hub = _gevent_hub()
    if hub is not None:
        hub.threadpool.spawn(target, *args)
    else:
        threading.Thread(target=target, args=args, name="jetstream-nats", daemon=True).start()


def in_native_thread(function: Callable[[], T]) -> Future[T]:
    """Calls what may take minutes, such as a name server that is away.

    Unlike a thread of an executor, this one is not waited for when the interpreter exits.
    """
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()  # who stops waiting does not stop it

    def call() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    start_native_thread(call)
    return future


def wait(future: Future[T], timeout: float | None) -> T:
    """The future's result, waited for at most ``timeout`` seconds."""
    return blocking(future.result, timeout)


def blocking(function: Callable[..., T], *args: Any) -> T:
    """Calls what blocks a native thread; under gevent the other greenlets go on."""
    hub = _gevent_hub()
    if hub is None:
        return function(*args)
    result: T = hub.threadpool.apply(function, args)
    return result


class NativeEvent:
    """As ``threading.Event``, but between operating-system threads, also under gevent."""

    def __init__(self) -> None:
        self._unset = native_lock()
        self._unset.acquire()

    def set(self) -> None:
        """Once only."""
        self._unset.release()

    def wait(self, timeout: float | None = None) -> bool:
        """Blocks the native thread; whether it was set."""
        is_set: bool = self._unset.acquire(timeout=-1 if timeout is None else timeout)
        if is_set:
            self._unset.release()
        return is_set


class Wake:
    """A pipe that an event loop can wait for. ``set`` from any thread."""

    def __init__(self) -> None:
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        os.set_blocking(self._writer, False)
        self._lock = native_lock()
        self._is_set = False
        self._closed = False

    def fileno(self) -> int:
        """What to wait for, to be read from."""
        return self._reader

    def set(self) -> None:
        """Has the loop look; once for many."""
        if self._is_set:
            return
        with self._lock:
            if not self._closed:
                self._is_set = True
                with contextlib.suppress(BlockingIOError):
                    os.write(self._writer, b"\0")

    def clear(self) -> None:
        """Reads first: who sets it after that writes again, or is seen by what follows."""
        with contextlib.suppress(BlockingIOError):
            os.read(self._reader, 64)
        self._is_set = False

    def close(self) -> None:
        """Nobody looks any more."""
        with self._lock:
            self._closed = True
            os.close(self._reader)
            os.close(self._writer)
