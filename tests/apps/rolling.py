"""One app in two versions, ``ROLLING_VERSION`` 1 and 2, side by side while it is deployed.

``changed.*`` is in both and does something else; ``removed.*`` is in the first only, ``added.*`` in
the second only. Configured by the environment (``DESK_CONF``, JSON), as ``desk`` is.
"""

from __future__ import annotations

import json
import os
import time

from celery import Celery

from celery_jetstream import Event, JetStream, jetstream_handler
from tests.apps.ledger import note

VERSION = int(os.environ["ROLLING_VERSION"])

app = Celery("rolling")
app.conf.update(json.loads(os.environ["DESK_CONF"]))
jetstream = JetStream(app)


def run(event: Event) -> None:
    note(event, "begun", version=VERSION)
    time.sleep(event.payload.get("seconds", 0))
    note(event, "handled", version=VERSION)


@jetstream_handler("changed.*")
def changed(event: Event) -> None:
    run(event)


if VERSION == 1:

    @jetstream_handler("removed.*")
    def removed(event: Event) -> None:
        run(event)


if VERSION == 2:

    @jetstream_handler("added.*")
    def added(event: Event) -> None:
        run(event)
