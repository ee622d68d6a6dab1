"""An event's whole way in one process: published, dispatched by a bridge, settled."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from celery import Celery

from celery_jetstream import JetStream
from celery_jetstream.bridge import Bridge
from celery_jetstream.delivery import Delivery
from celery_jetstream.handlers import _task_class
from celery_jetstream.settlement import Ack
from tests.conftest import Names
from tests.servers import wait_until

__all__ = ("Errand",)


class Errand:
    """Two apps on one server: ``hub`` publishes, ``desk`` handles, by a bridge and a worker's hand.

    Args:
        urls: of the server, for both.
        names: desk is ``app_name``.
        hub: settings of the hub alone (``jetstream_`` is added).
        settings: of both, likewise.
    """

    def __init__(
        self, urls: Any, names: Names, hub: dict[str, Any] | None = None, **settings: Any
    ) -> None:
        self._apps: list[JetStream] = []
        common = {"nats_urls": urls, "stream_name": names.stream_name, **settings}
        there = {"app_name": names.destination_app, "destination_app": names.app_name}
        here = {"app_name": names.app_name, "destination_app": names.destination_app}
        self.make: Callable[..., JetStream] = lambda **more: self._make({**common, **here, **more})
        self.hub = self._make({**common, **there, **(hub or {})})
        self.desk = self.make()

    def _make(self, settings: dict[str, Any]) -> JetStream:
        app = Celery("errand", broker="memory://", set_as_current=False)
        app.conf.update({f"jetstream_{name}": value for name, value in settings.items()})
        app.conf.task_default_queue = str(settings["app_name"])
        jetstream = JetStream(app)
        base = _task_class(app.Task)
        options = {"event_types": ("parcel.*",), "acks_late": False, "shared": False}
        app.task(base=base, name="errands.parcel", lazy=False, **options)(_do_nothing)
        self._apps.append(jetstream)
        return jetstream

    def close(self) -> None:
        for jetstream in self._apps:
            jetstream.close()

    def run(self, count: int = 1) -> None:
        """Publishes, bridges and settles so many events; each once."""
        results = self.hub.publish_batch([{"event_type": "parcel.sent", "payload": {}}] * count)
        assert all(results), results
        worker, failures = self.make(), list[BaseException]()
        bridge = Bridge(self.desk, max_messages=count)

        def go() -> None:
            try:
                bridge.run()
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=go, daemon=True)
        thread.start()
        try:
            self._settle(worker, count, failures)
            thread.join(20)
            assert not thread.is_alive(), "the bridge did not end"
        finally:
            bridge.stop()
        assert not failures, failures
        assert worker.settler.drain(5) == 0

    def _settle(self, worker: JetStream, count: int, failures: list[BaseException]) -> None:
        with worker.app.connection_for_read() as connection:
            queue = connection.SimpleQueue(worker.config.app_name)
            for _ in range(count):

                def copy() -> Any:
                    assert not failures, failures
                    return queue.queue.get(no_ack=True)

                message = wait_until(copy, 20, "a copy in the broker")
                delivery = Delivery.from_reply(message.headers["jetstream"]["reply"])
                worker.settler.settle(delivery, Ack())
            queue.close()


def _do_nothing(event: object) -> None:
    """The worker is this test."""
