"""``celery -A … jetstream outbox …``: what it prints, does, and ends with."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result

from celery_jetstream.cli import jetstream
from celery_jetstream.exceptions import ConfigurationError, OutboxUnavailableError
from celery_jetstream.flusher import FlushResult
from celery_jetstream.models import AT_ONCE, PARKED
from celery_jetstream.relay import Relay
from celery_jetstream.sqltypes import db_now
from celery_jetstream.testing import NatsServer, wait_until
from tests.conftest import Names
from tests.databases import Database
from tests.flushing import Flushing
from tests.stack import Stack

MakeStack = Callable[..., Stack]


@pytest.fixture
def shop(nats_server: NatsServer, sqlite: Database, names: Names) -> Iterator[Flushing]:
    one = Flushing(nats_server.url, sqlite, names)
    yield one.prepare()
    one.close()


def run(one: Flushing, *arguments: str, status: int = 0) -> Result:
    """Runs a command with the app, in this process."""
    context = SimpleNamespace(app=one.app, no_color=True)
    result = CliRunner().invoke(jetstream, ["outbox", *arguments], obj=context)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == status, result.output
    return result


def as_json(one: Flushing, *arguments: str, status: int = 0) -> Any:
    return json.loads(run(one, *arguments, "--json", status=status).stdout)


def fail(one: Flushing, *ids: str) -> None:
    one.change(
        *ids,
        status="failed",
        attempts=1,
        failing_since=db_now(),
        finished_at=db_now(),
        last_error="refused\nfor good",
    )


class TestInit:
    def test_it_makes_the_tables_and_can_be_repeated(
        self, nats_server: NatsServer, sqlite: Database, names: Names
    ):
        bare = Flushing(nats_server.url, sqlite, names)
        assert "CREATE UNIQUE INDEX" in run(bare, "init", "--sql").stdout
        said = run(bare, "status", status=1).stdout
        assert "outbox init" in said
        assert said.endswith("not healthy\n")
        for _ in range(2):
            assert "jetstream_outbox_holds" in run(bare, "init").stdout
        bare.sql("DROP INDEX ix_jetstream_outbox_due")
        bare.sql("ALTER TABLE jetstream_outbox ADD COLUMN odd INTEGER DEFAULT 0 NOT NULL")
        assert run(bare, "init").exit_code == 0
        bare.sql("ALTER TABLE jetstream_outbox DROP COLUMN last_error")
        assert "ADD COLUMN last_error" in run(bare, "init", status=1).stdout

    def test_an_app_without_an_outbox_is_told_what_to_set(self, shop: Flushing):
        shop.app.conf.jetstream_database_url = None
        shop.jetstream.close()
        shop.jetstream._forget()
        del shop.jetstream.config
        said = run(shop, "list", status=1)
        assert "jetstream_database_url" in said.output
        assert "jetstream_database_url" in as_json(shop, "list", status=1)["error"]


class TestLooking:
    def test_list_is_readable_at_100_columns(self, shop: Flushing):
        assert run(shop, "list").stdout == "no events\n"
        shop.write("a", event_type="user.created")
        shop.write("k" * 200, event_type="order." + "x" * 200, start=10**30)
        shop.write(*"bcd")
        fail(shop, "1")
        lines = run(shop, "list").stdout.splitlines()
        assert len(lines) == 6
        assert max(map(len, lines)) <= 100
        assert "failed" in lines[1]
        assert "user.created" in lines[1]
        found = as_json(shop, "list", "--type", "order.>", "--limit", "2")
        assert len(found) == 2
        assert as_json(shop, "list", "--status", "failed")[0]["last_error"] == "refused\nfor good"
        assert "--after" in run(shop, "list", "--limit", "2").output
        assert len(as_json(shop, "list", "--after", str(found[0]["id"]))) == 3

    def test_show_keeps_the_headers_values_to_itself(self, shop: Flushing):
        shop.write("a", headers={"authorization": "Bearer hunter2"})
        fail(shop, "1")
        said = run(shop, "show", "1").stdout
        assert "authorization" in said
        assert "hunter2" not in said
        assert '"payload": {' in said
        assert "for good" in said
        assert as_json(shop, "show", "1")["body"]["payload"] == {"n": 1}
        assert "no event 2" in run(shop, "show", "2", status=1).output

    def test_status(self, shop: Flushing):
        shop.write("a", "b")
        shop.change("1", created_at=db_now(-600))
        said = run(shop, "status").stdout
        assert "2 pending, 0 sent" in said
        assert "oldest due 10m" in said
        assert said.endswith("\nhealthy\n")
        assert as_json(shop, "status", "--max-age", "5m", status=1)["healthy"] is False
        assert as_json(shop, "status", "--max-age", "1h")["counts"]["pending"] == 2

    def test_wrong_options_are_usage_errors(self, shop: Flushing):
        for arguments in (
            ("list", "--status", "done"),
            ("list", "--type", "user.cre*"),
            ("list", "--older-than", "soon"),
            ("replay", "--since", "soon"),
            ("replay",),
            ("prune", "--older-than", "-1"),
        ):
            run(shop, *arguments, status=2)


class TestChanging:
    def test_nothing_is_changed_by_accident(self, shop: Flushing):
        shop.write("a")
        fail(shop, "1")
        for command in ("retry", "cancel"):
            assert "--all" in run(shop, command, status=2).output
            run(shop, command, "--all", "--status", "failed", status=2)
            assert as_json(shop, command, "--all", "--dry-run")["changed"] == 1
        assert shop.statuses() == {"1": "failed"}

    def test_retry_and_cancel(self, shop: Flushing, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr("celery_jetstream.outbox_changes.PATIENCE", 0.0)
        shop.write(*"abc")
        fail(shop, "1", "2")
        assert run(shop, "retry", "--id", "1").stdout == "1 events to be published again\n"
        assert as_json(shop, "cancel", "--status", "failed") == {
            "dry_run": False,
            "changed": 1,
            "in_flight": 0,
        }
        shop.lease("flusher", db_now(60))
        assert "in flight" in run(shop, "cancel", "--key", "c", status=1).stdout
        assert shop.statuses() == {"1": "pending", "2": "cancelled", "3": "pending"}

    def test_prune_and_replay(self, shop: Flushing):
        shop.write(*"abcd")
        assert shop.drain().sent == 4
        assert "4 events would be" in run(shop, "replay", "--since", "1h", "--dry-run").stdout
        assert as_json(shop, "replay", "--since", "1h", "--until", "30m")["sent"] == 0
        result = as_json(shop, "replay", "--since", "2020-01-01T00:00Z", "--type", "order.*")
        assert (result["sent"], result["error"]) == (4, None)
        assert len(shop.stored()) == 8
        shop.api(f"STREAM.DELETE.{shop.stream}")
        said = run(shop, "replay", "--since", "1h", status=1).stdout
        assert "ended early" in said
        assert "--after 0" in said
        shop.change("1", finished_at=db_now(-7200))
        assert run(shop, "prune", "--older-than", "1h", "--dry-run").stdout.startswith("1 sent")
        assert as_json(shop, "prune", "--older-than", "1h")["deleted"] == 1
        assert as_json(shop, "prune")["deleted"] == 0


class TestRelay:
    """The loop, with flushes that are told what to find."""

    def test_no_outage_ends_it_and_each_is_said_once(self, caplog: pytest.LogCaptureFixture):
        away = OutboxUnavailableError("the database is away")
        found = iter(
            [
                FlushResult(sent=2),
                *[away] * 3,
                FlushResult(sent=1),
                *[FlushResult(outage="NATS is away")] * 3,
                ConfigurationError("no tables"),
                RuntimeError("nobody expected it"),
                FlushResult(sent=1),
            ]
        )

        def drain(seconds: float, stop: Callable[[], bool]) -> FlushResult:
            result = next(found, None)
            if result is None:
                relay.stop()
                return FlushResult()
            if isinstance(result, Exception):
                raise result
            return result

        relay = Relay(drain, interval=0.001)
        with caplog.at_level("INFO", "celery_jetstream.relay"):
            relay.run()
        assert relay.sent == 4
        said = [record.getMessage() for record in caplog.records]
        assert said == [
            "the outbox waits for the end of an outage: the database is away",
            "the outbox is published again",
            "the outbox waits for the end of an outage: NATS is away",
            "the relay's flush failed; another follows",
            "the outbox is published again",
        ]

    def test_once_ends_when_nothing_is_due(self):
        found = iter(
            [FlushResult(busy=True), FlushResult(sent=1, more=True), FlushResult(outage="x")]
        )
        relay = Relay(lambda *_: next(found, FlushResult(sent=1)), interval=0.001, once=True)
        relay.run()
        assert relay.sent == 2

    def test_without_tables_it_does_not_start(self):
        def drain(*_: Any) -> FlushResult:
            raise ConfigurationError("no tables")

        with pytest.raises(ConfigurationError):
            Relay(drain).run()


class TestProcesses:
    """Real ones."""

    @pytest.fixture
    def stack(self, make_stack: MakeStack, sqlite: Database) -> Stack:
        return make_stack(jetstream_database_url=sqlite.url, jetstream_outbox_nudge=False)

    def test_relay_publishes_soon_and_stops_soon(self, stack: Stack, shop: Flushing, names: Names):
        process = stack.celery(
            "jetstream", "outbox", "relay", "--interval", "0.05", "--http-address", "0"
        )
        shop.write(*"ab")
        wait_until(lambda: shop.count("sent") == 2, 20, "the first events to be sent")
        shop.write(*"abcde")
        wait_until(lambda: shop.count("sent") == 7, 2, "the next events to be sent")
        assert process.get("/readyz") == process.get("/livez") == (200, "ok\n")
        assert json.loads(process.get("/status")[1])["relay"]["sent"] == 7
        process.send(signal.SIGTERM)
        assert process.wait(5) == 0, process.text()
        assert "Traceback" not in process.text()
        assert shop.leases() == set()

    def test_a_command_in_a_shell(self, stack: Stack, shop: Flushing):
        shop.write("a", "a")
        fail(shop, "1")
        shop.change("2", due_at=PARKED)
        process = stack.celery("jetstream", "outbox", "retry", "--type", "order.*", "--json")
        assert process.wait(20) == 0, process.text()
        last = process.text().strip().splitlines()[-1]
        assert json.loads(last)["changed"] == 1
        assert [row.due_at for row in shop.rows()] == [AT_ONCE, AT_ONCE]
