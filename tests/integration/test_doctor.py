"""``jetstream.doctor()`` with real servers: what it finds out, and that it changes nothing."""

from __future__ import annotations

import json
import ssl
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trustme
from celery import Celery
from click.testing import CliRunner
from sqlalchemy import NullPool, create_engine, text

from celery_jetstream import JetStream, checks_database
from celery_jetstream.cli_doctor import doctor as command
from celery_jetstream.doctor import Report
from celery_jetstream.findings import Finding
from celery_jetstream.handlers import JetStreamTask
from celery_jetstream.testing import NatsServer, free_port
from tests.conftest import Names
from tests.databases import Database
from tests.servers import RedisServer, nats_version, need

IS_OLD = nats_version().startswith("v2.9.")
MakeApp = Callable[..., JetStream]
RESTRICTED = """
accounts { A: { jetstream: enabled, users: [
  { user: admin, password: p }
  { user: app, password: p, permissions: {
      publish: { allow: [">"], deny: ["$JS.ACK.>", "$JS.API.STREAM.UPDATE.>"] }
      subscribe: { allow: [">"], deny: ["$JS.ACK.>"] } } } ] } }
"""


@pytest.fixture
def make_app(names: Names) -> Iterator[MakeApp]:
    apps: list[JetStream] = []

    def make(url: str, broker: str = "memory://", **settings: Any) -> JetStream:
        app = Celery("desk", broker=broker, set_as_current=False)
        app.conf.update(
            jetstream_nats_urls=url,
            jetstream_app_name=names.app_name,
            jetstream_destination_app=names.destination_app,
            jetstream_stream_name=names.stream_name,
            **settings,
        )
        apps.append(JetStream(app))
        return apps[-1]

    yield make
    for app in apps:
        app.close()


def api(app: JetStream, operation: str, **request: Any) -> dict[str, Any]:
    answer: dict[str, Any] = app.connection.run(app._api, operation, request)
    assert "error" not in answer, answer
    return answer


def by_code(report: Report, *severities: str) -> dict[str, str]:
    """Code to all that was found under it."""
    said: dict[str, str] = {}
    for finding in report.findings:
        if finding.severity in (severities or ("error", "warning")):
            said[finding.code] = f"{said.get(finding.code, '')}{finding.found}\n"
    return said


def ill_stream(admin: JetStream, names: Names) -> None:
    """A stream and a consumer as nobody should have them, and a message for us."""
    app, other = names.app_name, names.destination_app
    ours = f"{other}.sync.{app}"
    admin.connection.connect()
    api(
        admin,
        f"STREAM.CREATE.{names.stream_name}",
        name=names.stream_name,
        subjects=[ours, f"{app}.sync.{other}", f"{app}.sync.dlq", f"{other}.sync.dlq"],
        retention="workqueue",
        storage="memory",
        max_msgs=3,
        max_msg_size=5000,
        max_age=3600 * 10**9,
        duplicate_window=10 * 10**9,
    )
    config = {
        "durable_name": f"{names.app_name}-workers",
        "filter_subject": ours,
        "ack_policy": "explicit",
        "ack_wait": 5 * 10**9,
        "max_deliver": 5,
        "max_ack_pending": 1,
        "inactive_threshold": 3600 * 10**9,
    }
    api(
        admin,
        f"CONSUMER.CREATE.{names.stream_name}.{names.app_name}-workers",
        stream_name=names.stream_name,
        config=config,
    )
    result = admin.publish("order.placed", {}, subject=ours)
    assert result.success, result.error


def ill_outbox(app: JetStream, database: Database) -> Any:
    """Tables as nobody should have them, a row that nobody flushes, and a transaction left open."""
    app.outbox.create_tables()
    app.outbox.publish("order.placed", {"id": 1})
    app.outbox.publish("order.placed", {"id": 2})
    engine = create_engine(database.url, poolclass=NullPool)
    with engine.begin() as connection:
        for statement in (
            "UPDATE jetstream_outbox SET created_at = created_at - interval '1 hour'",
            "UPDATE jetstream_outbox SET status = 'failed', finished_at = now() "
            "WHERE id = (SELECT max(id) FROM jetstream_outbox)",
            "ALTER TABLE jetstream_outbox SET (autovacuum_enabled = false)",
            "ALTER TABLE jetstream_outbox DROP COLUMN transaction_id",
        ):
            connection.execute(text(statement))
    left_open = engine.connect()
    left_open.execute(text("SELECT 1"))
    return left_open


