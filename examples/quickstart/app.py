"""``shop`` publishes that an order was placed; ``mailer`` has a Celery task run for it."""

import os
import tempfile
from pathlib import Path

from celery import Celery

from celery_jetstream import Event, JetStream, jetstream_handler
from examples import broker

FOLDER = Path(tempfile.gettempdir(), f"celery-jetstream-quickstart-{os.getuid()}")

# The service that handles. Its worker and its bridge are started with `celery -A`.
app = Celery("mailer")
app.conf.update(broker.settings(FOLDER))  # or the environment's CELERY_BROKER_URL
app.conf.update(jetstream_app_name="mailer", jetstream_destination_app="shop")
JetStream(app)  # connects to NATS_URL, or to localhost


@jetstream_handler("order.placed", autoretry_for=(OSError,), max_retries=4)
def send_thanks(event: Event) -> None:
    print(f"to {event.payload['email']}: thank you for order {event.resource_id}", flush=True)


# The service that publishes: `python -m examples.quickstart.app`. It needs no Celery worker.
if __name__ == "__main__":
    shop = Celery("shop", set_as_current=False)
    shop.conf.update(jetstream_app_name="shop", jetstream_destination_app="mailer")
    result = JetStream(shop).publish("order.placed", {"id": 7, "email": "ann@example.com"})
    print(f"stored in {result.raise_for_error().stream} as number {result.sequence}")
