"""``shop``: what it tells others commits with its orders, by way of the outbox."""

import os
import tempfile
from pathlib import Path

from celery import Celery
from sqlalchemy import create_engine
from sqlalchemy.orm import Session, sessionmaker

from celery_jetstream import JetStream
from examples import broker
from examples.transactional_outbox.models import Base, Order

FOLDER = Path(tempfile.gettempdir(), f"celery-jetstream-shop-{os.getuid()}")
DATABASE_URL = os.environ.get("DATABASE_URL", f"sqlite:///{FOLDER}/shop.sqlite3")
LIMIT = 100_000  # cents
FOLDER.mkdir(mode=0o700, exist_ok=True)

app = Celery("shop")
app.conf.update(broker.settings(FOLDER))  # or the environment's CELERY_BROKER_URL
app.conf.update(
    jetstream_app_name="shop",
    jetstream_destination_app="mailer",
    jetstream_database_url=DATABASE_URL,
    task_default_queue="shop",
    beat_schedule_filename=str(FOLDER / "beat"),
)
jetstream = JetStream(app)  # beat flushes the outbox: `celery -A … worker -B`

engine = create_engine(DATABASE_URL)
transaction = sessionmaker(engine, expire_on_commit=False).begin


class Declined(Exception):
    """The bank says no."""


def place_order(email: str, total: int) -> Order:
    """The order, its event and a reminder for later: all of it is committed, or nothing is."""
    with transaction() as session:
        order = Order(email=email, total=total, state="placed", reminder="")
        session.add(order)
        session.flush()  # gives it its id
        tell(session, order, "order.placed")
        order.reminder = tell(session, order, "order.unpaid", delay="3d")
        if total > LIMIT:
            raise Declined(f"order {order.id} of {email}")
    return order


def pay(order: Order) -> None:
    move(order, "paid")
    jetstream.outbox.cancel(order.reminder)


def ship(order: Order) -> None:
    move(order, "shipped")


def move(order: Order, state: str) -> None:
    with transaction() as session:
        order = session.merge(order)
        order.state = state
        tell(session, order, f"order.{state}")


def tell(session: Session, order: Order, event_type: str, **options: object) -> str:
    """Writes an event. Its key is ``order:{id}``: events of one order keep their order."""
    payload = {"id": order.id, "email": order.email, "total": order.total}
    return jetstream.outbox.add(session, event_type=event_type, payload=payload, **options)


if __name__ == "__main__":
    Base.metadata.create_all(engine)
    for name in ("ann", "ben"):
        order = place_order(f"{name}@example.com", 4_200)
        pay(order)
        ship(order)
        print(f"order {order.id}: placed, paid and shipped; its reminder is cancelled")
    unpaid = place_order("cleo@example.com", 700)
    print(f"order {unpaid.id}: placed; a reminder waits")
    try:
        place_order("dan@example.com", 9_900_000)
    except Declined as error:
        print(f"declined, and no event of it was sent: {error}")
