"""The settings: read once from ``app.conf.jetstream_*`` and the environment, then frozen.

Receives a Celery app and hands on one :class:`Config`, in which every value has its final type
(durations are float seconds). The table of its fields is the whole truth about a setting: the
default, the reader that checks it, and a good value for the message when it cannot be used. All
that is wrong is said at once, and no message, ``repr`` or ``str`` shows credentials.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType, ModuleType
from typing import Any

from . import readers, servers
from . import sources as origins
from . import subjects as grammar
from .exceptions import ConfigurationError

__all__ = ("Config",)

_PREFIX = "jetstream_"
_DEAD_LETTER_RESERVE = 4096
_WITHOUT_LIMIT = " (without a limit the whole stream would move to Celery's broker)"

_Problems = list[tuple[str, str]]  # of the name of a setting and what is wrong with it

# ── the settings ─────────────────────────────────────────────────────────────


def _setting(default: object, read: readers.Reader, good: str, **options: Any) -> Any:
    """Declare a field: its default, its reader, and good values for the message."""
    metadata = {"default": default, "read": read, "good": good}
    return dataclasses.field(default_factory=lambda: default, metadata=metadata, **options)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class Config:
    """Every setting, read and checked, also where it is built without an app.

    ``None`` counts as not set, and gives the default.

    Raises:
        ConfigurationError: some settings cannot be used; the message lists all of them.
    """

    # Where to connect.
    nats_urls: tuple[str, ...] = _setting(
        ("nats://localhost:4222",), servers.nats_urls, '"nats://localhost:4222"'
    )
    nats_options: Mapping[str, Any] = _setting(
        MappingProxyType({}),
        servers.nats_options,
        '{"user_credentials": "/run/app.creds"}',
        hash=False,
    )
    connect_retry_attempts: int = _setting(3, readers.whole(1, 1_000_000), "3")
    connect_retry_delay: float = _setting(2.0, readers.seconds("0s", "1h"), '2 or "2s"')
    lazy_connect: bool = _setting(False, readers.flag, "True")

    # What things are called. Everything on the server is named after these.
    app_name: str = _setting("", readers.name(grammar.validate_app_name), '"api"')
    destination_app: str = _setting("", readers.name(grammar.validate_app_name), '"worker"')
    sources: tuple[origins.Source, ...] = _setting(
        (), origins.sources, '["billing", "crm"], or {"billing": {"max_ack_pending": 100}}'
    )
    stream_name: str = _setting(
        "jetstream-bridge-stream",
        readers.name(grammar.validate_stream_name),
        '"jetstream-bridge-stream"',
    )

    # The stream. What is None is left to the server.
    auto_provision: bool = _setting(True, readers.flag, "True")
    num_replicas: int | None = _setting(None, readers.whole(1, 5), "3")
    duplicate_window: float | None = _setting(
        None, readers.seconds("0.1s", "36500d"), '120 or "2m"'
    )
    max_age: float | None = _setting(
        None, readers.seconds("0.1s", "36500d"), '"7d", or None to keep messages for ever'
    )
    max_payload: int = _setting(1024**2, readers.whole(16 * 1024, 64 * 1024**2), "1048576 (1 MiB)")

    # How messages are taken and kept in progress.
    consumer_mode: str = _setting("pull", readers.choice("pull", "push"), '"pull"')
    delivery_subject: str | None = _setting(
        None, readers.name(grammar.validate_subject), '"worker.sync.api.worker"'
    )
    ack_wait: float = _setting(30.0, readers.seconds("0.1s", "24h"), '30 or "30s"')
    lease: float = _setting(600.0, readers.seconds("0.1s", "30d"), '600 or "10m"')
    max_hold: float = _setting(3600.0, readers.seconds("0.1s", "30d"), '3600 or "1h"')
    batch_size: int = _setting(256, readers.whole(1, 10_000), "256")
    max_ack_pending: int = _setting(10_000, readers.whole(1, 1_000_000, _WITHOUT_LIMIT), "10000")

    direct: bool = _setting(False, readers.flag, "True")

    # What is counted.
    metrics: bool = _setting(False, readers.flag, "True")
    metrics_address: tuple[str, int] | None = _setting(
        None, readers.http_address, '"127.0.0.1:9464", or 9464, or ":9464" (127.0.0.1)'
    )

    # How failures end.
    max_deliver: int = _setting(5, readers.whole(1, 1_000_000), "5")
    backoff: tuple[float, ...] = _setting(
        (1.0, 5.0, 15.0, 30.0, 60.0), readers.backoff, '[1, 5, 15, 30, 60] or ["1s", "5s"]'
    )
    unrecoverable_errors: tuple[type[Exception], ...] = _setting(
        (TypeError, ValueError, NameError, AttributeError),
        readers.error_classes,
        '[TypeError, "shop.errors.BadOrder"]',
    )
    outage_errors: tuple[type[Exception], ...] = _setting(
        (), readers.error_classes, '["redis.exceptions.ConnectionError"]'
    )
    use_dlq: bool = _setting(True, readers.flag, "True")
    max_redrives: int = _setting(3, readers.whole(0, 1_000_000), "3")
    no_dlq_action: str | None = _setting(None, readers.no_dlq_action, '"log_and_term"')

    # The outbox's and the inbox's database.
    use_outbox: bool = _setting(False, readers.flag, "True")
    database_url: str | None = _setting(
        None, readers.database_url, '"postgresql+psycopg://user@host/shop"'
    )
    session_factory: Callable[..., Any] | str | None = _setting(  # noqa: RUF009
        None, readers.factory, 'a sessionmaker, or "shop.db.Session"', hash=False
    )
    outbox_model: Callable[..., Any] | str | None = _setting(  # noqa: RUF009
        None, readers.factory, '"shop.models.ShopOutbox"', hash=False
    )
    outbox_table: str = _setting("jetstream_outbox", readers.identifier, '"jetstream_outbox"')
    outbox_schema: str | None = _setting(None, readers.identifier, '"events"')
    outbox_batch_size: int = _setting(1000, readers.whole(1, 10_000), "1000")
    outbox_lease: float = _setting(30.0, readers.seconds("1s", "1h"), '30 or "30s"')
    outbox_flush_interval: float = _setting(5.0, readers.seconds("0.1s", "1h"), '5 or "5s"')
    outbox_max_seconds: float = _setting(20.0, readers.seconds("0.1s", "1h"), '20 or "20s"')
    outbox_queue: str | None = _setting(None, readers.text, '"outbox"')
    outbox_beat: bool = _setting(True, readers.flag, "True")
    outbox_beat_name: str = _setting(
        "celery_jetstream.flush_outbox", readers.text, '"celery_jetstream.flush_outbox"'
    )
    outbox_nudge: bool = _setting(True, readers.flag, "True")
    outbox_retention: float = _setting(
        86400.0, readers.seconds("0s", "36500d"), '"1d", or 0 to delete what is sent'
    )
    outbox_atomic: bool = _setting(False, readers.flag, "True")
    outbox_on_failure: str = _setting("park", readers.choice("park", "skip"), '"park"')
    outbox_max_attempts: int = _setting(10, readers.whole(1, 1_000_000), "10")
    outbox_max_age: float = _setting(3600.0, readers.seconds("0s", "36500d"), '"1h"')
    outbox_no_stream_grace: float = _setting(60.0, readers.seconds("0s", "30d"), '60 or "1m"')

    # Health.
    health_cache_ttl: float = _setting(30.0, readers.seconds("0s", "1h"), '30 or "30s"')
    http_address: tuple[str, int] | None = _setting(
        None, readers.http_address, '"127.0.0.1:8080", or 8080, or ":8080" (127.0.0.1)'
    )

    # The inbox.
    use_inbox: bool = _setting(False, readers.flag, "True")
    inbox_model: Callable[..., Any] | str | None = _setting(  # noqa: RUF009
        None, readers.factory, '"shop.models.ShopInbox"', hash=False
    )
    inbox_table: str = _setting("jetstream_inbox", readers.identifier, '"jetstream_inbox"')
    inbox_schema: str | None = _setting(None, readers.identifier, '"events"')
    inbox_lease: float = _setting(60.0, readers.seconds("1s", "1h"), '60 or "1m"')
    inbox_retention: float = _setting(30 * 86400.0, readers.seconds("1m", "36500d"), '"30d"')
    inbox_queue: str | None = _setting(None, readers.text, '"maintenance"')
    inbox_beat: bool = _setting(True, readers.flag, "True")

    def __post_init__(self) -> None:
        values, problems = _check({name: getattr(self, name) for name in _FIELDS})
        _raise(problems)
        values["sources"] = values["sources"] or (origins.Source(values["destination_app"]),)
        values["metrics"] = values["metrics"] or values["metrics_address"] is not None
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @classmethod
    def from_app(cls, app: Any, environ: Mapping[str, str] = os.environ) -> Config:
        """Read the settings of a Celery app; what it leaves open, from the environment.

        The app's configuration is loaded for it; the app is not finalized.

        Args:
            app: the Celery app.
            environ: where ``NATS_URLS``, ``NATS_URL`` and
                ``JETSTREAM_BRIDGE_DISABLE_AUTOSTART`` are looked up.

        Raises:
            ConfigurationError: some settings cannot be used; the message lists all of them.
        """
        conf = app.conf
        given = {name: conf.get(f"{_PREFIX}{name}") for name in _FIELDS}  # the first get loads it
        given = {name: value for name, value in given.items() if value is not None}
        strays = list(_strays(conf, given))
        unusable = _add_environ(given, environ)
        _raise(_check(given)[1] + unusable + strays)
        return cls(**given)

    @property
    def publish_subject(self) -> str:
        """Where the events of this app go."""
        return grammar.publish_subject(self.app_name, self.destination_app)

    @property
    def consume_subjects(self) -> tuple[str, ...]:
        """Where the events for this app come from."""
        return tuple(grammar.publish_subject(s.name, self.app_name) for s in self.sources)

    @property
    def dead_letter_subject(self) -> str:
        """Where this app puts the messages that it gives up."""
        return grammar.dead_letter_subject(self.app_name)

    @property
    def subjects(self) -> tuple[str, ...]:
        """What the stream must hold: both directions of each pair, and everybody's dead letters."""
        others = dict.fromkeys((self.destination_app, *(source.name for source in self.sources)))
        both = [
            subject
            for other in others
            for subject in (
                grammar.publish_subject(self.app_name, other),
                grammar.publish_subject(other, self.app_name),
            )
        ]
        return (*both, *map(grammar.dead_letter_subject, (self.app_name, *others)))

    @property
    def pushes(self) -> bool:
        """Whether the server sends messages to the bridges, unasked."""
        return self.consumer_mode == "push"

    @property
    def payload_limit(self) -> int:
        """How many bytes of payload and headers still fit as a dead letter."""
        return self.max_payload - _DEAD_LETTER_RESERVE

    @property
    def has_database(self) -> bool:
        """Whether there is a database for an outbox and an inbox."""
        return self.database_url is not None or self.session_factory is not None

    @property
    def tls_wanted(self) -> bool:
        """Whether a connection in clear text is to be refused."""
        secure = any(url.startswith(("tls:", "wss:")) for url in self.nats_urls)
        return secure or "tls" in self.nats_options

    @property
    def safe_urls(self) -> tuple[str, ...]:
        """The URLs without user, password and token, to be shown."""
        return tuple(map(servers.masked_url, self.nats_urls))

    def summary(self) -> dict[str, Any]:
        """Every setting as a plain value or as text, without credentials."""
        return {name: _plain(name, getattr(self, name)) for name in _FIELDS}

    def __repr__(self) -> str:
        shown = (f"{name}={_shown(name, getattr(self, name))}" for name in _FIELDS)
        return f"{type(self).__name__}({', '.join(shown)})"


