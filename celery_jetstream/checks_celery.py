"""The doctor's checks of Celery: its settings, the workers, the queues. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from .facts import Facts, HandlerFacts, Unknown, WorkerFacts, known, span
from .findings import Check, Result, check, error, ok, skipped, warning

__all__ = ("CHECKS",)

#: Seconds after which Redis gives a task to another worker, unless it is set otherwise.
VISIBILITY_TIMEOUT = 3600.0
#: Pools that let a task run on at its time limit, as their modules are called.
WITHOUT_LIMITS = ("thread", "solo", "eventlet")


@check(
    "handlers",
    "An event whose handler is not known becomes a dead letter (no_handler) in the bridge.",
)
def handlers(facts: Facts) -> Iterator[Result]:
    found = known(facts.handlers)
    if found:
        yield ok(f"{len(found)}: {', '.join(handler.name for handler in found)}")
    else:
        yield warning(
            "this app knows no handler",
            "import the modules that define them (include=, imports or autodiscover_tasks); an app "
            "that only publishes needs none, and no bridge",
        )


@check(
    "acks-late",
    "Two would redeliver what a worker did not finish: the Celery broker, and JetStream.",
)
def acks_late(facts: Facts) -> Iterator[Result]:
    late = [handler.name for handler in known(facts.handlers) if handler.acks_late]
    if late:
        yield error(
            f"acks_late is on for {', '.join(late)}",
            "turn it off there (task_annotations, or the handlers' base)",
        )
    elif _on(facts, "task_acks_late") and _on(facts, "task_reject_on_worker_lost"):
        yield warning(
            "task_acks_late and task_reject_on_worker_lost are on for the app's other tasks (not "
            "for handlers): one that kills its worker's process is run again for ever",
            "give them to the tasks that need it, in place of the settings",
        )
    else:
        yield ok("handlers are acknowledged to the broker when they begin")


def _on(facts: Facts, name: str) -> bool:
    return bool(facts.celery.get(name))


@check(
    "always-eager",
    "Tasks run in their callers: publish_event.delay blocks a request, and no retry outlives it. "
    "(The bridge ignores it.)",
)
def always_eager(facts: Facts) -> Iterator[Result]:
    if _on(facts, "task_always_eager"):
        yield warning("task_always_eager is on", "leave it to tests")
    else:
        yield ok("off")


@check(
    "visibility-timeout",
    "A copy that waits in a worker for longer is given to another one by the Celery broker, and "
    "runs twice.",
)
def visibility_timeout(facts: Facts) -> Iterator[Result]:
    if facts.celery["transport"] not in ("redis", "rediss", "sqs", "sentinel"):
        yield ok(f"the broker ({facts.celery['transport']}) has none")
        return
    timeout = facts.celery.get("visibility_timeout") or VISIBILITY_TIMEOUT
    limits = {"jetstream_lease": facts.config.lease}
    for handler in known(facts.handlers):
        if handler.time_limit:
            limits[f"the time limit of {handler.name}"] = handler.time_limit
    if _on(facts, "task_acks_late") and facts.celery.get("task_time_limit"):
        limits["task_time_limit"] = facts.celery["task_time_limit"]
    name, most = max(limits.items(), key=lambda item: item[1])
    shown = f"visibility_timeout is {span(timeout)}, {name} {span(most)}"
    if timeout < most:
        yield warning(
            shown,
            f"set broker_transport_options['visibility_timeout'] to {2 * most:g} or more",
        )
    else:
        yield ok(shown)


@check(
    "time-limits",
    "A flush that is killed leaves its rows leased; a message whose task runs on is delivered "
    "again, and runs twice at the same time.",
)
def time_limits(facts: Facts) -> Iterator[Result]:
    flush, config = known(facts.flush), facts.config
    limits = [limit for limit in (flush.time_limit, flush.soft_time_limit) if limit]
    if config.has_database and limits and min(limits) <= config.outbox_max_seconds:
        yield warning(
            f"{flush.name} may run for {span(min(limits))}, and goes on for up to "
            f"{span(config.outbox_max_seconds)}",
            f"set jetstream_outbox_max_seconds to {min(limits) / 2:g}, or raise its time limit "
            "(task_time_limit, task_annotations)",
        )
    if not isinstance(facts.workers, Unknown):
        yield from _unlimited(facts.workers, known(facts.handlers))
    endless = [h.name for h in known(facts.handlers) if not (h.time_limit or h.soft_time_limit)]
    if endless:
        yield ok(
            f"no time limit on {', '.join(endless)}: one that runs for longer than "
            f"jetstream_max_hold, {span(config.max_hold)}, is delivered again"
        )
    else:
        yield ok("no handler is without one")


def _unlimited(
    workers: Iterable[WorkerFacts], handlers: Iterable[HandlerFacts]
) -> Iterator[Result]:
    for worker in workers:
        limited = [h.name for h in handlers if h.time_limit and h.name in worker.tasks]
        if limited and worker.pool in WITHOUT_LIMITS:
            yield warning(
                f"{worker.name}: its pool ({worker.pool}) ends no task at its time limit: "
                f"{', '.join(limited)}",
                "use -P prefork for them, or have them bound what they wait for, and give them no "
                "time_limit: jetstream_max_hold holds then",
            )


@check(
    "prefetch",
    "Copies wait in the worker that fetched them while others are idle; a worker that is killed "
    "has them come again after the lease.",
)
def prefetch(facts: Facts) -> Iterator[Result]:
    multiplier = facts.celery["worker_prefetch_multiplier"]
    if multiplier == 0:
        yield warning(
            "worker_prefetch_multiplier is 0: a worker fetches without a limit", "set it to 4, or 1"
        )
        return
    slow = [h.name for h in known(facts.handlers) if (h.time_limit or 0) > 600]
    if slow and multiplier > 1:
        yield warning(
            f"worker_prefetch_multiplier is {multiplier}; {', '.join(slow)} may run for minutes",
            "set it to 1, and start workers with -O fair",
        )
    else:
        yield ok(f"worker_prefetch_multiplier is {multiplier}")


# -- workers ---------------------------------------------------------------------------------------


@check("workers", "Nobody runs what is dispatched.")
def workers(facts: Facts) -> Iterator[Result]:
    found = known(facts.workers)
    if not found:
        yield warning(
            "no worker answered",
            "start one; one that is busy with a task in the solo pool, or without remote control, "
            "does not answer",
        )
        return
    for worker in found:
        queues = ", ".join(worker.queues) or "none: a worker of direct mode"
        at_once = f"{worker.concurrency or '?'} at once ({worker.pool or '?'})"
        yield ok(f"{worker.name}: {at_once}, queues: {queues}")


@check("handler-queues", "Copies wait in a queue that no worker reads, and are dispatched again.")
def handler_queues(facts: Facts) -> Iterator[Result]:
    if not known(facts.workers):
        yield skipped("no worker answered")
    elif facts.taken_directly:
        yield ok("workers take the messages themselves")
    else:
        yield from _queues(facts, {h.name: h.queue for h in known(facts.handlers)})


def _queues(facts: Facts, tasks: dict[str, str]) -> Iterator[Result]:
    read = {queue for worker in known(facts.workers) for queue in worker.queues}
    wrong = {name: queue for name, queue in tasks.items() if queue and queue not in read}
    for name, queue in wrong.items():
        yield error(
            f"{name} goes to the queue {queue}, and the workers read {', '.join(sorted(read))}",
            f"start a worker with -Q {queue}, or change the queue (queue=, task_routes)",
        )
    if not wrong:
        yield ok(
            f"read: {', '.join(sorted({queue for queue in tasks.values() if queue})) or 'none'}"
        )


@check(
    "handler-tasks",
    "A worker that does not know a task hands its message back: it comes again for ever.",
)
def handler_tasks(facts: Facts) -> Iterator[Result]:
    if not known(facts.workers):
        yield skipped("no worker answered")
        return
    wrong = False
    for worker in known(facts.workers):
        unknown = [
            handler.name
            for handler in known(facts.handlers)
            if handler.name not in worker.tasks
            and (worker.is_direct or facts.config.direct or handler.queue in worker.queues)
        ]
        if unknown:
            wrong = True
            yield error(
                f"{worker.name} does not know {', '.join(unknown)}",
                "restart it with the code that has them (include=, imports), or give it other "
                "queues",
            )
    if not wrong:
        yield ok("every worker knows the handlers of its queues")


@check(
    "flush-queue",
    "What beat and commits send to flush the outbox waits there: rows are published by relays "
    "only, or by processes that are connected themselves.",
)
def flush_queue(facts: Facts) -> Iterator[Result]:
    flush = known(facts.flush)
    if not facts.config.has_database or not facts.config.outbox_beat:
        yield ok("beat does not flush this app's outbox")
    elif not known(facts.workers):
        yield skipped("no worker answered")
    else:
        yield from _queues(facts, {flush.name: flush.queue})


CHECKS: tuple[Check, ...] = (
    handlers,
    acks_late,
    always_eager,
    visibility_timeout,
    time_limits,
    prefetch,
    workers,
    handler_queues,
    handler_tasks,
    flush_queue,
)
