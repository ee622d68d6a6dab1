"""Settings: every default, every good form, every bad value, and the ways they reach Celery."""

from __future__ import annotations

import dataclasses
import json
import re
import ssl
import types
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from celery import Celery
from celery.exceptions import ImproperlyConfigured
from sqlalchemy import create_engine, make_url
from sqlalchemy.orm import sessionmaker

from celery_jetstream.config import Config
from celery_jetstream.consumers import consumer_specs
from celery_jetstream.exceptions import ConfigurationError
from celery_jetstream.readers import duration, error_classes
from celery_jetstream.sources import Source

NAMES = {"app_name": "api", "destination_app": "worker"}
SECRETS = ("s3cr3t", "alice")


class ShopError(Exception):
    """Named by dotted path in the tests."""


def make_app(**settings: Any) -> Celery:
    app = Celery("test", set_as_current=False)
    app.conf.update({f"jetstream_{name}": value for name, value in settings.items()})
    return app


def read(environ: dict[str, str] | None = None, **settings: Any) -> Config:
    return Config.from_app(make_app(**{**NAMES, **settings}), environ or {})


def refusal(environ: dict[str, str] | None = None, **settings: Any) -> ConfigurationError:
    with pytest.raises(ConfigurationError) as caught:
        read(environ, **settings)
    error = caught.value
    assert error.__cause__ is None
    assert error.__context__ is None  # what urlsplit and importers say may hold a password
    return error


# ── defaults ─────────────────────────────────────────────────────────────────

DEFAULTS: dict[str, object] = {
    "nats_urls": ("nats://localhost:4222",),
    "nats_options": {},
    "connect_retry_attempts": 3,
    "connect_retry_delay": 2.0,
    "lazy_connect": False,
    "app_name": "api",
    "destination_app": "worker",
    "stream_name": "jetstream-bridge-stream",
    "sources": (Source("worker"),),
    "auto_provision": True,
    "num_replicas": None,
    "duplicate_window": None,
    "max_age": None,
    "max_payload": 1_048_576,
    "ack_wait": 30.0,
    "lease": 600.0,
    "max_hold": 3600.0,
    "batch_size": 256,
    "consumer_mode": "pull",
    "delivery_subject": None,
    "max_ack_pending": 10_000,
    "direct": False,
    "metrics": False,
    "metrics_address": None,
    "max_deliver": 5,
    "backoff": (1.0, 5.0, 15.0, 30.0, 60.0),
    "unrecoverable_errors": (TypeError, ValueError, NameError, AttributeError),
    "outage_errors": (),
    "use_dlq": True,
    "max_redrives": 3,
    "no_dlq_action": None,
    "use_outbox": False,
    "database_url": None,
    "session_factory": None,
    "outbox_model": None,
    "outbox_table": "jetstream_outbox",
    "outbox_schema": None,
    "use_inbox": False,
    "inbox_model": None,
    "inbox_table": "jetstream_inbox",
    "inbox_schema": None,
    "inbox_lease": 60.0,
    "inbox_retention": 2592000.0,
    "inbox_queue": None,
    "inbox_beat": True,
    "health_cache_ttl": 30.0,
    "http_address": None,
    "outbox_batch_size": 1000,
    "outbox_lease": 30.0,
    "outbox_flush_interval": 5.0,
    "outbox_max_seconds": 20.0,
    "outbox_queue": None,
    "outbox_beat": True,
    "outbox_beat_name": "celery_jetstream.flush_outbox",
    "outbox_nudge": True,
    "outbox_retention": 86_400.0,
    "outbox_atomic": False,
    "outbox_on_failure": "park",
    "outbox_max_attempts": 10,
    "outbox_max_age": 3600.0,
    "outbox_no_stream_grace": 60.0,
}


def test_defaults() -> None:
    config = read()
    assert {field.name: getattr(config, field.name) for field in dataclasses.fields(config)} == (
        DEFAULTS
    )
    assert config == Config(**NAMES)
    assert hash(config) == hash(Config(**NAMES))


@pytest.mark.parametrize("name", [name for name in DEFAULTS if name not in NAMES])
def test_none_counts_as_not_set(name: str) -> None:
    assert getattr(read(**{name: None}), name) == DEFAULTS[name]
    assert getattr(Config(**{**NAMES, name: None}), name) == DEFAULTS[name]


def test_derived_names() -> None:
    config = read()
    assert config.publish_subject == "api.sync.worker"
    assert config.consume_subjects == ("worker.sync.api",)
    assert config.dead_letter_subject == "api.sync.dlq"
    assert config.subjects == (
        "api.sync.worker",
        "worker.sync.api",
        "api.sync.dlq",
        "worker.sync.dlq",
    )
    assert config.payload_limit == 1_048_576 - 4096


def test_a_config_is_frozen() -> None:
    config = read(nats_options={"name": "n"})
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.ack_wait = 1.0  # type: ignore[misc]
    with pytest.raises(TypeError):
        config.nats_options["name"] = "other"  # type: ignore[index]
    with pytest.raises(TypeError):
        Config("api")  # type: ignore[misc]
    assert not hasattr(config, "__dict__")


def test_a_config_built_without_an_app_is_checked_too() -> None:
    assert Config(**NAMES, ack_wait="5s").ack_wait == 5.0  # type: ignore[arg-type]
    assert dataclasses.replace(Config(**NAMES), max_deliver=7).max_deliver == 7
    with pytest.raises(ConfigurationError, match="jetstream_ack_wait=0"):
        dataclasses.replace(Config(**NAMES), ack_wait=0)


