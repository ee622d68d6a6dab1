"""The health of one process and of what it stands on: looked at seldom, told at once.

:meth:`Health.now` tells what this process knows of itself, without asking anybody; it is never
cached. :meth:`Health.check` adds what JetStream and the databases answer, which is kept for
``jetstream_health_cache_ttl``. One look at a time goes to each; whoever comes meanwhile waits for
the same one, and none that hangs keeps anybody for longer than its time.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import os
import platform
import socket
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from typing import Any, Protocol

import celery

from . import status
from .consumers import consumer_specs
from .diagnosis import diagnose
from .exceptions import CeleryJetStreamError, ConnectionRefusedByServer, NotConnectedError
from .schedule import uses_inbox
from .session import Session
from .states import DEGRADED, UNHEALTHY, State, overall
from .threads import in_native_thread, wait

__all__ = ("Health", "Part")

#: Seconds that a look may take.
PATIENCE = 5.0
#: Seconds after which it is looked again where something was wrong: it may be mended by now.
HASTE = 2.0
#: Seconds for which what our user may not ask is not asked again: it may be allowed by now.
DENIED_KEPT = 60.0
#: Seconds that such a look is waited for, since what it was is known.
BRIEF = 0.3


class Part(Protocol):
    """What runs in a process and tells how it is: a bridge, a direct worker's intake, a relay."""

    def tell(self) -> dict[str, Any]:
        """How it is, as plain values. Any thread; does not wait."""


