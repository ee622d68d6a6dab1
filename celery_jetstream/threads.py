"""Threads of the operating system, also where gevent has replaced threads by greenlets."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

__all__ = (
    "NativeEvent",
    "Wake",
    "in_native_thread",
    "native_lock",
    "start_native_thread",
    "wait",
)

T = TypeVar("T")


#: Seconds; for what is waited for without an end.
A_WHILE = 60.0
#: Seconds between two looks of a greenlet at what an operating-system thread does.
LOOK_INTERVAL = 0.005


def _gevent_monkey() -> Any:
    """``gevent.monkey`` where gevent has patched threading, else None."""
    monkey = sys.modules.get("gevent.monkey")
    return monkey if monkey is not None and monkey.is_module_patched("threading") else None


def native_lock() -> Any:
    """A lock between operating-system threads; gevent's is one between greenlets.

    Nothing may switch greenlets while it is held.
    """
    monkey = sys.modules.get("gevent.monkey")
    if monkey is None:
        return threading.Lock()
    return monkey.get_original("_thread", "allocate_lock")()


def start_native_thread(target: Callable[..., None], *args: Any) -> NativeEvent:
    """Starts an operating-system thread, also where gevent has replaced threads by greenlets.

    In a greenlet the running loop would be seen by the whole thread, and every ``asyncio.run``
    of a handler would fail. It is no thread of gevent's pool either: those stand on greenlets from
    their first frame on, and one that wakes while the interpreter is taken down corrupts the heap
    (Python before 3.14 unwinds it, and greenlet's destructors then run without the GIL).

    Returns:
        Set when it has ended, and has left nothing of gevent's behind.
    """
    ended = NativeEvent()
    monkey = _gevent_monkey()
    if monkey is None:
        run = partial(_run, target, args, ended)
        threading.Thread(target=run, name="jetstream-nats", daemon=True).start()
    else:
        monkey.get_original("_thread", "start_new_thread")(_run_without_hub, (target, args, ended))
    return ended


def _run(target: Callable[..., None], args: tuple[Any, ...], ended: NativeEvent) -> None:
    try:
        target(*args)
    finally:
        ended.set()


def _run_without_hub(
    target: Callable[..., None], args: tuple[Any, ...], ended: NativeEvent
) -> None:
    """Under gevent an asyncio loop, and a lock that another thread held, make a hub."""
    import gevent

    try:
        target(*args)
    finally:
        gevent.get_hub().destroy(destroy_loop=True)
        ended.set()


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
    """The future's result, waited for at most ``timeout`` seconds; under gevent others go on.

    Raises:
        concurrent.futures.TimeoutError: there is none in time.
    """
    if _gevent_monkey() is None:
        return future.result(timeout)
    import gevent.event

    loop, done = gevent.get_hub().loop, gevent.event.Event()
    future.add_done_callback(lambda _: loop.run_callback_threadsafe(done.set))
    while not done.wait(A_WHILE if timeout is None else timeout):  # a timer keeps the loop alive
        if timeout is not None:
            break
    return future.result(0)


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

    def wait_among_greenlets(self, timeout: float) -> bool:
        """As :meth:`wait`; under gevent the other greenlets go on."""
        if _gevent_monkey() is None:
            return self.wait(timeout)
        ends = time.monotonic() + timeout
        while not self.wait(0) and time.monotonic() < ends:
            time.sleep(LOOK_INTERVAL)
        return self.wait(0)


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