# ── good forms ───────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (30, 30.0),
        (0.25, 0.25),
        (0, 0.0),
        (timedelta(minutes=5), 300.0),
        ("30", 30.0),
        (" 30s ", 30.0),
        ("5m", 300.0),
        ("500ms", 0.5),
        ("1h", 3600.0),
        ("2d", 172_800.0),
        ("1.5s", 1.5),
        (".5 s", 0.5),
    ],
)
def test_durations(value: object, seconds: float) -> None:
    result = duration(value)
    assert (result, type(result)) == (seconds, float)


@pytest.mark.parametrize(
    "value",
    [
        *(True, False, None, "", "soon", "5 minutes", "-5s", "1h30m", "٣s", "1e3", [5], b"5s"),
        *(-1, -0.001, timedelta(seconds=-1), float("nan"), float("inf"), 10**400, "9" * 400),
    ],
)
def test_no_durations(value: object) -> None:
    with pytest.raises(ValueError, match="must be"):
        duration(value)


def test_error_classes() -> None:
    name = f"{__name__}.ShopError"
    both = (ShopError, KeyError)
    assert error_classes([name, KeyError]) == both
    assert error_classes(f"{__name__}:ShopError, KeyError") == both
    assert error_classes(()) == ()


GOOD: list[tuple[str, object, object]] = [
    ("nats_urls", "localhost", ("nats://localhost:4222",)),
    ("nats_urls", "localhost:4223", ("nats://localhost:4223",)),
    ("nats_urls", "NATS://Host:", ("nats://Host:4222",)),
    ("nats_urls", "nats://a:1/", ("nats://a:1",)),
    ("nats_urls", "tls://a, b:5 ,", ("tls://a:4222", "nats://b:5")),
    ("nats_urls", ["nats://a:1", "b"], ("nats://a:1", "nats://b:4222")),
    ("nats_urls", ("nats://u:p,w@a:1",), ("nats://u:p,w@a:1",)),  # a list is not split further
    ("nats_urls", "u:p@a:1", ("nats://u:p@a:1",)),
    ("nats_urls", "nats://token@a", ("nats://token@a:4222",)),
    ("nats_urls", "[::1]", ("nats://[::1]:4222",)),
    ("nats_urls", "wss://a/nats,ws://b:80", ("wss://a/nats", "ws://b:80")),
    ("nats_options", {"user": "u", "password": None}, {"user": "u"}),
    ("nats_options", {"connect_timeout": "5s", "ping_interval": 20},
     {"connect_timeout": 5.0, "ping_interval": 20.0}),
    ("nats_options", {"dont_randomize": True, "max_outstanding_pings": 3, "pending_size": 0},
     {"dont_randomize": True, "max_outstanding_pings": 3, "pending_size": 0}),
    ("nats_options", {"token": len, "signature_cb": repr}, {"token": len, "signature_cb": repr}),
    ("nats_options", {"user_credentials": ("a.jwt", "a.nk")},
     {"user_credentials": ("a.jwt", "a.nk")}),
    ("connect_retry_attempts", 1, 1),
    ("connect_retry_delay", 0, 0.0),
    ("direct", True, True),
    ("metrics", "on", True),
    ("metrics_address", 9464, ("127.0.0.1", 9464)),
    ("metrics_address", ":9464", ("127.0.0.1", 9464)),
    ("metrics_address", "[::]:9464", ("::", 9464)),
    ("lazy_connect", True, True),
    ("lazy_connect", "no", False),
    ("auto_provision", 0, False),
    ("auto_provision", "True", True),
    ("app_name", "my-app_2", "my-app_2"),
    ("destination_app", "b", "b"),
    ("stream_name", "EVENTS", "EVENTS"),
    ("sources", "b, c", (Source("b"), Source("c"))),
    ("sources", {"b": None, "c": {"batch_size": "7"}}, (Source("b"), Source("c", batch_size=7))),
    ("consumer_mode", "push", "push"),
    ("delivery_subject", "to.me", "to.me"),
    ("num_replicas", 5, 5),
    ("duplicate_window", "2m", 120.0),
    ("max_age", timedelta(days=7), 604_800.0),
    ("max_payload", 16_384, 16_384),
    ("max_payload", "67108864", 67_108_864),
    ("ack_wait", "0.1s", 0.1),
    ("ack_wait", 600, 600.0),
    ("lease", 30, 30.0),
    ("max_hold", "2h", 7200.0),
    ("batch_size", 10_000, 10_000),
    ("max_ack_pending", 1, 1),
    ("max_deliver", 1, 1),
    ("max_redrives", 0, 0),
    ("backoff", [0], (0.0,)),
    ("backoff", ("1s", 2, timedelta(hours=24)), (1.0, 2.0, 86_400.0)),
    ("backoff", "1s, 5s", (1.0, 5.0)),
    ("unrecoverable_errors", [], ()),
    ("unrecoverable_errors", [f"{__name__}.ShopError"], (ShopError,)),
    ("outage_errors", "ConnectionError", (ConnectionError,)),
    ("use_dlq", "yes", True),
    ("no_dlq_action", "log_and_term", "log_and_term"),
    ("use_outbox", "no", False),
    ("database_url", "postgresql+psycopg://u:p@h/shop?a=b", "postgresql+psycopg://u:p@h/shop?a=b"),
    ("database_url", "mysql+pymysql://h/shop", "mysql+pymysql://h/shop"),
    ("database_url", "mariadb+mariadbconnector://h/shop", "mariadb+mariadbconnector://h/shop"),
    ("database_url", "sqlite:////tmp/shop.db", "sqlite:////tmp/shop.db"),
    ("database_url", make_url("sqlite:///a"), "sqlite:///a"),
    ("database_url", make_url("postgresql://u:p%40@h/shop"), "postgresql://u:p%40@h/shop"),
    ("session_factory", " shop.db.Session ", "shop.db.Session"),
    ("session_factory", "shop.db:Session", "shop.db:Session"),
    ("session_factory", ShopError, ShopError),
    ("outbox_model", "shop.models.ShopOutbox", "shop.models.ShopOutbox"),
    ("outbox_model", ShopError, ShopError),
    ("outbox_table", "shop_Outbox2", "shop_Outbox2"),
    ("outbox_schema", "events", "events"),
    ("use_inbox", "no", False),
    ("inbox_model", "shop.models.ShopInbox", "shop.models.ShopInbox"),
    ("inbox_table", "incoming", "incoming"),
    ("inbox_schema", "events", "events"),
    ("inbox_lease", "2m", 120.0),
    ("inbox_retention", "7d", 604_800.0),
    ("inbox_queue", "rare", "rare"),
    ("inbox_beat", "off", False),
    ("health_cache_ttl", 0, 0.0),
    ("http_address", 8080, ("127.0.0.1", 8080)),
    ("http_address", "0", ("127.0.0.1", 0)),
    ("http_address", ":8080", ("127.0.0.1", 8080)),
    ("http_address", "0.0.0.0:8080", ("0.0.0.0", 8080)),
    ("http_address", "[::1]:8080", ("::1", 8080)),
    ("http_address", "bridge.local:80", ("bridge.local", 80)),
    ("outbox_batch_size", "10000", 10_000),
    ("outbox_lease", "1m", 60.0),
    ("outbox_flush_interval", "100ms", 0.1),
    ("outbox_max_seconds", "1h", 3600.0),
    ("outbox_queue", " outbox ", "outbox"),
    ("outbox_beat", "off", False),
    ("outbox_beat_name", "sweep", "sweep"),
    ("outbox_nudge", 0, False),
    ("outbox_atomic", "on", True),
    ("outbox_retention", 0, 0.0),
    ("outbox_on_failure", "skip", "skip"),
    ("outbox_max_attempts", 1, 1),
    ("outbox_max_age", 0, 0.0),
    ("outbox_no_stream_grace", "0s", 0.0),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "expected"), GOOD)