_FIELDS = {field.name: field.metadata for field in dataclasses.fields(Config)}

_RULES: tuple[tuple[tuple[str, ...], Callable[..., bool], str], ...] = (
    (
        ("app_name", "destination_app"),
        lambda app, other: app != other,
        "must differ, or the service would consume its own events; set jetstream_destination_app"
        " to the name of the service at the other end",
    ),
    (
        ("app_name", "destination_app"),
        lambda app, other: len(app) + len(other) <= 240,
        "too long for a subject of 255 characters; use at most 240 characters for both",
    ),
    (
        ("app_name", "sources"),
        lambda app, sources: all(source.name != app for source in sources),
        "the service would consume its own events; name other apps",
    ),
    (
        ("app_name", "sources"),
        lambda app, sources: all(len(app) + len(source.name) <= 240 for source in sources),
        "too long for a subject of 255 characters; use at most 240 characters for both",
    ),
    (
        ("consumer_mode", "direct"),
        lambda mode, direct: not (mode == "push" and direct),
        "a worker of direct mode takes what it has room for, so it pulls; use"
        ' jetstream_consumer_mode="pull", or a bridge',
    ),
    (
        ("lease", "ack_wait"),
        lambda lease, ack_wait: lease >= ack_wait,
        "a copy must be let wait in Celery's broker for at least ack_wait before it is dispatched"
        ' again; use a lease of several ack_waits, for example "10m"',
    ),
    (
        ("duplicate_window", "max_age"),
        lambda window, age: None in (window, age) or window <= age,
        "the server refuses a window longer than messages are kept; use at most"
        " jetstream_max_age, or None",
    ),
    (
        ("use_outbox", "database_url", "session_factory"),
        lambda use, url, factory: not use or url is not None or factory is not None,
        "the outbox needs its database; set jetstream_database_url or jetstream_session_factory",
    ),
    (
        ("use_inbox", "database_url", "session_factory"),
        lambda use, url, factory: not use or url is not None or factory is not None,
        "the inbox needs its database; set jetstream_database_url or jetstream_session_factory",
    ),
    (
        ("outbox_lease", "duplicate_window"),
        lambda lease, window: lease < (window or 120.0),
        "rows of a flusher that was killed go out again after the lease, and the server must still"
        " know them then; use a lease well below jetstream_duplicate_window (or the server's 2m)",
    ),
    (
        ("use_dlq", "no_dlq_action"),
        lambda use_dlq, action: use_dlq or action is not None,
        "without dead letters, messages that are given up are logged and destroyed; if that is"
        ' meant, set jetstream_no_dlq_action="log_and_term", else jetstream_use_dlq=True',
    ),
)