class Health:
    """The health of one process. Thread-safe; a forked child makes its own.

    Args:
        jetstream: the app's :class:`~celery_jetstream.extension.JetStream`.
    """

    def __init__(self, jetstream: Any) -> None:
        self._jetstream = jetstream
        self._nats = _Look(self._begin_nats)
        self._databases = _Look(self._begin_databases)
        self._denied: tuple[Session | None, float, set[str]] = (None, 0.0, set())

    def now(self) -> dict[str, Any]:
        """What this process knows of itself: connection, parts that run, breaker, states.

        Asks nobody and does not wait. The keys are those of :meth:`check`; what would have to be
        asked for is not there.
        """
        report = self._of_this_process()
        states = diagnose({**self._unknown(), **report})
        return _judged(report, states)

    def check(self, *, fresh: bool = False, timeout: float = PATIENCE) -> dict[str, Any]:
        """The whole report (docs/reference/health.md).

        Args:
            fresh: ask now, whatever is known from before.
            timeout: seconds to wait for answers, all together.
        """
        began = time.monotonic()
        ends = began + timeout
        connection = self._jetstream.connection
        since = began if fresh else began - self._jetstream.config.health_cache_ttl
        self._databases.begin(since)
        begins = connection.state in ("disconnected", "connecting")
        is_there = connection.live_session is not None
        if fresh or is_there or (begins and connection.last_error is None):
            self._nats.wait(since, ends)  # else it is known to be away
        self._databases.wait(since, ends)
        report = {**self._unknown(), **self._found(since), **self._of_this_process()}
        report["connection"]["rtt_ms"] = report.pop("rtt_ms")
        return _judged(report, diagnose(report))

    # -- what was found ----------------------------------------------------------------------------

    def _unknown(self) -> dict[str, Any]:
        """A report in which nothing was asked for."""
        config = self._jetstream.config
        names = [consumer.durable for consumer in consumer_specs(config)]
        return {
            **status.nothing_known(config, names),
            "outbox": None,
            "inbox": None,
            "config": config.summary(),
        }

    def _found(self, since: float) -> dict[str, Any]:
        """What the looks have found, as far as it is still true.

        A look that was to be over by now is one that gets no answer.
        """
        found: dict[str, Any] = {}
        session, seen = self._jetstream.connection.live_session, self._nats.seen
        if session is not None and seen is not None and seen.session is session:
            found |= copy.deepcopy(seen.found)  # a caller may change what it gets
        if session is not None and (late := self._nats.late(since)) is not None:
            found["unanswered"] = f"not all was answered in {late:.1f} s"
        if seen := self._databases.seen:
            found |= copy.deepcopy(seen.found)
        if (late := self._databases.late(since)) is not None:
            for name in self._databases_of():
                text = f"the {name}'s database has not answered for {late:.1f} s"
                found[name] = {"error": text, "needed": True}
        ages = {"nats": self._nats.age, "databases": self._databases.age}
        return {**found, "looked_ago": ages}

    def _of_this_process(self) -> dict[str, Any]:
        jetstream = self._jetstream
        connection, config = jetstream.connection, jetstream.config
        error, session = connection.last_error, connection.live_session
        parts = {name: part.tell() for name, part in list(jetstream.running.items())}
        breaker = jetstream.breaker
        return {
            "process": {"pid": os.getpid(), "host": socket.gethostname()},
            "connection": {
                "connected": connection.connected,
                "state": connection.state,
                "url": None if session is None else session.safe_url,
                "urls": list(config.safe_urls),
                "rtt_ms": None,
                "error": None if error is None else str(error) or repr(error),
                "refused": isinstance(error, ConnectionRefusedByServer),
                "loop_silent": round(connection.silent_for, 1),
            },
            "settlements_unconfirmed": jetstream.settler.pending,
            "too_big": jetstream.settler.too_big,
            "not_kept": jetstream.settler.not_kept,
            "breaker": None if breaker is None else breaker.tell(),
            **{name: parts.get(name) for name in ("bridge", "direct", "relay", "worker")},
            "versions": _versions(session),
        }

    # -- looks -------------------------------------------------------------------------------------

    def _begin_nats(self) -> Future[_Seen]:
        begun: Future[_Seen] = self._jetstream.connection.submit(self._look_at_nats)
        return begun

    async def _look_at_nats(self) -> _Seen:
        """In the loop thread."""
        began = time.monotonic()
        jetstream = self._jetstream
        try:
            session = await jetstream.connection.session(PATIENCE)
        except NotConnectedError:
            return _Seen(began, {}, None)  # the connection tells
        of, since, denied = self._denied
        if of is not session or began - since > DENIED_KEPT:
            denied = set()
            self._denied = session, began, denied
        try:
            consumers = await asyncio.wait_for(jetstream.consumers_there(), PATIENCE / 2)
        except (NotConnectedError, asyncio.TimeoutError):
            consumers = consumer_specs(jetstream.config)
        names = [consumer.durable for consumer in consumers]
        left = began + PATIENCE - time.monotonic()
        found = await status.look(session, jetstream.config, names, denied, max(0.1, left))
        return _Seen(began, found, session)

    def _databases_of(self) -> tuple[str, ...]:
        return ("outbox", "inbox") if self._jetstream.config.has_database else ()

    def _begin_databases(self) -> Future[_Seen]:
        if self._databases_of():
            return in_native_thread(self._look_at_databases)  # a database may hang
        future: Future[_Seen] = Future()
        future.set_result(_Seen(time.monotonic(), {}))
        return future

    def _look_at_databases(self) -> _Seen:
        began = time.monotonic()
        return _Seen(began, {name: self._look_at(name) for name in self._databases_of()})

    def _look_at(self, name: str) -> dict[str, Any]:
        jetstream = self._jetstream
        config = jetstream.config
        needed = config.use_outbox if name == "outbox" else uses_inbox(jetstream.app, config)
        try:
            found: dict[str, Any] = getattr(jetstream, name).status()
        except CeleryJetStreamError as error:
            return {"needed": needed, "error": str(error)}
        except Exception as error:  # a driver's own
            first = (str(error).splitlines() or [""])[0]
            return {"needed": needed, "error": f"the {name}: {type(error).__name__}: {first}"}
        found.pop("breaker", None)
        return {"needed": needed, "error": None, **found}