def test_good_values(name: str, value: object, expected: object) -> None:
    config = read(**{name: value})
    assert getattr(config, name) == expected
    assert dataclasses.replace(config) == config  # what was read can be read again


def test_a_summary_is_plain_and_has_no_credentials() -> None:
    summary = read(
        nats_urls="nats://alice:s3cr3t@a:1,nats://b:2",
        nats_options={"password": "s3cr3t", "token": "s3cr3t", "ping_interval": 2},
        database_url="postgresql+psycopg://alice:s3cr3t@host/shop?password=s3cr3t",
        http_address="8080",
    ).summary()
    assert summary.keys() == DEFAULTS.keys()
    text = json.dumps(summary)
    assert "s3cr3t" not in text
    assert (summary["nats_urls"], summary["http_address"]) == (
        ["nats://***@a:1", "nats://b:2"],
        ["127.0.0.1", 8080],
    )
    assert (summary["app_name"], summary["backoff"][0]) == ("api", 1.0)


def test_every_setting_is_in_the_tables() -> None:
    assert {name for name, _, _ in BAD} == set(DEFAULTS)
    assert {name for name, _, _ in GOOD} == set(DEFAULTS)


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, False),
        ({"nats_urls": "nats://a,tls://b"}, True),
        ({"nats_urls": "wss://a"}, True),
        ({"nats_urls": "ws://tls:x@a"}, False),
        ({"nats_options": {"tls": ssl.create_default_context()}}, True),
        ({"nats_options": {"tls": None}}, False),
    ],
)
def test_tls_wanted(settings: dict[str, Any], wanted: bool) -> None:
    assert read(**settings).tls_wanted is wanted


# ── bad values: setting, value and remedy ────────────────────────────────────