# ── what is wrong with them ──────────────────────────────────────────────────


def _check(given: Mapping[str, object]) -> tuple[dict[str, Any], _Problems]:
    """Read what is given, and check it, with the defaults of the rest, against the rules."""
    values: dict[str, Any] = {}
    problems: _Problems = []
    for name, field in _FIELDS.items():
        value = field["default"] if given.get(name) is None else given[name]
        try:
            values[name] = None if value is None else field["read"](value)
        except ValueError as error:
            problems.append(_problem(name, value, error))
    for names, holds, rule in _RULES:
        if values.keys() >= set(names) and not holds(*(values[name] for name in names)):
            shown = (f"{_PREFIX}{name}={_shown(name, values[name])}" for name in names)
            problems.append((names[0], f"{', '.join(shown)}: {rule}"))
    return values, problems


def _add_environ(given: dict[str, Any], environ: Mapping[str, str]) -> _Problems:
    """Add what only the environment sets."""
    variable = "NATS_URLS" if environ.get("NATS_URLS") else "NATS_URL"
    autostart = environ.get("JETSTREAM_BRIDGE_DISABLE_AUTOSTART", "").strip().lower()
    given.setdefault("lazy_connect", readers.FLAGS.get(autostart, bool(autostart)))
    if "nats_urls" not in given and (urls := environ.get(variable)):
        try:
            given["nats_urls"] = servers.nats_urls(urls)
        except ValueError as error:
            return [_problem("nats_urls", urls, error, f"{variable} (environment variable)")]
    return []