@dataclass(frozen=True)
class _Seen:
    """What one look has found; ``session``: by which connection."""

    began: float
    found: dict[str, Any]
    session: Session | None = None

    @property
    def is_bad(self) -> bool:
        errors = (part.get("error") for part in self.found.values() if isinstance(part, dict))
        consumers = (consumer["error"] for consumer in self.found.get("consumers", ()))
        return bool(self.found.get("unanswered")) or any(errors) or any(consumers)


class _Look:
    """Something that is asked seldom, by one at a time, and may hang."""

    def __init__(self, begin: Callable[[], Future[_Seen]]) -> None:
        self._begin = begin
        self._lock = threading.Lock()
        self._running: Future[_Seen] | None = None
        self._began = self._ended = 0.0
        self._seen: _Seen | None = None

    @property
    def seen(self) -> _Seen | None:
        """What the last look that ended has found."""
        with self._lock:
            self._take()
            return self._seen

    @property
    def age(self) -> float | None:
        """Seconds since the last look that ended was begun."""
        seen = self.seen
        return None if seen is None else round(time.monotonic() - seen.began, 1)

    def late(self, since: float) -> float | None:
        """Seconds since a look was begun of which there is nothing yet; None where there is."""
        with self._lock:
            self._take()
            if self._running is None or (self._seen is not None and self._seen.began >= since):
                return None
            return time.monotonic() - self._began

    def begin(self, since: float) -> Future[_Seen] | None:
        """Begins a look, or finds the one that runs; None where one was begun since then."""
        with self._lock:
            self._take()
            if self._is_known(since) and not self._is_to_be_looked_at_again():
                return None
            if self._running is None:
                self._began = time.monotonic()
                self._running = self._begin()
            return self._running

    def wait(self, since: float, ends: float) -> None:
        """Waits for a look that was begun since then; not for one that has had its time."""
        while running := self.begin(since):
            most = BRIEF if self._is_known(since) else PATIENCE
            left = min(ends, self._began + most) - time.monotonic()
            if left <= 0:
                return
            with contextlib.suppress(FutureTimeoutError, CancelledError, CeleryJetStreamError):
                wait(running, left)

    def _is_known(self, since: float) -> bool:
        """What was looked at by a connection that is lost is not."""
        seen = self._seen
        if seen is None or (seen.session is not None and seen.session.lost.is_set()):
            return False
        return seen.began >= since

    def _is_to_be_looked_at_again(self) -> bool:
        """It was bad, and may be mended by now."""
        return bool(self._seen and self._seen.is_bad) and time.monotonic() - self._ended > HASTE

    def _take(self) -> None:
        """With the lock held: a look that has ended."""
        running = self._running
        if running is None or not running.done():
            return
        self._running, self._ended = None, time.monotonic()
        try:
            self._seen = running.result(0)
        except (CancelledError, Exception):  # the connection was closed meanwhile
            self._seen = _Seen(self._began, {})


# -- the report ------------------------------------------------------------------------------------


def _judged(report: dict[str, Any], states: list[State]) -> dict[str, Any]:
    """With the verdict first."""
    texts: dict[str, list[str]] = {UNHEALTHY: [], DEGRADED: []}
    for state in states:
        texts[state.kind.severity].append(state.text)
    word = overall(states)
    return {
        "status": word,
        "healthy": word != UNHEALTHY,
        "ready": all(state.kind.ready for state in states),
        "alive": all(state.kind.alive for state in states),
        "states": [state.as_dict() for state in states],
        "problems": texts[UNHEALTHY],
        "warnings": texts[DEGRADED],
        **report,
    }


@cache
def _nats_py() -> str:
    return metadata.version("nats-py")


def _versions(session: Session | None) -> dict[str, str | None]:
    return {
        "celery_jetstream": sys.modules[__package__].__version__,
        "celery": celery.__version__,
        "nats_py": _nats_py(),
        "nats_server": None if session is None else session.server_version or None,
        "python": platform.python_version(),
    }
