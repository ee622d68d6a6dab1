"""Threads of the operating system, also where gevent has replaced threads by greenlets."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

__all__ = ("start_native_thread", "wait")

T = TypeVar("T")


def _gevent_hub() -> Any:
    """gevent's hub where gevent has patched threading, else None."""
    monkey = sys.modules.get("gevent.monkey")
    if monkey is None or not monkey.is_module_patched("threading"):
        return None
    import gevent

    return gevent.get_hub()


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


def wait(future: Future[T], timeout: float | None) -> T:
    """The future's result, waited for at most ``timeout`` seconds."""
    hub = _gevent_hub()
    if hub is None:
        return future.result(timeout)
    # gevent: wait in a native thread, so that the other greenlets go on
    result: T = hub.threadpool.apply(future.result, (timeout,))
    return result
