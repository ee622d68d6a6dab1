"""``mailer``, as Docker Compose runs it: thanks for each of ``shop``'s orders, once.

Broker, NATS and database come from the environment: CELERY_BROKER_URL, NATS_URL, DATABASE_URL.
"""

from __future__ import annotations

from celery import Celery
from sqlalchemy.orm import Session

from celery_jetstream import Event, JetStream, jetstream_handler
from examples.compose.models import DATABASE_URL, Mail

app = Celery("mailer")
app.conf.update(
    jetstream_app_name="mailer",
    jetstream_destination_app="shop",
    jetstream_database_url=DATABASE_URL,
    jetstream_auto_provision=False,  # stream and consumer are made by `provision`, before all else
    broker_connection_retry_on_startup=True,
)
JetStream(app)


@jetstream_handler("order.placed", inbox=True, autoretry_for=(OSError,))
def send_thanks(event: Event, session: Session) -> None:
    session.add(Mail(order_id=event.payload["id"], email=event.payload["email"]))
    print(f"to {event.payload['email']}: thank you for order {event.payload['id']}", flush=True)
