"""What the doctor finds out about Celery: settings, handlers, and the workers that answer."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from celery import Celery
from kombu.utils.url import parse_url

from .dispatcher import queue_of
from .exceptions import CeleryJetStreamError
from .facts import HandlerFacts, Unknown, WorkerFacts
from .handlers import JetStreamTask

__all__ = ("flush_facts", "handler_facts", "settings", "workers")

FLUSH = "celery_jetstream.flush_outbox"
#: Seconds that workers have to answer the first question; who answered it is waited for.
ANSWER = 1.0
#: Brokers that no other process can be asked through.
PRIVATE = ("memory", "filesystem")
NAMES = (
    *("task_acks_late", "task_reject_on_worker_lost", "task_always_eager", "task_time_limit"),
    *("task_soft_time_limit", "worker_prefetch_multiplier"),
)


def settings(app: Celery) -> dict[str, Any]:
    """Celery's settings that matter here; ``transport`` and ``visibility_timeout`` beside them."""
    found = {name: app.conf.get(name) for name in NAMES}
    options = app.conf.get("broker_transport_options") or {}
    found["visibility_timeout"] = options.get("visibility_timeout")
    url = app.conf.broker_read_url or app.conf.broker_url or "amqp://"
    found["transport"] = str(app.conf.broker_transport or parse_url(str(url))["transport"])
    return found


def handler_facts(app: Celery) -> tuple[HandlerFacts, ...] | Unknown:
    """The handlers, by name; wrong ones too."""
    try:
        tasks = [task for task in app.tasks.values() if isinstance(task, JetStreamTask)]
        return tuple(_described(app, task) for task in sorted(tasks, key=lambda t: str(t.name)))
    except CeleryJetStreamError as error:
        return Unknown(str(error))


def flush_facts(app: Celery, queue: str | None) -> HandlerFacts:
    """The task that flushes the outbox."""
    found = _described(app, app.tasks[FLUSH])
    return HandlerFacts(**{**_as_dict(found), "queue": queue or found.queue})


def _as_dict(found: HandlerFacts) -> dict[str, Any]:
    return {name: getattr(found, name) for name in HandlerFacts.__dataclass_fields__}


def _described(app: Celery, task: Any) -> HandlerFacts:
    conf = app.conf
    return HandlerFacts(
        name=str(task.name),
        queue=queue_of(app, task),
        acks_late=bool(task.acks_late),
        has_inbox=bool(getattr(task, "has_inbox", False)),
        time_limit=task.time_limit or conf.task_time_limit,
        soft_time_limit=task.soft_time_limit or conf.task_soft_time_limit,
    )


def workers(app: Celery, timeout: float) -> tuple[WorkerFacts, ...]:
    """The workers that answer. Blocks as the broker does: call it in a thread of its own.

    Raises:
        Unknown: they cannot be asked: the broker is away, or is one that only a process has.
    """
    ends = time.monotonic() + timeout
    if (transport := settings(app)["transport"]).split(":")[0].split(".")[-1] in PRIVATE:
        raise Unknown(
            f"workers cannot be asked through the broker {transport}: Redis or RabbitMQ can"
        )
    try:
        with app.connection_for_write() as connection:
            connection.ensure_connection(max_retries=1, timeout=timeout / 2)
            stats = _ask(app, connection, "stats", ANSWER)
            left = max(0.1, ends - time.monotonic())
            queues = _ask(app, connection, "active_queues", left / 2, stats)
            left = max(0.1, ends - time.monotonic())
            tasks = _ask(app, connection, "registered", left, stats)
    except Exception as error:  # of whatever client the broker has
        raise Unknown(f"the Celery broker is away: {_first_line(error)}") from error
    return tuple(
        _worker(name, stats[name], queues.get(name), tasks.get(name)) for name in sorted(stats)
    )


def _ask(
    app: Celery,
    connection: Any,
    question: str,
    timeout: float,
    only: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Worker to answer; ends as soon as all have answered, where it is known who there is."""
    if only is not None and not only:
        return {}
    names = None if only is None else list(only)
    asked = app.control.inspect(
        destination=names, timeout=timeout, connection=connection, limit=names and len(names)
    )
    return dict(getattr(asked, question)() or {})


def _worker(name: str, stats: Mapping[str, Any], queues: Any, tasks: Any) -> WorkerFacts:
    pool = stats.get("pool") or {}
    concurrency = pool.get("max-concurrency")
    return WorkerFacts(
        name=name,
        queues=tuple(queue["name"] for queue in queues or ()),
        tasks=frozenset(text.split(" ")[0] for text in tasks or ()),
        pool=str(pool.get("implementation", "")).partition(":")[0].rpartition(".")[2],
        concurrency=concurrency if isinstance(concurrency, int) else None,
    )


def _first_line(error: BaseException) -> str:
    return (str(error) or repr(error)).splitlines()[0]
