"""A Celery app for the time of a test: other settings, a test's server, and all as it was after.

:func:`configured` lends an app's JetStream other settings; :func:`rebound` lends it a server.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from celery import Celery, _state

from . import topology
from .consumers import stream_spec
from .exceptions import ConfigurationError, NotConnectedError, TopologyError
from .extension import JetStream
from .testing_servers import NatsServer

__all__ = ("configured", "jetstream_in", "jetstream_on_server", "rebound")

#: In the place of what an app brings along for production.
_ALONE: dict[str, Any] = {
    "jetstream_auto_provision": True,
    "jetstream_nats_options": {},
    "jetstream_num_replicas": 1,
    "jetstream_outbox_nudge": False,
}
#: Seconds that the end of a test waits for what is on its way.
_CLOSE_TIMEOUT = 2.0


def jetstream_in(app: Any = None) -> JetStream:
    """The JetStream of an app, or of the current one; a JetStream is taken as it is.

    Raises:
        ConfigurationError: it has none.
    """
    if isinstance(app, JetStream):
        return app
    if app is None:
        app = _state.get_current_app()
    found = getattr(app, "jetstream", None)
    if isinstance(found, JetStream):
        return found
    raise ConfigurationError(
        f"the Celery app {app.main!r} has no JetStream: import the module that makes yours, or "
        "give it: jetstream="
    )


def jetstream_on_server(app: Any = None) -> JetStream:
    """As :func:`jetstream_in`, of an app that :func:`rebound` has put on a test's server.

    Raises:
        ConfigurationError: it has no JetStream, or is on the server of its own settings: what that
            has would be handled by a test, and be gone.
    """
    jetstream = jetstream_in(app)
    if not vars(jetstream).get("_rebound"):
        raise ConfigurationError(
            f"the app {jetstream.app.main!r} is not on a test's server: use the fixture jetstream, "
            "or rebound(app, server)"
        )
    return jetstream


@contextlib.contextmanager
def configured(app: Celery, **settings: Any) -> Iterator[JetStream]:
    """Lends an app other settings, and makes it the current app of this thread.

    Its JetStream reads them anew, with connections, outbox and inbox of its own, which are closed
    at the end; then everything is as it was, middleware too. Not for two threads at once.

    Args:
        app: the app, with a JetStream.
        settings: ``jetstream_…`` and Celery's own, by their full names.

    Raises:
        ConfigurationError: the app has no JetStream. Wrong settings are said when first used.
    """
    jetstream = jetstream_in(app)
    app.conf.get("jetstream_app_name")  # has Celery load it, where nothing has
    changes, before = app.conf.changes, dict(app.conf.changes)
    state, current = dict(vars(jetstream)), _state._tls.current_app
    app.conf.update(settings)
    app.set_current()
    jetstream._begin_anew()
    try:
        yield jetstream
    finally:
        try:
            jetstream.close(_CLOSE_TIMEOUT)
        finally:
            vars(jetstream).clear()
            vars(jetstream).update(state)
            changes.clear()
            changes.update(before)
            _state._tls.current_app = current


@contextlib.contextmanager
def rebound(app: Celery, server: NatsServer | str, **settings: Any) -> Iterator[JetStream]:
    """Puts an app on a test's server: its stream and consumers are made, and gone at the end.

    As :func:`configured`, and without what is for production: NATS credentials, replicas, and the
    nudge after a commit (rows of the outbox wait for :func:`~celery_jetstream.testing.drain`).
    Names and subjects stay the app's own, so that two apps on one server find each other. A stream
    that was on the server before is left there, with all that is in it.

    Args:
        app: the app.
        server: a :class:`~celery_jetstream.testing.NatsServer`, or a URL.
        settings: others, as for :func:`configured`.

    Raises:
        NotConnectedError: no server.
        TopologyError: the stream or a consumer cannot be had.
    """
    url = server if isinstance(server, str) else server.url
    with configured(app, **{**_ALONE, "jetstream_nats_urls": url, **settings}) as jetstream:
        jetstream.check()
        jetstream.connection.connect()
        is_new = jetstream.connection.run(_make_topology, jetstream)
        vars(jetstream)["_rebound"] = True
        try:
            yield jetstream
        finally:
            if is_new:
                _delete_stream(jetstream)


async def _make_topology(jetstream: JetStream) -> bool:
    """As ``provision()``, which looks again and again whether others undo it; is the stream new?"""
    found = await jetstream._api(f"STREAM.INFO.{jetstream.config.stream_name}", {})
    consumers = await jetstream.consumers()
    plan = await topology.plan(jetstream._api, stream_spec(jetstream.config), *consumers)
    try:
        as_wanted = not await topology._apply(jetstream._api, plan, consumers)
    except TopologyError:
        as_wanted = False
    if not as_wanted:  # an old server lacks some of it, or it cannot be had: said there
        await jetstream._ensure()
    return bool(found.get("error", {}).get("code") == 404)


def _delete_stream(jetstream: JetStream) -> None:
    name = f"STREAM.DELETE.{jetstream.config.stream_name}"
    with contextlib.suppress(NotConnectedError):  # the test has ended its server
        jetstream.connection.run(jetstream._api, name, {}, timeout=_CLOSE_TIMEOUT)