def test_it_finds_what_is_ill_and_changes_none_of_it(
    make_app: MakeApp,
    names: Names,
    postgresql: Database,
    redis_server: RedisServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    need("nats")
    monitor = free_port()
    with NatsServer(config=RESTRICTED, arguments=("--http_port", str(monitor))) as server:
        admin = make_app(server.url, jetstream_nats_options={"user": "admin", "password": "p"})
        ill_stream(admin, names)
        app = make_app(
            server.url,
            redis_server.url,
            jetstream_nats_options={"user": "app", "password": "p"},
            jetstream_database_url=postgresql.url,
            jetstream_num_replicas=3,
            jetstream_use_outbox=True,
            jetstream_outbox_nudge=False,
            task_always_eager=True,
        )
        left_open = ill_outbox(app, postgresql)
        where = f"{names.stream_name}.{names.app_name}-workers"
        before = (
            api(admin, f"STREAM.INFO.{names.stream_name}"),
            api(admin, f"CONSUMER.INFO.{where}"),
        )
        monkeypatch.setattr(checks_database, "OLD", 0.0)
        began = time.monotonic()
        report = app.doctor(monitor=f"http://127.0.0.1:{monitor}")
        assert time.monotonic() - began < 8
        after = (
            api(admin, f"STREAM.INFO.{names.stream_name}"),
            api(admin, f"CONSUMER.INFO.{where}"),
        )
        left_open.close()

    for old, new in zip(before, after, strict=True):
        assert {**old, "ts": ""} == {**new, "ts": ""}
    found = by_code(report)
    assert found["permissions"].count("\n") == 3, "what is allowed is not said"
    for denied in (
        "may not publish to $JS.ACK.",
        f"may not publish to $JS.API.STREAM.UPDATE.{names.stream_name}: making the stream",
        "may not subscribe to $JS.ACK.",
    ):
        assert denied in found["permissions"]
    for code, words in {
        "payload-limit": "max_msg_size is 5000 bytes",
        "topology": "storage must be file, found memory",
        "stream-storage": "in memory",
        "stream-limits": "discard is old with max_msgs 3",
        "stream-max-age": "max_age is 60 min",
        "replicas": "1 replicas, and jetstream_num_replicas is 3",
        "sync-interval": ": 120 s; 1 replica",
        "duplicate-window": "window is 10 s",
        "ack-wait": "the server's ack_wait is 5 s, jetstream_ack_wait 30 s",
        "consumer-settings": "after 5 deliveries",
        "takers": "1 messages wait, and nobody asks",
        "always-eager": "task_always_eager",
        "workers": "no worker answered",
        "schema": "column jetstream_outbox.transaction_id is missing",
        "outbox-lag": "could go since 60 min, and NATS is there",
        "outbox-given-up": "1 failed",
        "durability": "fsync is off",
        "autovacuum": "off for jetstream_outbox",
        "old-transactions": "idle in transaction",
    }.items():
        assert words in found[code], code
    clocks = by_code(report, "ok")["clock-skew"]
    assert "the database's clock is 0.0" in clocks
    assert ("NATS's clock is 0.0" in clocks) is not IS_OLD
    assert "the check failed" not in str(report)


def test_what_is_away_is_skipped_in_bounded_time(make_app: MakeApp) -> None:
    app = make_app(
        "nats://user:seCret@127.0.0.1:1",
        "redis://:seCret@127.0.0.1:1/0",
        jetstream_database_url="postgresql+psycopg://user:seCret@127.0.0.1:1/shop",
    )
    began = time.monotonic()
    report = app.doctor(timeout=4)
    assert time.monotonic() - began < 6
    said = by_code(report, "skipped")
    assert "no connection to NATS at nats://***@127.0.0.1:1" in said["permissions"]
    assert "the Celery broker is away" in said["workers"]
    assert "is away" in said["schema"]
    assert "give --monitor" in said["sync-interval"]
    assert {finding.code for finding in report.errors} == {"reachable"}
    assert len(report.errors) == 2, "NATS and the database"
    assert "seCret" not in json.dumps(report.as_dict())


def test_a_hung_server_is_not_waited_for(make_app: MakeApp) -> None:
    need("nats")
    with NatsServer() as server:
        app = make_app(server.url)
        app.connection.connect()
        server.pause()
        began = time.monotonic()
        report = app.doctor(timeout=1)
        assert time.monotonic() - began < 2
        assert by_code(report, "skipped")["topology"]
        server.resume()


@pytest.mark.parametrize("kind", ["mariadb", "sqlite"])
def test_each_database_is_looked_at(
    request: pytest.FixtureRequest, make_app: MakeApp, nats_server: NatsServer, kind: str
) -> None:
    database: Database = request.getfixturevalue(kind)
    app = make_app(
        nats_server.url,
        jetstream_database_url=database.url,
        jetstream_use_inbox=True,
        jetstream_inbox_retention="1m",
    )
    app.provision()
    app.inbox.create_tables()
    report = app.doctor()
    fine, found = by_code(report, "ok"), by_code(report)
    assert "the inbox's tables are as they must be" in fine["schema"]
    assert "outbox is not in use" in fine["schema"]
    assert "none is older" in fine["old-transactions"]
    assert "duplicate window of 120 s" in found["inbox-retention"]
    assert {"mariadb": "InnoDB has", "sqlite": "leaves none"}[kind] in fine["autovacuum"]
    assert {"mariadb": "sync_binlog", "sqlite": "journal_mode wal"}[kind] in fine["durability"]
    assert "the check failed" not in str(report)


def test_an_old_server_is_looked_at_too(make_app: MakeApp, old_nats_server: NatsServer) -> None:
    app = make_app(old_nats_server.url)
    app.provision()
    report = app.doctor()
    assert "none refused" in by_code(report, "ok")["permissions"]
    assert "nats-server 2.9: 120 s" in by_code(report, "warning")["sync-interval"]
    assert "does not say what time it has" in by_code(report, "skipped")["clock-skew"]
    assert report.errors == []


@pytest.mark.skipif(IS_OLD, reason="nats-server 2.9 pauses none")
def test_a_paused_consumer_is_found(
    make_app: MakeApp, nats_server: NatsServer, names: Names
) -> None:
    app = make_app(nats_server.url)
    app.provision()
    until = (datetime.now(timezone.utc) + timedelta(hours=1)).isoformat()
    api(app, f"CONSUMER.PAUSE.{names.stream_name}.{names.app_name}-workers", pause_until=until)
    assert "is paused" in by_code(app.doctor())["consumer-settings"]


def test_a_certificate_that_expires_soon_is_found(make_app: MakeApp, tmp_path: Path) -> None:
    need("nats")
    authority, context = trustme.CA(), ssl.create_default_context()
    authority.configure_trust(context)
    soon = datetime.now(timezone.utc) + timedelta(days=3, minutes=5)
    certificate = authority.issue_cert("127.0.0.1", not_after=soon)
    certificate.private_key_pem.write_to_path(tmp_path / "key.pem")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    files = f'cert_file: "{tmp_path / "cert.pem"}", key_file: "{tmp_path / "key.pem"}"'
    with NatsServer(config=f"tls {{ {files} }}") as server:
        report = make_app(server.url, jetstream_nats_options={"tls": context}).doctor()
    assert by_code(report)["expiry"] == "the server's certificate expires in 3 d\n"


def test_wrong_settings_are_the_first_thing_said(make_app: MakeApp) -> None:
    report = make_app("nats://127.0.0.1:1", jetstream_ack_wait="soon").doctor()
    (finding,) = report.findings
    assert (finding.code, finding.severity) == ("settings", "error")
    assert "jetstream_ack_wait" in finding.found


def test_handlers_that_cannot_be_used_are_said_beside_the_rest(make_app: MakeApp) -> None:
    app = make_app("nats://127.0.0.1:1").app

    def handle(event: Any) -> None: ...

    for name in ("one", "two"):  # jetstream_handler would give them to other tests' apps, too
        options = {"base": JetStreamTask, "event_types": ("a",), "acks_late": False}
        app.task(name=name, shared=False, **options)(handle)
    report = app.jetstream.doctor(timeout=0.5)
    assert "two handlers for the event type 'a'" in by_code(report, "error")["settings"]
    assert by_code(report, "ok")["handlers"] == "2: one, two\n"


# -- the command -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("severities", "arguments", "expected"),
    [
        ((), (), 0),
        (("warning", "skipped", "ok"), (), 0),
        (("warning",), ("--strict",), 1),
        (("ok", "skipped", "skipped"), ("--strict",), 0),
        (("error",), (), 1),
        (("error",), ("--json",), 1),
    ],
)
def test_its_exit_status(
    make_app: MakeApp,
    monkeypatch: pytest.MonkeyPatch,
    severities: tuple[Any, ...],
    arguments: tuple[str, ...],
    expected: int,
) -> None:
    app = make_app("nats://127.0.0.1:1")
    findings = tuple(Finding("takers", s, f"what {s} found", "Why.", "Do.") for s in severities)
    monkeypatch.setattr(JetStream, "doctor", lambda *_, **__: Report(findings))
    ended = CliRunner().invoke(command, arguments, obj=SimpleNamespace(app=app.app))
    assert ended.exit_code == expected, ended.output
    if "--json" in arguments:
        assert json.loads(ended.output)["healthy"] is False
    else:
        for severity in severities:
            assert ended.output.count(f"what {severity} found") == 1, "those alike in one line"
        assert ended.output.count("Why.") == (1 if severities else 0)