BAD: list[tuple[str, object, str]] = [
    ("nats_urls", "", "must name one server or more"),
    ("nats_urls", " , ", "must name one server or more"),
    ("nats_urls", [], "must name one server or more"),
    ("nats_urls", ["nats://a", ""], "not blank"),
    ("nats_urls", [b"nats://a"], "must be text"),
    ("nats_urls", {"nats://a"}, "must be a list"),
    ("nats_urls", 4222, "must be a list"),
    ("nats_urls", "redis://a:6379", "the scheme must be nats, tls, ws or wss"),
    ("nats_urls", "nats://a:port", "the port must be a number"),
    ("nats_urls", "nats://a:70000", "the port must be a number"),
    ("nats_urls", "nats://a:0", "scheme://host:port"),
    ("nats_urls", "nats://", "scheme://host:port"),
    ("nats_urls", "nats://:4222", "scheme://host:port"),
    ("nats_urls", "nats://a/path", "scheme://host:port"),
    ("nats_urls", "nats://a?tls=1", "scheme://host:port"),
    ("nats_urls", "nats://a b", "scheme://host:port"),
    ("nats_urls", "nats://[::1", "the port must be a number"),
    ("nats_urls", "nats://a\r\nPING", "control characters"),
    ("nats_urls", "nats://a,ws://b", "cannot be mixed"),
    ("nats_options", "token", "must be a dict"),
    ("nats_options", [("user", "u")], "must be a dict"),
    ("nats_options", {"servers": "nats://a"}, "servers: the connection supervisor sets this"),
    ("nats_options", {"allow_reconnect": 1}, "the connection supervisor sets this"),
    ("nats_options", {"max_reconnect_attempts": 1}, "the connection supervisor sets this"),
    ("nats_options", {"reconnect_time_wait": 1}, "the connection supervisor sets this"),
    ("nats_options", {"reconnect_to_server_handler": 1}, "the connection supervisor sets this"),
    ("nats_options", {"closed_cb": print}, "closed_cb: the connection supervisor sets this"),
    ("nats_options", {"no_echo": True}, "the connection supervisor sets this"),
    ("nats_options", {"verbose": True}, "the connection supervisor sets this"),
    ("nats_options", {"pedantic": True}, "the connection supervisor sets this"),
    ("nats_options", {"pasword": "x"}, "pasword is not an option that can be set; did you mean pa"),
    ("nats_options", {"xyz": 1}, "the options are connect_timeout, dont_randomize"),
    ("nats_options", {1: 1}, "1 is not an option"),
    ("nats_options", {"connect_timeout": 0}, "connect_timeout must be between 0.1s and 1h"),
    ("nats_options", {"ping_interval": "often"}, "ping_interval must be seconds"),
    ("nats_options", {"tls": True}, "tls must be an ssl.SSLContext"),
    ("nats_options", {"password": 12345}, "password must be text"),
    ("nats_options", {"name": ""}, "name must be text"),
    ("connect_retry_attempts", 0, "between 1 and"),
    ("connect_retry_delay", -1, "not below 0"),
    ("connect_retry_delay", "2h", "between 0s and 1h"),
    ("direct", "perhaps", "must be True or False"),
    ("metrics", "some", "must be True or False"),
    ("metrics_address", "9464/metrics", "must be a port"),
    ("metrics_address", "localhost:99999", "must be a port"),
    ("lazy_connect", "maybe", "must be True or False"),
    ("lazy_connect", "", "must be True or False"),
    ("auto_provision", 2, "must be True or False"),
    ("use_dlq", [], "must be True or False"),
    ("app_name", "", "must be set, and not empty; a good value is"),
    ("app_name", "a.b", "use 1 to 255 letters"),
    ("app_name", "a*", "use 1 to 255 letters"),
    ("app_name", ">", "use 1 to 255 letters"),
    ("app_name", "a b", "use 1 to 255 letters"),
    ("app_name", "dlq", "dead-letter subject"),
    ("app_name", 7, "use 1 to 255 letters"),
    ("app_name", "a" * 250, "use 1 to 255 letters|too long for a subject"),
    ("destination_app", "a\nb", "use 1 to 255 letters"),
    ("stream_name", "", "must be set, and not empty"),
    ("sources", 7, "must be a list, or text with commas"),
    ("sources", ["b", "b"], "must name each app once"),
    ("sources", ["a b"], "a source 'a b' is not legal: use 1 to 255 letters"),
    ("sources", {"b": {"batchsize": 1}}, "b: batchsize is not .* did you mean batch_size"),
    ("sources", {"b": {"batch_size": 0}}, "b: batch_size must be a whole number between 1"),
    ("sources", {"b": 3}, "b: must be a dict with batch_size or max_ack_pending"),
    ("consumer_mode", "pushy", "must be"),
    ("delivery_subject", "$JS.x", "belong to the server"),
    ("stream_name", "a.b", "use 1 to 255 bytes"),
    ("num_replicas", 0, "between 1 and 5"),
    ("num_replicas", 6, "between 1 and 5"),
    ("duplicate_window", 0, "between 0.1s and"),
    ("duplicate_window", "week", "must be seconds"),
    ("max_age", 0, "None to keep messages for ever"),
    ("max_payload", 16_383, "between 16384 and 67108864"),
    ("max_payload", 67_108_865, "between 16384 and 67108864"),
    ("max_payload", "1MB", "must be a whole number"),
    ("ack_wait", 0, "between 0.1s and 24h; a good value is 30"),
    ("ack_wait", "25h", "between 0.1s and 24h"),
    ("ack_wait", True, "must be seconds"),
    ("ack_wait", float("nan"), "finite"),
    ("ack_wait", float("inf"), "finite"),
    ("ack_wait", -5, "not below 0"),
    ("lease", 0, "between 0.1s and 30d"),
    ("max_hold", 0, "between 0.1s and 30d"),
    ("batch_size", 0, "between 1 and 10000"),
    ("batch_size", 10_001, "between 1 and 10000"),
    ("max_ack_pending", 0, "between 1 and"),
    ("max_ack_pending", -1, "whole stream would move to Celery's broker"),
    ("max_redrives", -1, "between 0 and"),
    ("max_deliver", 0, "between 1 and"),
    ("max_deliver", -1, "between 1 and"),
    ("max_deliver", True, "must be a whole number"),
    ("max_deliver", 2.5, "must be a whole number"),
    ("max_deliver", "9" * 5000, "a good value is 5"),
    ("backoff", [], "must hold one duration or more"),
    ("backoff", "", "must hold one duration or more"),
    ("backoff", 5, "must be a list"),
    ("backoff", {1, 2}, "must be a list"),
    ("backoff", [1, -1], "not below 0"),
    ("backoff", [1, True], "must be seconds"),
    ("backoff", [1, "25h"], "between 0s and 24h"),
    ("unrecoverable_errors", ValueError, "must be a list"),
    ("unrecoverable_errors", [int], "subclass of Exception"),
    ("unrecoverable_errors", [SystemExit], "subclass of Exception"),
    ("unrecoverable_errors", [ValueError()], "subclass of Exception"),
    ("unrecoverable_errors", ["no.such.Error"], "no.such.Error cannot be imported .ModuleNotFound"),
    ("unrecoverable_errors", [f"{__name__}.Gone"], "Gone cannot be imported .AttributeError"),
    ("unrecoverable_errors", ["NoSuchError"], "NoSuchError cannot be imported"),
    ("unrecoverable_errors", ["."], "cannot be imported"),
    ("outage_errors", [f"{__name__}.BAD"], "subclass of Exception"),
    ("use_outbox", "perhaps", "must be True or False"),
    ("database_url", "shop.db", "must be a database URL"),
    ("database_url", 5, "must be a database URL"),
    ("database_url", "oracle://h/shop", "PostgreSQL, MariaDB, MySQL or SQLite"),
    ("database_url", "postgres://h/shop", "PostgreSQL, MariaDB, MySQL or SQLite"),
    ("database_url", "postgresql+asyncpg://h/shop", "its driver is asynchronous"),
    ("database_url", "sqlite+aiosqlite:///shop.db", "its driver is asynchronous"),
    ("database_url", "mysql+aiomysql://h/shop", "its driver is asynchronous"),
    ("session_factory", 5, "something to call, or its dotted name"),
    ("session_factory", "Session", "something to call, or its dotted name"),
    ("outbox_model", "shop models.Outbox", "something to call, or its dotted name"),
    ("outbox_table", "", "must be letters, digits"),
    ("outbox_table", "outbox; DROP TABLE orders", "must be letters, digits"),
    ("outbox_table", "o" * 49, "at most 48"),
    ("outbox_schema", "a.b", "must be letters, digits"),
    ("use_inbox", "perhaps", "must be True or False"),
    ("inbox_model", "shop models.Inbox", "something to call, or its dotted name"),
    ("inbox_table", "inbox; DROP TABLE orders", "must be letters, digits"),
    ("inbox_schema", "a.b", "must be letters, digits"),
    ("inbox_lease", "0.5s", "between 1s and 1h"),
    ("inbox_retention", 0, "between 1m and 36500d"),
    ("inbox_queue", "a\nb", "must be text"),
    ("inbox_beat", 3, "must be True or False"),
    ("health_cache_ttl", "2h", "between 0s and 1h"),
    *(
        ("http_address", bad, "must be a port, :port, host:port or")
        for bad in (True, "", "host", "::1:8080", 65536, "http://a:1", "a b:1", -1, "[::1]")
    ),
    ("outbox_batch_size", 0, "between 1 and 10000"),
    ("outbox_lease", 0.5, "between 1s and 1h"),
    ("outbox_lease", 120.0, "below jetstream_duplicate_window"),
    ("outbox_flush_interval", 0, "between 0.1s and 1h"),
    ("outbox_max_seconds", 0, "between 0.1s and 1h"),
    ("outbox_queue", " ", "must be text"),
    ("outbox_beat", 3, "must be True or False"),
    ("outbox_beat_name", "a\nb", "must be text"),
    ("outbox_nudge", "never", "must be True or False"),
    ("outbox_atomic", 2, "must be True or False"),
    ("outbox_retention", -1, "not below 0"),
    ("outbox_on_failure", "wait", "must be one of 'park', 'skip'"),
    ("outbox_max_attempts", 0, "between 1 and"),
    ("outbox_max_age", "a while", "must be seconds"),
    ("outbox_no_stream_grace", "31d", "between 0s and 30d"),
    ("no_dlq_action", "drop", "no such action; a good value is \"log_and_term\""),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "message"), BAD)
