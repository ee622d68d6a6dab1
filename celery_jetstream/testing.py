"""The testing kit: what your tests need of events, handlers and servers, without pytest too.

==================================  ============================================================
:func:`capture_events`              what the code under test publishes is kept, and not sent
:func:`assert_published`            …, or is in the stream; :func:`refute_published`,
                                    :func:`published_events`
:func:`perform`                     one handler, one event, in this process: how it would settle
:func:`deliver`                     one event through a real stream and a real bridge
:func:`drain`                       the outbox flushed, and the stream's messages handled
:func:`rebound`                     your app on a test's server; :func:`configured`: its settings
:class:`NatsServer`                 a real, private server, in 30 milliseconds
==================================  ============================================================

Fixtures for pytest are in :mod:`celery_jetstream.contrib.pytest`. How to:
``docs/how-to/test.md``.
"""

from __future__ import annotations

from .testing_apps import configured, rebound
from .testing_capture import Captured, Published, capture_events
from .testing_events import assert_published, published_events, refute_published
from .testing_handlers import Run, perform
from .testing_servers import (
    LocalServer,
    NatsServer,
    ServerError,
    find_nats_server,
    free_port,
    wait_until,
)
from .testing_stream import Delivered, Drained, deliver, drain

__all__ = (
    "Captured",
    "Delivered",
    "Drained",
    "LocalServer",
    "NatsServer",
    "Published",
    "Run",
    "ServerError",
    "assert_published",
    "capture_events",
    "configured",
    "deliver",
    "drain",
    "find_nats_server",
    "free_port",
    "perform",
    "published_events",
    "rebound",
    "refute_published",
    "wait_until",
)
