"""The doctor's checks of the outbox's and the inbox's database, and of the clocks. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from .facts import Clock, Facts, Unknown, known, seconds_of, span
from .findings import Check, Result, check, error, ok, skipped, warning
from .specs import retention_warnings

__all__ = ("CHECKS",)

#: Seconds that an event may wait to be published, and how many flush intervals.
WAIT, INTERVALS = 60.0, 10
#: Seconds after which an open transaction keeps too many dead rows.
OLD = 300.0
#: Dead rows that are worth a word, and how many to one that lives.
DEAD, DEAD_SHARE = 10_000, 0.5
#: Undo records of MariaDB and MySQL that are worth a word.
HISTORY = 1_000_000
#: Seconds between two clocks.
SKEW, BAD_SKEW = 1.0, 60.0
INIT = "run 'celery -A … jetstream {} init', or your migrations; each line says what is missing"


@check("schema", "A statement of ours fails, or is slow, on a table that is not as it must be.")
def schema(facts: Facts) -> Iterator[Result]:
    for name, box in (("outbox", facts.outbox), ("inbox", facts.inbox)):
        if isinstance(box, Unknown):
            yield skipped(str(box))
            continue
        faults = box["differences"]
        if faults and not box["used"]:
            yield ok(f"the {name} is not in use, and its tables are not there")
            continue
        for fault in faults:
            yield error(fault, INIT.format(name))
        if not faults:
            yield ok(f"the {name}'s tables are as they must be")


@check("outbox-lag", "Events are written and not published: beat, the worker or NATS is away.")
def outbox_lag(facts: Facts) -> Iterator[Result]:
    oldest = known(facts.outbox).get("oldest_due")
    most = max(WAIT, INTERVALS * facts.config.outbox_flush_interval)
    if oldest is None or oldest < most:
        yield ok("nothing is due" if oldest is None else f"the oldest waits for {span(oldest)}")
        return
    up = not isinstance(facts.server, Unknown)
    yield error(
        f"an event could go since {span(oldest)}, and NATS is {'there' if up else 'away'}",
        "see that exactly this app's beat runs (worker -B, or celery beat), and a worker of the "
        "flush's queue; or run 'celery -A … jetstream outbox relay'"
        if up
        else "have NATS come back: the rows wait for it",
    )


@check(
    "outbox-given-up",
    "An event that was given up is not published until somebody retries or cancels it, and the "
    "later ones of its key wait for it.",
)
def outbox_given_up(facts: Facts) -> Iterator[Result]:
    box = known(facts.outbox)
    counts = box.get("counts", {})
    given_up = {state: counts[state] for state in ("failed", "exception") if counts.get(state)}
    if given_up or box.get("parked_keys"):
        shown = ", ".join(f"{count} {state}" for state, count in given_up.items())
        yield warning(
            f"{shown or 'none'}; {box.get('parked_keys', 0)} keys wait",
            "celery -A … jetstream outbox list --status failed; then retry or cancel them",
        )
    else:
        yield ok("none")


@check("inbox-retention", "What comes again after its row is pruned is handled again.")
def inbox_retention(facts: Facts) -> Iterator[Result]:
    if not known(facts.inbox)["used"]:
        yield ok("no handler has an inbox")
        return
    age = seconds_of(facts.made.get("max_age"))
    found = retention_warnings(facts.config.inbox_retention, age, facts.window)
    for text in found:
        yield warning(text, f"set jetstream_inbox_retention to {max(age, facts.window):g} or more")
    if not found:
        kept = span(facts.config.inbox_retention)
        yield ok(f"rows are kept for {kept}{'' if age else '; messages for ever'}")


# -- the server ------------------------------------------------------------------------------------

#: Of a database's settings: the value that loses commits, what with it, and how bad that is.
_DURABILITY = {
    ("fsync", "off"): (error, "any crash of the machine can destroy the database"),
    ("full_page_writes", "off"): (error, "a crash of the machine can destroy pages"),
    ("synchronous_commit", "off"): (warning, "a crash loses the last commits"),
    ("innodb_flush_log_at_trx_commit", "0"): (warning, "a crash loses up to a second of commits"),
    ("innodb_flush_log_at_trx_commit", "2"): (warning, "a power loss loses a second of commits"),
    ("synchronous", "0"): (error, "a power loss can destroy the file"),
}


@check("durability", "An event is as safe as the commit that wrote it.")
def durability(facts: Facts) -> Iterator[Result]:
    database = known(facts.database)
    bad = [item for item in database.durability.items() if item in _DURABILITY]
    for item in bad:
        severity, what = _DURABILITY[item]
        yield severity(f"{item[0]} is {item[1]}: {what}", f"set {item[0]} to its default")
    if database.read_only:
        yield error(
            "the database takes no writes (a standby, or read_only)",
            "have jetstream_database_url lead to the primary",
        )
    elif not bad:
        shown = ", ".join(f"{name} {value}" for name, value in database.durability.items())
        yield ok(f"{database.kind} {database.version}: {shown}")


@check(
    "autovacuum",
    "Every event leaves a dead row; where nobody removes them, each flush reads all of them.",
)
def autovacuum(facts: Facts) -> Iterator[Result]:
    database = known(facts.database)
    if database.autovacuum is None:
        yield from _purge(database.kind, database.history)
        return
    off = [t.name for t in database.tables if not (database.autovacuum and t.autovacuum)]
    behind = [t for t in database.tables if t.dead > max(DEAD, DEAD_SHARE * t.live)]
    if off or not database.autovacuum:
        yield error(
            f"autovacuum is off for {', '.join(off) or 'the whole server'}",
            "set autovacuum to on (postgresql.conf), and on the tables: ALTER TABLE … RESET "
            "(autovacuum_enabled)",
        )
    for table in behind:
        yield warning(
            f"{table.name}: {table.dead} dead rows, {table.live} live",
            f"VACUUM {table.name}; then see old-transactions, and have it run sooner: ALTER TABLE "
            f"{table.name} SET (autovacuum_vacuum_scale_factor = 0.02)",
        )
    if not off and not behind:
        dead = ", ".join(f"{table.name}: {table.dead}" for table in database.tables)
        yield ok(f"on; dead rows: {dead or 'no tables yet'}")


def _purge(kind: str, history: int | None) -> Iterator[Result]:
    if kind == "sqlite":
        yield ok("SQLite leaves none")
    elif history is None:
        yield skipped("this user may not see the length of InnoDB's history")
    elif history > HISTORY:
        yield warning(
            f"InnoDB has {history} undo records to purge",
            "see old-transactions; or raise innodb_purge_threads",
        )
    else:
        yield ok(f"InnoDB has {history} undo records to purge")


@check(
    "old-transactions",
    "While a transaction is open no dead row is removed that it might see: the outbox gets slower "
    "by the minute. One that is idle often has locks, too.",
)
def old_transactions(facts: Facts) -> Iterator[Result]:
    database = known(facts.database)
    old = [t for t in known(database.transactions) if t.seconds >= OLD]
    for transaction in old:
        yield warning(
            f"{transaction.what} is open since {span(transaction.seconds)}",
            "end it, and bound them: idle_in_transaction_session_timeout (PostgreSQL), "
            "idle_transaction_timeout (MariaDB); have dumps read from a replica",
        )
    if database.hidden:
        yield skipped(
            f"{database.hidden} sessions of others are hidden from this user: GRANT "
            "pg_read_all_stats shows them"
        )
    elif not old:
        yield ok(f"none is older than {span(OLD)}")


@check(
    "clock-skew",
    "Copies expire by the workers' clocks, certificates and JWTs by the host's, delays by the "
    "database's; and logs are put in a false order.",
)
def clock_skew(facts: Facts) -> Iterator[Result]:
    for name, clock in facts.clocks.items():
        if isinstance(clock, Unknown):
            yield skipped(str(clock))
            continue
        yield _skew(name, clock)


def _skew(name: str, clock: Clock) -> Result:
    least = abs(clock.ahead) - clock.within
    shown = (
        f"{name}'s clock is {abs(clock.ahead):.3f} s {'ahead of' if clock.ahead > 0 else 'behind'} "
        f"this host's, ± {clock.within:.3f} s"
    )
    remedy = "have both set their clocks by NTP (chrony, systemd-timesyncd): timedatectl"
    if least >= BAD_SKEW:
        return error(shown, remedy)
    return warning(shown, remedy) if least >= SKEW else ok(shown)


CHECKS: tuple[Check, ...] = (
    schema,
    outbox_lag,
    outbox_given_up,
    inbox_retention,
    durability,
    autovacuum,
    old_transactions,
    clock_skew,
)
