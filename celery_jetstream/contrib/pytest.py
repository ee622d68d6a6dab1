"""Fixtures for pytest, found by it wherever this package is installed.

============================  ==================================================================
``jetstream``                 your app's JetStream on a real server, with a stream of the test's
``jetstream_app``             the app itself
``jetstream_events``          what the test publishes, captured; needs no server
``jetstream_server``          the server: one for each process of the run (of pytest-xdist)
``jetstream_settings``        settings for the app; override it
``jetstream_user_app``        the app that is used; override it, or set ``jetstream_app`` in the
                              configuration of pytest, as for ``celery -A``
============================  ==================================================================

Nothing is imported before a fixture is used. ``docs/how-to/test.md`` shows all of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from celery import Celery

    from ..extension import JetStream
    from ..testing import Captured, NatsServer


def pytest_addoption(parser: pytest.Parser) -> None:
    """The one setting."""
    parser.addini(
        "jetstream_app", "the Celery app of the fixtures jetstream…, as for celery -A: shop.celery"
    )


@pytest.fixture(scope="session")
def jetstream_server() -> Iterator[NatsServer]:
    """A real, private nats-server on a random loopback port, shared by the tests of a process."""
    from ..testing import NatsServer

    with NatsServer() as server:
        yield server


@pytest.fixture
def jetstream_settings() -> dict[str, Any]:
    """Settings for the app in a test: ``{"jetstream_database_url": …}``. Override it."""
    return {}


@pytest.fixture
def jetstream_user_app(request: pytest.FixtureRequest) -> Celery:
    """The app of the ini setting ``jetstream_app``; else a new one, called ``app``. Override it."""
    from celery import Celery
    from celery.app.utils import find_app

    from .. import JetStream

    if name := request.config.getini("jetstream_app"):
        return find_app(name)
    app = Celery("app", broker="memory://", set_as_current=False)
    app.conf.update(jetstream_app_name="app", jetstream_destination_app="other")
    JetStream(app)
    return app


@pytest.fixture
def _jetstream_configured(
    jetstream_user_app: Celery, jetstream_settings: dict[str, Any]
) -> Iterator[JetStream]:
    from ..testing import configured

    with configured(jetstream_user_app, **jetstream_settings) as jetstream:
        yield jetstream


@pytest.fixture
def jetstream_app(
    _jetstream_configured: JetStream, jetstream_server: NatsServer
) -> Iterator[Celery]:
    """Your app for one test: on the server, with a stream that goes with the test."""
    from ..testing import rebound

    app = _jetstream_configured.app
    with rebound(app, jetstream_server):
        yield app


@pytest.fixture
def jetstream(jetstream_app: Celery) -> JetStream:
    """The JetStream of ``jetstream_app``."""
    found: JetStream = jetstream_app.jetstream
    return found


@pytest.fixture
def jetstream_events(_jetstream_configured: JetStream) -> Iterator[Captured]:
    """What the test publishes: captured, and not sent. See ``capture_events``."""
    from ..testing import capture_events

    with capture_events(_jetstream_configured) as captured:
        yield captured
