"""Ids are given at INSERT and seen at COMMIT: a key's order holds for those that come late."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.orm import Session

from celery_jetstream import signals
from celery_jetstream.testing import NatsServer
from tests.conftest import Names
from tests.crash.shops import Shop
from tests.databases import Database


@pytest.fixture(params=["postgresql", "mariadb"])
def database(request: pytest.FixtureRequest) -> Database:
    """SQLite has one writer at a time."""
    found: Database = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def shop(
    tmp_path: Path, nats_server: NatsServer, names: Names, database: Database
) -> Iterator[Shop]:
    shop = Shop(tmp_path, nats_server.url, names, database, jetstream_outbox_batch_size=10)
    yield shop
    shop.close()


def add(shop: Shop, session: Session, key: str, number: int) -> None:
    event = {"event_type": "order.changed", "resource_id": key}
    shop.outbox.add(session, **event, payload={"key": key, "number": number})


@pytest.mark.parametrize("same", [True, False], ids=["one transaction", "two transactions"])
def test_commit_between_two_reads(shop: Shop, same: bool) -> None:
    """The first is passed over, for it is not committed; the second is after it."""
    engine = shop.outbox.database.engine
    with Session(engine) as late:
        add(shop, late, "late", 1)
        shop.write(15)
        if same:
            add(shop, late, "late", 2)

        def commit(**_: Any) -> None:
            signals.outbox_claimed.disconnect(commit)
            late.commit()
            if not same:
                add(shop, late, "late", 2)
                late.commit()
            shop.write(15)

        signals.outbox_claimed.connect(commit)
        shop.outbox.drain()
    account = shop.account("a late commit")
    assert account.events == 32
    assert account.is_right, account
