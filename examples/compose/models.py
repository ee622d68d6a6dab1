"""The tables: the services' own, and the library's outbox and inbox beside them."""

from __future__ import annotations

import os

from sqlalchemy import create_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, sessionmaker

from celery_jetstream.schema import create_inbox, create_outbox

DATABASE_URL = os.environ.get("DATABASE_URL", "postgresql+psycopg://shop:shop@localhost:5432/shop")
engine = create_engine(DATABASE_URL)
transaction = sessionmaker(engine, expire_on_commit=False).begin


class Base(DeclarativeBase):
    pass


class Order(Base):
    """``shop`` has placed it."""

    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    email: Mapped[str]


class Mail(Base):
    """``mailer`` has sent it. An order has one, however often its event comes."""

    __tablename__ = "mails"

    order_id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    email: Mapped[str]


if __name__ == "__main__":  # in the place of your migrations
    with engine.begin() as connection:
        Base.metadata.create_all(connection)
        create_outbox(connection)
        create_inbox(connection)
    print("the tables are there")
