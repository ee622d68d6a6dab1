"""``shop``: places an order. Its event commits with it, and needs neither NATS nor a worker then.

In a system of yours this would be a web service with a database of its own.
"""

from __future__ import annotations

import sys

from celery import Celery

from celery_jetstream import JetStream
from examples.compose.models import DATABASE_URL, Order, transaction

shop = Celery("shop", set_as_current=False)
shop.conf.update(
    jetstream_app_name="shop",
    jetstream_destination_app="mailer",
    jetstream_database_url=DATABASE_URL,
)
jetstream = JetStream(shop)


def place_order(email: str) -> int:
    with transaction() as session:
        order = Order(email=email)
        session.add(order)
        session.flush()  # gives it its id
        payload = {"id": order.id, "email": email}
        jetstream.outbox.add(session, event_type="order.placed", payload=payload)
    return order.id


if __name__ == "__main__":
    for email in sys.argv[1:] or ["ann@example.com"]:
        print(f"order {place_order(email)} is placed")