def test_bad_values(name: str, value: object, message: str) -> None:
    error = refusal(**{name: value})
    assert isinstance(error, ImproperlyConfigured)
    assert error.setting == f"jetstream_{name}"
    assert str(error).startswith(f"jetstream_{name}=")
    assert re.search(message, str(error))
    if name not in ("nats_urls", "nats_options", "database_url") and len(repr(value)) < 200:
        assert f"jetstream_{name}={value!r}" in str(error)


@pytest.mark.parametrize(
    ("settings", "setting", "message"),
    [
        (
            {"destination_app": "api"},
            "app_name",
            "app_name='api', jetstream_destination_app='api': must differ",
        ),
        (
            {"app_name": "a" * 125, "destination_app": "b" * 125},
            "app_name",
            "at most 240 characters",
        ),
        (
            {"lease": 10},
            "lease",
            r"jetstream_lease=10\.0, jetstream_ack_wait=30\.0: .* for example \"10m\"",
        ),
        (
            {"duplicate_window": "3h", "max_age": "1h"},
            "duplicate_window",
            "=10800.0, jetstream_max_age=3600.0: the server refuses",
        ),
        ({"sources": ["api", "b"]}, "app_name", "consume its own events; name other apps"),
        ({"sources": ["b" * 239]}, "app_name", "too long for a subject"),
        ({"consumer_mode": "push", "direct": True}, "consumer_mode", "so it pulls"),
        (
            {"use_outbox": True},
            "use_outbox",
            "set jetstream_database_url or jetstream_session_factory",
        ),
        (
            {"outbox_lease": 60, "duplicate_window": "1m"},
            "outbox_lease",
            "use a lease well below jetstream_duplicate_window",
        ),
        (
            {"use_dlq": False},
            "use_dlq",
            'logged and destroyed; if that is meant, set jetstream_no_dlq_action="log_and_term"',
        ),
    ],
)
def test_settings_that_contradict_each_other(
    settings: dict[str, Any], setting: str, message: str
) -> None:
    error = refusal(**settings)
    assert error.setting == f"jetstream_{setting}"
    assert re.search(message, str(error))


