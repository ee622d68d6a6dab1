"""Our own tasks on their way to the broker: beat's entries, and the flush after a commit."""

from __future__ import annotations

import threading
import time
from typing import Any

from celery import Celery
from celery import signals as celery_signals

from .config import Config
from .dispatcher import depth, queue_of
from .exceptions import ConfigurationError

__all__ = ("Schedule", "uses_inbox")

FLUSH, PRUNE = "celery_jetstream.flush_outbox", "celery_jetstream.prune_outbox"
PRUNE_INBOX = "celery_jetstream.prune_inbox"
#: Seconds between two prunings.
PRUNE_INTERVAL = 600.0
#: Tasks in the flush's queue from which on one more would make no event sooner.
CROWDED = 100
#: Seconds between two looks at that.
LOOK_INTERVAL = 1.0


class Schedule:
    """Beat's entries for one app, and :meth:`send_flush`. Thread-safe.

    The entries are made when the app is finalized, and again when beat or a worker starts, for
    settings that were made later. An entry of the user's with one of our names stays.

    Args:
        app: the Celery app.
    """

    def __init__(self, app: Celery) -> None:
        self._app = app
        self._ours: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._looked = float("-inf")
        self._crowded = False
        app.on_after_finalize.connect(self._update, weak=False)
        celery_signals.import_modules.connect(self._update, sender=app)
        if app.finalized:
            self._update()

    def send_flush(self, config: Config) -> None:
        """Sends the task that flushes the outbox; not where many wait that nobody has taken.

        Raises:
            Exception: what the broker's client raises.
        """
        if not self._is_crowded(config):
            self._app.send_task(FLUSH, retry=False, ignore_result=True, **_flush_options(config))

    def _is_crowded(self, config: Config) -> bool:
        """With no worker there, each commit's flush would be kept by the broker for ever."""
        with self._lock:
            now = time.monotonic()
            if now - self._looked < LOOK_INTERVAL:
                return self._crowded
            self._looked = now
        queue = config.outbox_queue or queue_of(self._app, self._app.tasks[FLUSH])
        self._crowded = bool(queue) and depth(self._app, queue) >= CROWDED
        return self._crowded

    # -- beat ------------------------------------------------------------------------------------

    def _update(self, **_: Any) -> None:
        conf, before = self._app.conf, self._ours
        self._ours = ours = self._entries()
        if ours or before:
            found = conf.beat_schedule.items()
            users = {name: entry for name, entry in found if entry is not before.get(name)}
            conf.beat_schedule = {**ours, **users}

    def _entries(self) -> dict[str, Any]:
        conf = self._app.conf
        if not (conf.get("jetstream_database_url") or conf.get("jetstream_session_factory")):
            return {}
        try:
            config = Config.from_app(self._app)
        except ConfigurationError:
            return {}  # said where the settings are used
        entries: list[tuple[str, str, float, str | None]] = []
        if config.outbox_beat:
            name, queue = config.outbox_beat_name, config.outbox_queue
            entries.append((name, FLUSH, config.outbox_flush_interval, queue))
            entries.append((f"{name}.prune", PRUNE, PRUNE_INTERVAL, queue))
        if config.inbox_beat and uses_inbox(self._app, config):
            entries.append((PRUNE_INBOX, PRUNE_INBOX, PRUNE_INTERVAL, config.inbox_queue))
        return {
            name: {"task": task, "schedule": every, "options": _options(every, queue)}
            for name, task, every, queue in entries
        }


def uses_inbox(app: Celery, config: Config) -> bool:
    """Whether a handler that is known here has an inbox."""
    tasks = app.tasks.values() if app.finalized else ()
    return config.use_inbox or any(getattr(task, "inbox", None) is True for task in tasks)


def _flush_options(config: Config) -> dict[str, Any]:
    """Where flushes go. Without ``expires``: a worker whose clock is ahead would drop them."""
    return _options(config.outbox_flush_interval, config.outbox_queue)


def _options(every: float, queue: str | None) -> dict[str, Any]:
    """How a task of beat's is sent; ``expiration`` is RabbitMQ's."""
    return {"expiration": every} if queue is None else {"expiration": every, "queue": queue}
