"""Keeps the inbox rows of runs that go on: one thread and one statement for all of a process."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterator

from .exceptions import CeleryJetStreamError

__all__ = ("Leases",)

logger = logging.getLogger(__name__)


class Leases:
    """Renews the leases of the runs in this process every third of their time.

    Thread-safe; a forked child has none. The thread is there only while something runs.

    Args:
        renew: given the owners of the runs; renews their leases.
        lease: seconds that one renewal lasts.
    """

    def __init__(self, renew: Callable[[set[str]], object], lease: float) -> None:
        self._renew = renew
        self._interval = lease / 3
        self._reset()
        _all_leases.add(self)

    def _reset(self) -> None:
        self._changed = threading.Condition()
        self._running: set[str] = set()
        self._thread: threading.Thread | None = None
        self._closed = False

    @contextlib.contextmanager
    def held(self, owner: str) -> Iterator[None]:
        """Keeps one run's lease for as long as the block runs."""
        with self._changed:
            self._running.add(owner)
            self._closed = False
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="celery-jetstream-inbox", daemon=True
                )
                self._thread.start()
        try:
            yield
        finally:
            with self._changed:
                self._running.discard(owner)

    def close(self, timeout: float) -> None:
        """Ends the thread; waits ``timeout`` seconds for it at the most."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join(timeout)

    def _run(self) -> None:
        told = False
        while True:
            with self._changed:
                self._changed.wait(self._interval)
                owners = set(self._running)
                if self._closed or not owners:
                    self._thread = None
                    return
            try:
                self._renew(owners)
                told = False
            except CeleryJetStreamError as error:
                level = logging.DEBUG if told else logging.WARNING  # once for an outage
                logger.log(level, "leases of the inbox could not be renewed: %s", error)
                told = True
            except Exception:
                logger.exception("leases of the inbox could not be renewed")


_all_leases: weakref.WeakSet[Leases] = weakref.WeakSet()


def _forget_in_child() -> None:
    for leases in list(_all_leases):
        leases._reset()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
