"""What the doctor decides about facts; each check is made to fire, and to be silent."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from celery_jetstream import doctor
from celery_jetstream.config import Config
from celery_jetstream.facts import (
    Clock,
    DatabaseFacts,
    Facts,
    HandlerFacts,
    OldTransaction,
    Permission,
    ServerFacts,
    TableFacts,
    Unknown,
    WorkerFacts,
    span,
)
from celery_jetstream.findings import Finding
from celery_jetstream.plans import Change, Difference, Plan

DOCS = Path(__file__).parents[2] / "docs/reference/doctor.md"
SETTINGS = {
    "app_name": "desk",
    "destination_app": "hub",
    "database_url": "postgresql://localhost/shop",
}
HANDLER = HandlerFacts(name="shop.on_order", queue="orders", has_inbox=True, time_limit=30)
FLUSH = HandlerFacts(name="celery_jetstream.flush_outbox", queue="celery")
WORKER = WorkerFacts(
    name="w@h",
    queues=("orders", "celery"),
    tasks=frozenset({HANDLER.name, FLUSH.name}),
    pool="prefork",
    concurrency=4,
)
DIRECT = replace(WORKER, name="d@h", queues=())
FLUSHING = replace(WORKER, queues=("celery",))
MADE = {
    "name": "s",
    "storage": "file",
    "discard": "old",
    "max_msgs": -1,
    "max_bytes": -1,
    "num_replicas": 1,
    "duplicate_window": 120 * 10**9,
}
STREAM = {"config": MADE, "state": {"messages": 5, "bytes": 500}}
CONSUMER = {
    "config": {"ack_wait": 30 * 10**9, "max_deliver": -1, "max_ack_pending": 10_000},
    "num_pending": 0,
    "num_ack_pending": 0,
    "num_waiting": 1,
}
DATABASE = DatabaseFacts(
    kind="postgresql",
    version="15",
    durability={"fsync": "on"},
    autovacuum=True,
    tables=(TableFacts(name="jetstream_outbox", live=100, dead=9_000, autovacuum=True),),
    transactions=(OldTransaction(what="the transaction of ann", seconds=3),),
)
BOX: dict[str, Any] = {"used": True, "differences": [], "oldest_due": None, "counts": {}}
WELL: dict[str, Any] = {
    "config": Config(**SETTINGS),
    "celery": {"transport": "redis", "worker_prefetch_multiplier": 4},
    "handlers": (HANDLER,),
    "flush": FLUSH,
    "workers": (WORKER,),
    "server": ServerFacts(name="n1", version="2.15.1", cluster="", max_payload=1024**2),
    "account": {"storage": 10, "limits": {"max_storage": 100}},
    "stream": STREAM,
    "consumers": {"desk-workers": CONSUMER},
    "plan": Plan(()),
    "permissions": (Permission(what="publish events"),),
    "syncs": {"n1": "always"},
    "database": DATABASE,
    "outbox": BOX,
    "inbox": BOX,
    "clocks": {"NATS": Clock(ahead=0.01, within=0.001), "the database": Unknown("none")},
}


def changed(kind: str, action: Any, *differences: Difference) -> Plan:
    change = Change(kind="stream", name="s", action=action, differences=differences, config={})  # type: ignore[arg-type]
    return Plan((change,))


def config(**settings: Any) -> dict[str, Any]:
    return {"config": Config(**{**SETTINGS, **settings})}


def stream(state: Any = None, cluster: Any = None, **made: Any) -> dict[str, Any]:
    return {
        "stream": {
            "config": {**MADE, **made},
            "state": state or STREAM["state"],
            "cluster": cluster,
        }
    }


def consumer(account: Any = None, **made: Any) -> dict[str, Any]:
    found = {**CONSUMER, "config": {**CONSUMER["config"], **made}, **(account or {})}  # type: ignore[dict-item]
    return {"consumers": {"desk-workers": found}}


def server(**values: Any) -> dict[str, Any]:
    return {"server": replace(WELL["server"], **values)}


def celery(**values: Any) -> dict[str, Any]:
    return {"celery": {**WELL["celery"], **values}}


def worker(**values: Any) -> dict[str, Any]:
    return {"workers": (replace(WORKER, **values),)}


def database(**values: Any) -> dict[str, Any]:
    return {"database": replace(DATABASE, **values)}


def outbox(**values: Any) -> dict[str, Any]:
    return {"outbox": {**BOX, **values}}


def table(**values: Any) -> dict[str, Any]:
    return database(tables=(replace(DATABASE.tables[0], **values),))


def found(code: str, **changes: Any) -> list[Finding]:
    (one,) = (check for check in doctor.CHECKS if check.code == code)
    return list(one(Facts(**{**WELL, **changes})))


def handlers(**values: Any) -> dict[str, Any]:
    return {"handlers": (replace(HANDLER, **values),)}


SLOW = 11 * 60
DENIED = Permission(what="settle messages", error="may not publish $JS.ACK.s")
REPLICAS = {"name": "c", "replicas": [{"name": "n2", "current": False}]}
SILENT = {"replicas": [{"name": "n3", "current": True, "active": 6 * 10**9}]}
TTL = {"discard": "new", "max_bytes": 600}
KILLING = {"task_acks_late": True, "task_reject_on_worker_lost": True}
FIRES: list[tuple[str, str, dict[str, Any], str]] = [
    ("server-version", "error", server(version="2.9.9"), "update it to 2.9.10"),
    ("server-version", "error", server(version=""), "no known version"),
    ("server-version", "error", server(version="2.11.0") | config(outbox_atomic=True), "atomic"),
    (
        "permissions",
        "error",
        {"permissions": (DENIED,)},
        "may not publish $JS.ACK.s: settle messages",
    ),
    ("expiry", "error", server(expiries={"the user's JWT": 3600.0}), "JWT expires in 60 min"),
    ("expiry", "warning", server(expiries={"the certificate": 86400.0 * 5}), "expires in 5 d"),
    ("payload-limit", "warning", server(max_payload=65536), "set jetstream_max_payload to 65536"),
    ("payload-limit", "warning", stream(max_msg_size=1000), "max_msg_size is 1000 bytes"),
    ("account-room", "warning", {"account": {"storage": 80, "limits": {"max_storage": 100}}}, "80"),
    ("topology", "error", {"plan": changed("stream", "create")}, "stream s is not there"),
    (
        "topology",
        "warning",
        {"plan": changed("stream", "update", Difference("max_age", 5.0, 9.0))},
        "max_age: 5 s -> 9 s",
    ),
    ("topology", "error", {"plan": "stream 's' exists and cannot be used"}, "cannot be used"),
    ("stream-storage", "error", stream(storage="memory"), "in memory"),
    ("stream-limits", "error", stream(max_msgs=10), "discard is old with max_msgs 10"),
    ("stream-limits", "error", stream(max_msgs_per_subject=1), "max_msgs_per_subject 1"),
    ("stream-limits", "warning", stream(**TTL), "500 of max_bytes 600"),
    ("stream-max-age", "warning", stream(max_age=3600 * 10**9), "max_age is 60 min"),
    ("replicas", "error", config(num_replicas=3), "1 replicas, and jetstream_num_replicas is 3"),
    ("replicas", "warning", stream(num_replicas=3, cluster=REPLICAS), "do not follow: n2"),
    ("replicas", "warning", stream(num_replicas=3, cluster=SILENT), "do not follow: n3"),
    ("replicas", "warning", server(cluster="east"), "1 replica, in the cluster east"),
    ("sync-interval", "warning", {"syncs": {"n1": "120 s"}}, "n1: 120 s; 1 replica"),
    (
        "sync-interval",
        "warning",
        {"syncs": Unknown("not asked")} | server(version="2.9.10"),
        "nats-server 2.9: 120 s",
    ),
    ("duplicate-window", "error", stream(duplicate_window=50 * 10**9), "window is 50 s"),
    ("duplicate-window", "warning", stream(duplicate_window=60 * 10**9), "to 110 or more"),
    ("ack-wait", "error", consumer(ack_wait=10 * 10**9), "server's ack_wait is 10 s"),
    ("ack-wait", "warning", config(ack_wait=2), "jetstream_ack_wait 2 s"),
    ("ack-wait", "warning", config(ack_wait=900, lease=900) | consumer(ack_wait=900 * 10**9), "15"),
    ("consumer-settings", "warning", consumer({"paused": True}), "is paused"),
    ("consumer-settings", "warning", consumer(max_deliver=5), "after 5 deliveries"),
    ("consumer-settings", "warning", consumer(inactive_threshold=5 * 10**9), "unused for 5 s"),
    ("consumer-settings", "warning", consumer(backoff=[1]), "backoff list"),
    ("max-ack-pending", "error", consumer(max_ack_pending=3), "to 16 or more"),
    ("max-ack-pending", "warning", consumer(max_ack_pending=5), "max_ack_pending 5, 4 processes"),
    (
        "takers",
        "error",
        consumer({"num_pending": 7, "num_waiting": 0}),
        "7 messages wait, and nobody asks",
    ),
    ("handlers", "warning", {"handlers": ()}, "knows no handler"),
    ("acks-late", "error", handlers(acks_late=True), "acks_late is on for shop.on_order"),
    ("acks-late", "warning", celery(**KILLING), "task_reject_on_worker_lost"),
    ("always-eager", "warning", celery(task_always_eager=True), "task_always_eager is on"),
    ("visibility-timeout", "warning", celery(visibility_timeout=300), "is 5 min, jetstream_lease"),
    ("visibility-timeout", "warning", handlers(time_limit=7200), "time limit of shop.on_order 2 h"),
    (
        "visibility-timeout",
        "warning",
        celery(task_acks_late=True, task_time_limit=4000),
        "task_time_limit",
    ),
    ("time-limits", "warning", {"flush": replace(FLUSH, soft_time_limit=10)}, "may run for 10 s"),
    ("time-limits", "warning", worker(pool="thread"), "its pool (thread) ends no task"),
    ("prefetch", "warning", celery(worker_prefetch_multiplier=0), "without a limit"),
    ("prefetch", "warning", handlers(time_limit=SLOW), "may run for minutes"),
    ("workers", "warning", {"workers": ()}, "no worker answered"),
    ("handler-queues", "error", worker(queues=("celery",)), "goes to the queue orders"),
    ("handler-tasks", "error", worker(tasks=frozenset()), "does not know shop.on_order"),
    ("flush-queue", "error", worker(queues=("orders",)), "goes to the queue celery"),
    ("schema", "error", outbox(differences=["column x is missing"]), "column x is missing"),
    ("outbox-lag", "error", outbox(oldest_due=90.0), "could go since 90 s, and NATS is there"),
    ("outbox-lag", "error", outbox(oldest_due=90.0) | {"server": Unknown("no")}, "NATS is away"),
    ("outbox-given-up", "warning", outbox(counts={"failed": 2}, parked_keys=1), "2 failed; 1 keys"),
    ("reachable", "error", {"server": Unknown("no connection")}, "NATS: no connection"),
    (
        "reachable",
        "error",
        config(database_url="sqlite://") | {"database": Unknown("it is away")},
        "the database: it is away",
    ),
    ("inbox-retention", "warning", config(inbox_retention=60), "duplicate window of 120 s"),
    ("durability", "error", database(durability={"fsync": "off"}), "fsync is off"),
    ("durability", "warning", database(durability={"synchronous_commit": "off"}), "last commits"),
    ("durability", "error", database(read_only=True), "takes no writes"),
    ("autovacuum", "error", database(autovacuum=False), "off for jetstream_outbox"),
    ("autovacuum", "error", table(autovacuum=False), "off for jetstream_outbox"),
    ("autovacuum", "warning", table(dead=20_000), "20000 dead rows, 100 live"),
    ("autovacuum", "warning", database(autovacuum=None, history=2_000_000), "2000000 undo"),
    (
        "old-transactions",
        "warning",
        database(transactions=(OldTransaction(what="that of ann", seconds=900),)),
        "that of ann is open since 15 min",
    ),
    (
        "clock-skew",
        "warning",
        {"clocks": {"NATS": Clock(ahead=-3, within=0.5)}},
        "NATS's clock is 3.000 s behind this host's, ± 0.500 s",
    ),
    ("clock-skew", "error", {"clocks": {"NATS": Clock(ahead=90, within=0.5)}}, "90.000 s ahead"),
]
#: Without these facts a check is skipped, and says why.
NEEDS = {
    "server-version": "server",
    "permissions": "permissions",
    "account-room": "account",
    "topology": "plan",
    "stream-storage": "stream",
    "sync-interval": "syncs",
    "ack-wait": "consumers",
    "max-ack-pending": "workers",
    "takers": "consumers",
    "acks-late": "handlers",
    "time-limits": "flush",
    "workers": "workers",
    "handler-queues": "workers",
    "schema": "outbox",
    "outbox-lag": "outbox",
    "inbox-retention": "inbox",
    "durability": "database",
    "autovacuum": "database",
}


@pytest.mark.parametrize(
    ("code", "severity", "changes", "text"), FIRES, ids=[f"{f[0]}-{f[3]}" for f in FIRES]
)
def test_a_check_fires(code: str, severity: str, changes: dict[str, Any], text: str) -> None:
    findings = [one for one in found(code, **changes) if one.severity in ("error", "warning")]
    assert [one.severity for one in findings] == [severity]
    (one,) = findings
    assert text in f"{one.found} {one.remedy}"
    assert one.why.endswith((".", ")"))
    assert one.remedy


def test_every_check_is_made_to_fire() -> None:
    assert {code for code, *_ in FIRES} == {check.code for check in doctor.CHECKS}


@pytest.mark.parametrize("code", [check.code for check in doctor.CHECKS])
def test_where_all_is_well_a_check_says_so(code: str) -> None:
    severities = {one.severity for one in found(code)}
    assert severities <= {"ok", "skipped"}
    assert "ok" in severities
    assert not any(one.why or one.remedy for one in found(code))


@pytest.mark.parametrize("code", sorted(NEEDS))
def test_what_is_not_known_skips_a_check(code: str) -> None:
    findings = found(code, **{NEEDS[code]: Unknown("the dog ate it")})
    assert {one.severity for one in findings} <= {"skipped", "ok"}
    assert any("the dog ate it" in one.found for one in findings)


def test_with_every_fact_unknown_only_that_fires() -> None:
    unknown = {name: Unknown("away") for name in WELL if name not in ("config", "celery", "clocks")}
    facts = Facts(**{**WELL, **unknown})
    findings = [finding for check in doctor.CHECKS for finding in check(facts)]
    assert {one.code for one in findings if one.severity not in ("ok", "skipped")} == {"reachable"}


@pytest.mark.parametrize(
    ("code", "changes", "text"),
    [
        ("expiry", server(expiries={"the certificate": 86400.0 * 80}), "expires in 80 d"),
        # a worker of direct mode consumes no queue, and needs none
        ("handler-queues", worker(queues=()), "take the messages themselves"),
        ("handler-queues", worker(queues=("celery",)) | config(direct=True), "themselves"),
        (
            "handler-queues",
            {"workers": (DIRECT, replace(WORKER, queues=("celery",)))},
            "themselves",
        ),
        ("sync-interval", {"syncs": {"n1": "120 s"}} | stream(num_replicas=3), "3 replicas"),
        ("visibility-timeout", celery(transport="amqp", visibility_timeout=1), "has none"),
        ("stream-limits", stream(discard="new", max_bytes=10**9), "refuses, and loses nothing"),
        ("schema", {"outbox": {**BOX, "used": False, "differences": ["x"]}}, "not in use"),
        ("takers", consumer({"num_pending": 7, "num_waiting": 0, "num_ack_pending": 9}), "7 mess"),
        ("takers", consumer({"num_pending": 7, "num_waiting": 0, "push_bound": True}), "7 mess"),
        ("time-limits", handlers(time_limit=None), "no time limit on shop.on_order"),
        ("clock-skew", {"clocks": {"NATS": Clock(ahead=3, within=2.5)}}, "ahead"),
        ("ack-wait", consumer(ack_wait=60 * 10**9), "server's ack_wait is 60 s"),
        ("autovacuum", table(live=100_000, dead=20_000), "20000"),
        ("max-ack-pending", worker(concurrency=None), "0 processes"),
        ("max-ack-pending", worker(queues=("mail",), concurrency=20_000), "0 processes"),
    ],
)
def test_what_is_no_fault(code: str, changes: dict[str, Any], text: str) -> None:
    findings = found(code, **changes)
    assert {one.severity for one in findings} <= {"ok", "skipped"}
    assert any(text in one.found for one in findings)


def test_a_check_that_fails_ends_no_other(caplog: pytest.LogCaptureFixture) -> None:
    strange = Facts(**{**WELL, "stream": {"config": {}}})
    (one,) = doctor._apply(next(c for c in doctor.CHECKS if c.code == "stream-storage"), strange)
    assert (one.severity, one.found) == ("skipped", "the check failed: KeyError('name')")
    assert "stream-storage" in caplog.text


def test_what_others_hide_is_said() -> None:
    (one,) = found("old-transactions", **database(hidden=3))
    assert (one.severity, one.found.split(":")[0]) == (
        "skipped",
        "3 sessions of others are hidden from this user",
    )


def test_the_reference_has_a_row_for_each_code() -> None:
    rows = re.findall(r"^\| `([a-z][a-z-]+)` \|", DOCS.read_text("utf-8"), re.MULTILINE)
    assert rows == [doctor.SETTINGS, *(check.code for check in doctor.CHECKS)]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.25, "0.25 s"), (119, "119 s"), (120, "2 min"), (7200, "2 h"), (7 * 86400, "7 d")],
)
def test_seconds_have_a_unit_that_suits_them(seconds: float, text: str) -> None:
    assert span(seconds) == text
