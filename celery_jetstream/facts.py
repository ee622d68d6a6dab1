"""What the doctor knows of an app and its servers.

A fact that could not be found out is an :class:`Unknown` in its place; a check that needs it is
skipped with that reason. Pure: ``facts_nats``, ``facts_celery`` and ``facts_database`` find out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from .config import Config
from .plans import Plan
from .specs import NANOSECONDS, Configuration

__all__ = (
    "Clock",
    "DatabaseFacts",
    "Facts",
    "HandlerFacts",
    "OldTransaction",
    "Permission",
    "ServerFacts",
    "TableFacts",
    "Unknown",
    "WorkerFacts",
    "known",
    "seconds_of",
    "span",
)

T = TypeVar("T")


class Unknown(Exception):
    """In the place of a fact: why it could not be found out."""


def known(value: T | Unknown) -> T:
    """The fact.

    Raises:
        Unknown: there is none.
    """
    if isinstance(value, Unknown):
        raise value
    return value


# -- facts -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class HandlerFacts:
    """One handler: its task's name and options; ``queue`` is "" where only its route knows.

    Its own tasks of the library (the flush) are described so too. Limits are seconds.
    """

    name: str
    queue: str
    acks_late: bool = False
    has_inbox: bool = False
    time_limit: float | None = None
    soft_time_limit: float | None = None


@dataclass(frozen=True, kw_only=True)
class WorkerFacts:
    """One worker that answered: its queues, its tasks, its pool, and how many it runs at once."""

    name: str
    queues: tuple[str, ...]
    tasks: frozenset[str]
    pool: str = ""
    concurrency: int | None = None

    @property
    def is_direct(self) -> bool:
        """Whether it consumes no queue: a worker of direct mode."""
        return not self.queues


@dataclass(frozen=True, kw_only=True)
class ServerFacts:
    """The nats-server that we are connected to.

    Attributes:
        name: its name.
        version: such as ``2.15.1``.
        cluster: its cluster's name; "" where it is in none.
        max_payload: bytes.
        expiries: what lets us in, and how many seconds it will yet do so.
    """

    name: str
    version: str
    cluster: str
    max_payload: int
    expiries: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Permission:
    """One operation that was tried; ``error`` is None where it may be done."""

    what: str
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Clock:
    """How many seconds a clock is ahead of this host's, give or take ``within``."""

    ahead: float
    within: float


@dataclass(frozen=True, kw_only=True)
class OldTransaction:
    """One that is open; ``seconds`` old. ``what`` says whose, without its statement."""

    what: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class TableFacts:
    """One of our tables, as PostgreSQL's statistics have it."""

    name: str
    live: int
    dead: int
    autovacuum: bool


@dataclass(frozen=True, kw_only=True)
class DatabaseFacts:
    """The database's server.

    Attributes:
        kind: ``postgresql``, ``mysql``, ``mariadb`` or ``sqlite``.
        version: as it says.
        durability: settings that say what a commit survives, as they are.
        read_only: nothing can be written: a standby, or so set.
        autovacuum: PostgreSQL's setting; None elsewhere.
        tables: ours; PostgreSQL only.
        transactions: the oldest that are open, oldest first.
        hidden: how many others' transactions this user may not see.
        history: undo records that MariaDB or MySQL has not purged; None where that is not known.
    """

    kind: str
    version: str
    durability: Mapping[str, str]
    read_only: bool = False
    autovacuum: bool | None = None
    tables: tuple[TableFacts, ...] = ()
    transactions: tuple[OldTransaction, ...] | Unknown = ()
    hidden: int = 0
    history: int | None = None


#: Of an outbox or inbox, as ``status`` has it, and whether the app uses it (or only could).
BoxFacts = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Facts:
    """All that the checks look at. What is raw is in the server's own words.

    Attributes:
        flush: the task ``flush_outbox``, described as a handler is.
        role: what our NATS user is to be allowed, a word of ``--role``'s.
        plan: what ``provision`` would do, or why it could not.
        syncs: server to how often it syncs to disk: ``always``, or seconds as text.
        clocks: the database's and NATS's.
    """

    config: Config
    celery: Mapping[str, Any]
    handlers: tuple[HandlerFacts, ...] | Unknown
    flush: HandlerFacts | Unknown
    workers: tuple[WorkerFacts, ...] | Unknown
    server: ServerFacts | Unknown
    account: Configuration | Unknown
    stream: Configuration | Unknown
    consumers: Mapping[str, Configuration | Unknown] | Unknown
    plan: Plan | str | Unknown
    permissions: tuple[Permission, ...] | Unknown
    syncs: Mapping[str, str] | Unknown
    database: DatabaseFacts | Unknown
    outbox: BoxFacts | Unknown
    inbox: BoxFacts | Unknown
    clocks: Mapping[str, Clock | Unknown] = field(default_factory=dict)
    role: str = "run"

    @property
    def made(self) -> Configuration:
        """The stream's configuration."""
        found: Configuration = known(self.stream)["config"]
        return found

    @property
    def window(self) -> float:
        """Seconds for which the stream drops a known id."""
        return seconds_of(self.made.get("duplicate_window"))

    @property
    def taken_directly(self) -> bool:
        """Whether workers take the messages themselves, so that no queue need be read for them."""
        return self.config.direct or any(worker.is_direct for worker in known(self.workers))


# -- units -----------------------------------------------------------------------------------------


def seconds_of(nanoseconds: Any) -> float:
    """NATS's durations; 0 where it is not set."""
    return float(nanoseconds or 0) / NANOSECONDS


def span(seconds: float) -> str:
    """Seconds as text with a unit that suits them."""
    for unit, size in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if abs(seconds) >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"
