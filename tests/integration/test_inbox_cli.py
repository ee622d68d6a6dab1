"""``celery -A … jetstream inbox …``: what it prints, does, and ends with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery
from click.testing import CliRunner, Result
from sqlalchemy import create_engine, text

from celery_jetstream import JetStream
from celery_jetstream.cli import jetstream
from celery_jetstream.delivery import Delivery
from celery_jetstream.inbox_rows import Entry
from tests.databases import Database


class Shop:
    def __init__(self, database: Database) -> None:
        self.app = Celery("shop", broker="memory://", set_as_current=False)
        self.app.conf.update(
            jetstream_app_name="shop",
            jetstream_destination_app="hub",
            jetstream_database_url=database.url,
        )
        self.jetstream = JetStream(self.app)
        self.url = database.url

    def run(self, *arguments: str, status: int = 0) -> Result:
        """Runs a command with the app, in this process."""
        context = SimpleNamespace(app=self.app, no_color=True)
        result = CliRunner().invoke(jetstream, ["inbox", *arguments], obj=context)
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == status, result.output
        return result

    def json(self, *arguments: str, status: int = 0) -> Any:
        return json.loads(self.run(*arguments, "--json", status=status).stdout)

    def handle(self, event_id: str, handler: str = "shop.pay", error: str = "") -> None:
        delivery = Delivery.from_reply("$JS.ACK.stream.workers.1.1.1.1.0")
        entry = Entry(event_id, handler, "order.paid", delivery)
        if error:
            self.jetstream.inbox.fail(entry, error)
        else:
            self.jetstream.inbox.run_within(entry, lambda session: None, lambda failures: None)

    def sql(self, statement: str) -> None:
        engine = create_engine(self.url)
        with engine.begin() as connection:
            connection.execute(text(statement))
        engine.dispose()


@pytest.fixture
def bare(sqlite: Database) -> Iterator[Shop]:
    shop = Shop(sqlite)
    yield shop
    shop.jetstream.close()


@pytest.fixture
def shop(bare: Shop) -> Shop:
    bare.jetstream.inbox.create_tables()
    return bare


def test_init_makes_the_table_and_can_be_repeated(bare: Shop) -> None:
    assert "CREATE TABLE jetstream_inbox" in bare.run("init", "--sql").stdout
    said = bare.run("status", status=1).stdout
    assert "inbox init" in said
    assert said.endswith("not healthy\n")
    for _ in range(2):
        assert bare.run("init").stdout == "the inbox is ready: jetstream_inbox\n"
    bare.sql("ALTER TABLE jetstream_inbox DROP COLUMN last_error")
    assert "ADD COLUMN last_error" in bare.run("init", status=1).stdout
    assert bare.json("status", status=1)["healthy"] is False


def test_an_app_without_an_inbox_is_told_what_to_set(bare: Shop) -> None:
    bare.app.conf.jetstream_database_url = None
    assert "there is no inbox: set jetstream_database_url" in bare.run("list", status=1).output
    assert "there is no inbox" in bare.json("list", status=1)["error"]


def test_without_a_table_it_says_what_to_do(bare: Shop) -> None:
    assert "jetstream inbox init" in bare.run("list", status=1).output


def test_list_and_show(shop: Shop) -> None:
    assert shop.run("list").stdout == "no events\n"
    assert shop.json("list") == []
    shop.handle("done")
    shop.handle("done", "shop.ship")
    shop.handle("failed", error="OSError('no')")
    lines = shop.run("list").stdout.splitlines()
    assert len(lines) == 4
    assert max(map(len, lines)) <= 100
    assert [row["event_id"] for row in shop.json("list", "--status", "failed")] == ["failed"]
    assert len(shop.json("list", "--handler", "shop.pay")) == 2
    assert len(shop.json("list", "--type", "order.*", "--limit", "1")) == 1
    assert shop.json("list", "--older-than", "1h") == []
    shown = shop.run("show", "failed").stdout
    assert "OSError('no')" in shown
    assert "processed_at   -" in shown
    assert {row["handler"] for row in shop.json("show", "done")} == {"shop.pay", "shop.ship"}
    assert "no handler has seen" in shop.run("show", "nobody", status=1).output
    assert "--type" in shop.run("list", "--type", "a..b", status=2).output


def test_reset(shop: Shop) -> None:
    shop.handle("done")
    shop.handle("done", "shop.ship")
    assert shop.json("reset", "done", "--handler", "shop.pay") == {"changed": 1}
    assert shop.run("reset", "done").stdout == "1 handlers will handle it once more\n"
    assert shop.json("reset", "done", status=1) == {"changed": 0}


def test_prune(shop: Shop) -> None:
    shop.handle("old")
    shop.sql("UPDATE jetstream_inbox SET updated_at = '2020-01-01 00:00:00.000000'")
    shop.handle("new")
    assert shop.run("prune", "--dry-run").stdout == "1 rows would be deleted\n"
    assert shop.json("prune") == {"dry_run": False, "deleted": 1}
    assert shop.run("prune", "--older-than", "0").stdout == "1 rows deleted\n"


def test_status_counts_and_warns(shop: Shop) -> None:
    shop.handle("done")
    shop.handle("failed", error="no")
    said = shop.run("status").stdout
    assert "0 received, 0 processing, 1 processed, 1 failed" in said
    assert said.endswith("healthy\n")
    shop.app.conf.jetstream_max_age = "60d"
    del shop.jetstream.__dict__["config"]
    shop.jetstream.close()
    shop.jetstream._forget()
    assert "is less than the stream's max_age of 5.184e+06 s" in shop.run("status").stdout
    assert len(shop.json("status")["warnings"]) == 1