def _strays(conf: Any, given: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """Find the keys that look like settings but are none, and those that Celery cannot see.

    Keys come as the user wrote them: with a ``namespace`` in upper case and with its prefix.
    Functions, classes and modules are no settings: a configuration module may import them.
    """
    prefix = f"{conf.prefix or ''}{_PREFIX}"
    prefix = prefix.upper() if (conf.prefix or "").isupper() else prefix.lower()
    for key in sorted(map(str, conf)):
        name = key.lower().removeprefix((conf.prefix or "").lower())
        if not name.startswith(_PREFIX):
            continue
        name = name.removeprefix(_PREFIX)
        start = key[: len(key) - len(name)]
        value = conf.get(key)
        if name in _FIELDS and name not in given and value is not None:
            right = _spelled(prefix, name)
            yield name, f"{key} is set, but Celery does not find it so; write {right}"
        if name in _FIELDS or callable(value) or isinstance(value, ModuleType):
            continue
        if key in (_spelled(prefix, name), f"{_PREFIX}{name}"):
            near = readers.nearest(name, _FIELDS)
            advice = f"did you mean {_spelled(start, near)}?" if near else "remove it"
            yield name, f"{key} is not a setting; {advice}"


def _spelled(start: str, name: str) -> str:
    return start + (name.upper() if start.isupper() else name)


def _problem(name: str, value: object, rule: ValueError, label: str = "") -> tuple[str, str]:
    good = _FIELDS[name]["good"]
    shown = f"{label or _PREFIX + name}={_shown(name, value)}"
    return name, f"{shown}: {rule}; a good value is {good}"


def _raise(problems: _Problems) -> None:
    if problems:
        texts = [text for _, text in problems]
        if len(texts) > 1:
            texts.insert(0, f"{len(texts)} settings cannot be used:")
        raise ConfigurationError("\n  ".join(texts), setting=f"{_PREFIX}{problems[0][0]}")


def _plain(name: str, value: object) -> Any:
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if name == "nats_urls" and isinstance(value, tuple):
        return list(map(servers.masked_url, value))
    text = _shown(name, value)
    if isinstance(value, tuple) and all(isinstance(one, (str, int, float)) for one in value):
        return list(value)
    return value if isinstance(value, str) and text == repr(value) else text


def _shown(name: str, value: object) -> str:
    """Return the ``repr`` of a value, shortened, and without credentials."""
    if name == "nats_urls":
        text = servers.shown_urls(value)
    elif name == "nats_options":
        text = servers.shown_options(value)
    elif name == "database_url" and "://" not in str(value):
        text = f"<{type(value).__name__}>"  # no URL, but it may have a password
    else:
        text = readers.masked(value)
    return text if len(text) <= 300 else f"{text[:297]}..."