def test_settings_that_agree() -> None:
    assert read(use_dlq=False, no_dlq_action="log_and_term").use_dlq is False
    assert read(duplicate_window=60, max_age=60).max_age == 60
    assert read(max_age="30s").duplicate_window is None
    longest = read(app_name="a" * 120, destination_app="b" * 120)
    assert max(map(len, longest.subjects)) <= 255
    for consumer in consumer_specs(longest):
        assert len(consumer.durable) <= 255


def test_the_names_are_required() -> None:
    with pytest.raises(ConfigurationError) as caught:
        Config.from_app(make_app(), {})
    assert "jetstream_app_name='': must be set" in str(caught.value)
    assert "jetstream_destination_app='': must be set" in str(caught.value)


def test_all_that_is_wrong_is_said_at_once() -> None:
    error = refusal(ack_wait=0, backoff=[], lease="soon", bakoff=[1], nats_urls="")
    lines = str(error).splitlines()
    assert lines[0] == "5 settings cannot be used:"
    assert [line.split("=")[0].split()[0] for line in lines[1:]] == [
        "jetstream_nats_urls",
        "jetstream_ack_wait",
        "jetstream_lease",
        "jetstream_backoff",
        "jetstream_bakoff",
    ]
    assert error.setting == "jetstream_nats_urls"


# ── credentials ──────────────────────────────────────────────────────────────


def test_a_config_shows_no_credentials() -> None:
    options = {
        "user": "alice",
        "password": "s3cr3t",
        "token": "s3cr3t",
        "nkeys_seed_str": "s3cr3t",
        "nkeys_seed": "s3cr3t.nk",
        "user_credentials": "s3cr3t.creds",
        "ws_connection_headers": {"Authorization": ["s3cr3t"]},
        "name": "shop",
    }
    config = read(
        nats_urls=["nats://alice:s3cr3t@a:1", "s3cr3t@[::1]:4222", "b:2"], nats_options=options
    )
    config = dataclasses.replace(
        config,
        database_url="postgresql+psycopg://alice:s3cr3t@h/shop?password=s3cr3t&x=1",
        session_factory=sessionmaker(create_engine("sqlite:///a?password=s3cr3t&uri=true")),
    )
    for text in (repr(config), str(config), f"{config}", "".join(config.safe_urls)):
        assert not any(secret in text for secret in SECRETS)
    assert config.safe_urls == ("nats://***@a:1", "nats://***@[::1]:4222", "nats://b:2")
    assert "nats_urls=('nats://***@a:1', 'nats://***@[::1]:4222', 'nats://b:2')" in repr(config)
    assert "'password': '***'" in repr(config)
    assert "'name': 'shop'" in repr(config)
    assert config.nats_options["password"] == "s3cr3t"
    assert config.nats_urls[0] == "nats://alice:s3cr3t@a:1"


