"""Keeps payloads out of lines that Celery itself logs about copies, and about ``publish_event``.

A worker that does not know a task, or cannot read a copy, has Celery log all of the message; at
DEBUG level each job of a pool is; and lines about a task that is received, or fails, have its
arguments in a field, ``data``, which formatters for machines show. Our own lines have no payload in
the first place, and a copy's ``argsrepr`` is the event's type.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from .handlers import HEADER

__all__ = ("hide_payloads",)

#: Where Celery logs what it was sent.
LOGGERS = (
    *("celery.worker.consumer.consumer", "celery.pool"),
    *("celery.worker.strategy", "celery.app.trace"),
)
HIDDEN = "(not shown: an event's payload)"
#: What a text has in it that a copy, its headers, its envelope or ``publish_event`` was made into.
MARKS = (f"'{HEADER}': ", "event_type", "celery_jetstream.publish_event")


def hide_payloads() -> None:
    """Begins, in this process and those that it forks; harmless to repeat."""
    for name in LOGGERS:
        logging.getLogger(name).addFilter(_hide)


def _hide(record: logging.LogRecord) -> bool:
    if isinstance(record.args, tuple) and any(map(_tells, record.args)):
        record.args = tuple(map(_shown, record.args))
    for field in ("args", "data"):  # the same: for the text, and for machines
        found = getattr(record, field, None)
        if isinstance(found, Mapping) and any(map(_tells, found.values())):
            hidden = {name: HIDDEN for name in ("args", "kwargs") if name in found}
            setattr(record, field, {**found, **hidden})
    return True


def _tells(argument: Any) -> bool:
    if isinstance(argument, Mapping):
        return HEADER in argument
    return isinstance(argument, str) and any(mark in argument for mark in MARKS)


def _shown(argument: Any) -> Any:
    """An error stays, and a task's name; the body may be without a mark, cut or encoded."""
    if isinstance(argument, Mapping) and HEADER in argument:
        return {name: argument.get(name) for name in ("task", "id", "origin")}
    return HIDDEN if isinstance(argument, str) and len(argument) > 100 else argument
