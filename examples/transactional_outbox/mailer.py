"""``mailer``: tells the customers what became of their orders."""

import os
import tempfile
from pathlib import Path

from celery import Celery

from celery_jetstream import Event, JetStream, jetstream_handler
from examples import broker

FOLDER = Path(tempfile.gettempdir(), f"celery-jetstream-mailer-{os.getuid()}")

app = Celery("mailer")
app.conf.update(broker.settings(FOLDER), task_default_queue="mailer")
app.conf.update(jetstream_app_name="mailer", jetstream_destination_app="shop")
JetStream(app)


@jetstream_handler("order.*", autoretry_for=(OSError,))
def tell_customer(event: Event) -> None:
    state = event.event_type.removeprefix("order.")
    print(f"to {event.payload['email']}: order {event.resource_id} is {state}", flush=True)