@pytest.mark.parametrize(
    "settings",
    [
        {"nats_urls": "nats://alice:s3cr3t@a:port"},
        {"nats_urls": "nats://alice:s3cr3t@a:1,nats://b:port"},
        {"nats_urls": "nats://b:1,nats://alice:s3cr3t@a:port"},
        {"nats_urls": "http://alice:s3cr3t@a"},
        {"nats_urls": "alice:s3cr3t@nats://a"},
        {"nats_urls": "nats://alice:s3cr3t@"},
        {"nats_urls": "nats://a:s3cr3t"},
        {"nats_urls": "nats://a:p@s3cr3t@b:port"},
        {"nats_urls": "nats://u:p/s3cr3t@b"},
        {"nats_urls": "nats://u:p?s3cr3t@b"},
        {"nats_urls": "nats://u:p#s3cr3t@b"},
        {"nats_urls": "nats://u:s3cr3t,p@b"},
        {"nats_urls": "nats://u:p,s3cr3t@b"},
        {"nats_urls": "nats://u:p s3cr3t@b"},
        {"nats_urls": "nats://u:p\ns3cr3t@b"},
        {"nats_urls": "nats://[s3cr3t@b"},
        {"nats_urls": "wss://a/?token=s3cr3t"},
        {"nats_urls": ["nats://alice:s3cr3t@a", 4]},
        {"nats_urls": [["nats://alice:s3cr3t@a"]]},
        {"nats_urls": {"url": "nats://alice:s3cr3t@a"}},
        {"nats_urls": b"nats://alice:s3cr3t@a"},
        {"nats_urls": ["nats://alice:s3cr3t@a", "ws://alice:s3cr3t@b"]},
        {"nats_options": "s3cr3t"},
        {"nats_options": {"pasword": "s3cr3t"}},
        {"nats_options": {"token": b"s3cr3t"}},
        {"nats_options": {"token": "s3cr3t", "user": "alice", "verbose": True}},
        {"nats_options": {"password": "s3cr3t", "connect_timeout": "soon"}},
        {"stream_name": "nats://alice:s3cr3t@a"},
        {"app_name": "nats://alice:s3cr3t@a"},
        {"ack_wait": "nats://alice:s3cr3t@a"},
        {"password": "s3cr3t"},
        {"database_url": "postgresql+asyncpg://alice:s3cr3t@h/shop"},
        {"database_url": "oracle://alice:p@s3cr3t@h/shop"},
        {"database_url": "oracle://alice:p/?s3cr3t@h/shop"},
        {"database_url": "oracle://h/shop?user=alice&password=s3cr3t"},
        {"database_url": "oracle://h:s3cr3t/shop"},
        {"database_url": "alice:s3cr3t@h"},
        {"database_url": make_url("postgresql+asyncpg://alice:s3cr3t@h/shop?password=s3cr3t")},
        {"database_url": {"url": "postgresql://alice:s3cr3t@h/shop"}},
        {"environ": {"NATS_URL": "nats://alice:s3cr3t@a:port"}},
        {"environ": {"NATS_URLS": "nats://u:s3cr3t,p@b"}},
    ],
)
def test_an_error_shows_no_credentials(settings: dict[str, Any]) -> None:
    error = refusal(**settings)
    for text in (str(error), repr(error)):
        assert not any(secret in text for secret in SECRETS)


# ── the environment ──────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("environ", "settings", "urls"),
    [
        ({"NATS_URL": "a"}, {}, ("nats://a:4222",)),
        ({"NATS_URLS": "a,b:1"}, {}, ("nats://a:4222", "nats://b:1")),
        ({"NATS_URLS": "a", "NATS_URL": "b"}, {}, ("nats://a:4222",)),
        ({"NATS_URLS": "", "NATS_URL": "b"}, {}, ("nats://b:4222",)),
        ({"NATS_URLS": "", "NATS_URL": ""}, {}, ("nats://localhost:4222",)),
        ({"NATS_URLS": "a", "NATS_URL": "b"}, {"nats_urls": "c"}, ("nats://c:4222",)),
        ({"NATS_URLS": "redis://a"}, {"nats_urls": "c"}, ("nats://c:4222",)),
    ],
)
def test_urls_of_the_environment(
    environ: dict[str, str], settings: dict[str, Any], urls: tuple[str, ...]
) -> None:
    assert read(environ, **settings).nats_urls == urls


@pytest.mark.parametrize(
    ("variable", "value"),
    [("NATS_URLS", "redis://a"), ("NATS_URL", "nats://a:port"), ("NATS_URL", " , ")],
)
def test_bad_urls_of_the_environment_name_their_variable(variable: str, value: str) -> None:
    error = refusal({variable: value})
    assert str(error).startswith(f"{variable} (environment variable)=")
    assert error.setting == "jetstream_nats_urls"


@pytest.mark.parametrize(
    ("value", "lazy"),
    [
        *((word, True) for word in ("1", "true", "On", "anything")),
        *((word, False) for word in ("", " ", "0", "false", "No", "OFF")),
    ],
)
def test_autostart_of_the_environment(value: str, lazy: bool) -> None:
    environ = {"JETSTREAM_BRIDGE_DISABLE_AUTOSTART": value}
    assert read(environ).lazy_connect is lazy
    assert read(environ, lazy_connect=True).lazy_connect is True
    assert read(environ, lazy_connect=False).lazy_connect is False


def test_the_environment_is_that_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NATS_URLS", "from-environ")
    assert Config.from_app(make_app(**NAMES)).nats_urls == ("nats://from-environ:4222",)


# ── unknown keys ─────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ack_wit", "jetstream_ack_wit is not a setting; did you mean jetstream_ack_wait?"),
        ("nats_url", "jetstream_nats_url is not a setting; did you mean jetstream_nats_urls?"),
        ("use_index", "jetstream_use_index is not a setting; "),
        ("zzz", "jetstream_zzz is not a setting; remove it"),
        ("", "jetstream_ is not a setting; remove it"),
    ],
)
def test_unknown_keys(name: str, message: str) -> None:
    error = refusal(**{name: "value"})
    assert message in str(error)
    assert "value" not in str(error)
    assert error.setting == f"jetstream_{name}"


def test_other_keys_are_not_looked_at() -> None:
    app = make_app(**NAMES)
    app.conf.update(my_jetstream_thing=1, jetstreams=2, JETSTREAM_HOST="h")
    assert Config.from_app(app, {})


# ── Celery's ways of being configured ────────────────────────────────────────


def a_module(**names: Any) -> types.ModuleType:
    module = types.ModuleType("celeryconfig")
    vars(module).update(names)
    return module


def a_class(**names: Any) -> type:
    return type("CeleryConfig", (), names)


KEYS = {f"jetstream_{name}": value for name, value in NAMES.items()}
DJANGO = {f"CELERY_JETSTREAM_{name.upper()}": value for name, value in NAMES.items()}
SOURCES = [a_module, a_class, lambda **names: a_class(**names)(), dict]


@pytest.fixture
def app() -> Celery:
    """An app that nobody has configured yet."""
    return Celery("test", set_as_current=False)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    ("namespace", "spell"),
    [
        (None, "{}".format),
        ("CELERY", lambda key: f"CELERY_{key}".upper()),
        ("CELERY_", lambda key: f"CELERY_{key}".upper()),
        ("SHOP", lambda key: f"SHOP_{key}".upper()),
        ("celery", "celery_{}".format),
        ("jetstream", "{}".format),
        ("JETSTREAM", lambda key: f"JETSTREAM_{key}".upper()),
    ],
)
def test_config_from_object(
    app: Celery,
    source: Callable[..., object],
    namespace: str | None,
    spell: Callable[[str], str],
) -> None:
    settings = {**KEYS, "jetstream_ack_wait": "7s"}
    app.config_from_object(
        source(**{spell(key): value for key, value in settings.items()}), namespace=namespace
    )
    config = Config.from_app(app, {"NATS_URL": "a"})
    assert (config.app_name, config.ack_wait) == ("api", 7.0)
    assert config.nats_urls == ("nats://a:4222",)


def test_an_update_beats_the_object_before_and_after_loading(app: Celery) -> None:
    app.conf.update(jetstream_ack_wait=5)
    app.config_from_object(a_module(**KEYS, jetstream_ack_wait=7))
    assert Config.from_app(app, {}).ack_wait == 5
    app.conf.update(jetstream_ack_wait=6)
    assert Config.from_app(app, {}).ack_wait == 6
    app.conf.jetstream_max_deliver = 9
    assert Config.from_app(app, {}).max_deliver == 9


def test_a_config_that_was_read_does_not_change(app: Celery) -> None:
    backoff = [1, 2]
    app.conf.update(KEYS, jetstream_backoff=backoff)
    config = Config.from_app(app, {})
    backoff.append(3)
    app.conf.jetstream_ack_wait = 99
    assert (config.backoff, config.ack_wait) == ((1.0, 2.0), 30.0)


def test_updates_add_to_a_namespaced_object_in_either_spelling(app: Celery) -> None:
    # Where both set one key, Celery 5.5 prefers the object's, and 5.7 the update's.
    app.conf.update(jetstream_ack_wait=5)
    app.config_from_object(a_module(**DJANGO), namespace="CELERY")
    assert Config.from_app(app, {}).ack_wait == 5
    app.conf.update(CELERY_JETSTREAM_MAX_DELIVER=8, jetstream_lease=60)
    config = Config.from_app(app, {})
    assert (config.max_deliver, config.lease) == (8, 60.0)


def test_unknown_keys_are_named_as_they_are_written(app: Celery) -> None:
    module = a_module(**DJANGO, CELERY_JETSTREAM_ACKWAIT=7, CELERY_TASK_ALWAYS_EAGER=True)
    app.config_from_object(module, namespace="CELERY")
    message = "CELERY_JETSTREAM_ACKWAIT is not a setting; did you mean CELERY_JETSTREAM_ACK_WAIT"
    with pytest.raises(ConfigurationError, match=message) as caught:
        Config.from_app(app, {})
    assert caught.value.setting == "jetstream_ackwait"


@pytest.mark.parametrize(
    ("namespace", "base", "key", "right"),
    [
        (None, KEYS, "JETSTREAM_ACK_WAIT", "jetstream_ack_wait"),
        (None, KEYS, "Jetstream_ack_wait", "jetstream_ack_wait"),
        ("CELERY", DJANGO, "JETSTREAM_ACK_WAIT", "CELERY_JETSTREAM_ACK_WAIT"),
        ("CELERY", DJANGO, "celery_jetstream_ack_wait", "CELERY_JETSTREAM_ACK_WAIT"),
    ],
)
def test_a_setting_that_celery_does_not_find_is_no_silent_default(
    app: Celery, namespace: str | None, base: dict[str, Any], key: str, right: str
) -> None:
    app.config_from_object(a_module(**base, **{key: 7}), namespace=namespace)
    message = f"^{key} is set, but Celery does not find it so; write {right}$"
    with pytest.raises(ConfigurationError, match=message) as caught:
        Config.from_app(app, {})
    assert caught.value.setting == "jetstream_ack_wait"


def test_a_constant_that_a_setting_is_made_of_is_no_mistake(app: Celery) -> None:
    app.config_from_object(a_module(**KEYS, JETSTREAM_ACK_WAIT=7, jetstream_ack_wait=7))
    assert Config.from_app(app, {}).ack_wait == 7


def test_what_a_configuration_module_imports_is_no_setting(app: Celery) -> None:
    imported = {"jetstream_handler": make_app, "jetstream_class": Config, "jetstream_lib": types}
    app.config_from_object(a_module(**KEYS, **imported))
    assert Config.from_app(app, {})


def test_reading_does_not_finalize_the_app_and_leaves_no_defaults(app: Celery) -> None:
    app.conf.update(KEYS)
    assert not app.configured
    Config.from_app(app, {})
    assert not app.finalized
    assert app.conf.get("jetstream_ack_wait") is None


def test_apps_do_not_share_settings() -> None:
    assert read(ack_wait=3).ack_wait == 3
    assert read().ack_wait == 30
