"""The doctor's checks of the stream: what of it loses, doubles or refuses events. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from .capabilities import parse
from .facts import Facts, Unknown, known, seconds_of, span
from .findings import Check, Result, check, error, ok, warning
from .specs import Configuration

__all__ = ("CHECKS",)

#: Of the duplicate window, what the outbox's retries may take.
HEADROOM = 0.5
#: Seconds of max_age that a weekend fits into.
WEEKEND = 3 * 86400.0
#: Of a limit, how much may be taken before that is said.
FULL = 0.8
#: The first version with a setting for it; and what those before do.
OLD = (2, 10, 0)
OLD_SYNC = {"nats-server 2.9": "120 s"}
#: Seconds in which a replica that is there was heard of; they speak every second.
SILENCE = 5.0
PROVISION = "run 'celery -A … jetstream provision'"


@check("topology", "What is missing or another way is found out by the first event.")
def topology(facts: Facts) -> Iterator[Result]:
    if isinstance(facts.plan, str):
        yield error(facts.plan, "do as it says: nothing can be provisioned so")
        return
    changes = [change for change in known(facts.plan).changes if change.action != "none"]
    for change in changes:
        lines = [line.strip() for one in change.differences for line in one.lines()]
        found = f"{change.kind} {change.name}: {'; '.join(lines)}"
        if change.action == "create":
            yield error(f"{change.kind} {change.name} is not there", PROVISION)
        else:
            yield warning(f"{found} (found -> wanted)", f"{PROVISION}; --dry-run shows it first")
    if not changes:
        yield ok("stream and consumers are as the settings want them")


@check("stream-storage", "What is in memory is gone with the server's next restart.")
def stream_storage(facts: Facts) -> Iterator[Result]:
    name, storage = facts.made["name"], facts.made.get("storage")
    if storage == "memory":
        yield error(
            f"stream {name} keeps its messages in memory",
            "it cannot be changed in place: empty and delete the stream, then " + PROVISION,
        )
    else:
        yield ok(f"stream {name} is on disk")


@check(
    "stream-limits",
    "A stream that is full deletes its oldest messages: events that nobody has handled, and dead "
    "letters.",
)
def stream_limits(facts: Facts) -> Iterator[Result]:
    made, state = facts.made, known(facts.stream)["state"]
    taken = {"max_msgs": state["messages"], "max_bytes": state["bytes"], "max_msgs_per_subject": 0}
    limits = {name: made[name] for name in taken if made.get(name, -1) > 0}
    shown = ", ".join(f"{name} {value}" for name, value in limits.items())
    full = [name for name, most in limits.items() if taken[name] >= FULL * most]
    if not limits:
        yield ok("no limit of messages or bytes")
    elif made.get("discard") != "new":
        yield error(
            f"discard is old with {shown}",
            "set discard to new (publishers then wait, and the outbox loses nothing), or take the "
            "limits off: nats stream edit",
        )
    elif full:
        yield warning(
            f"{taken[full[0]]} of {full[0]} {limits[full[0]]}",
            "see why messages are not handled (jetstream status), or raise the limit",
        )
    else:
        yield ok(f"discard is new with {shown}: a full stream refuses, and loses nothing")


@check("stream-max-age", "The stream deletes what is older, handled or not, and dead letters too.")
def stream_max_age(facts: Facts) -> Iterator[Result]:
    age = seconds_of(facts.made.get("max_age"))
    if not age:
        yield ok("messages are kept until they are handled")
    elif age < WEEKEND:
        yield warning(
            f"max_age is {span(age)}",
            "set jetstream_max_age to 3d or more: an outage over a weekend, and dead "
            "letters that somebody shall look at, fit into that",
        )
    else:
        yield ok(f"max_age is {span(age)}")


@check(
    "replicas",
    "One copy is as lasting as one disk; of three, one may be lost. What a server does not "
    "follow, it cannot take over.",
)
def replicas(facts: Facts) -> Iterator[Result]:
    cluster, count = known(facts.server).cluster, facts.made.get("num_replicas", 1)
    wanted = facts.config.num_replicas
    peers = (known(facts.stream).get("cluster") or {}).get("replicas") or []
    behind = [peer["name"] for peer in peers if not _follows(peer)]
    if wanted is not None and wanted != count:
        yield error(f"{count} replicas, and jetstream_num_replicas is {wanted}", PROVISION)
    elif behind:
        yield warning(
            f"{count} replicas, of which do not follow: {', '.join(behind)}",
            "see what becomes of these servers: nats server report jetstream",
        )
    elif cluster and count == 1:
        yield warning(
            f"1 replica, in the cluster {cluster}",
            f"set jetstream_num_replicas to 3 and {PROVISION}",
        )
    else:
        yield ok(f"{count} replica{'s' if count > 1 else ''}")


def _follows(peer: Configuration) -> bool:
    """The leader calls one that is gone current for some ten seconds more."""
    silent = seconds_of(peer.get("active")) > SILENCE
    return bool(peer.get("current")) and not peer.get("offline") and not silent


@check(
    "sync-interval",
    "A server confirms a message before it is on disk: a power loss (not a crash) takes what it "
    "confirmed since the last sync, unless another replica has it.",
)
def sync_interval(facts: Facts) -> Iterator[Result]:
    count = 1 if isinstance(facts.stream, Unknown) else facts.made.get("num_replicas", 1)
    values = OLD_SYNC if _is_old(facts) else known(facts.syncs)
    shown = ", ".join(f"{server}: {value}" for server, value in values.items())
    if count > 1 or all(value == "always" for value in values.values()):
        yield ok(f"{shown}; {count} replica{'s' if count > 1 else ''}")
    else:
        yield warning(
            f"{shown}; 1 replica",
            "set 'sync_interval: always' in the server's jetstream block (a third of the rate), or "
            "have three replicas; after a power loss 'jetstream outbox replay' sends again",
        )


def _is_old(facts: Facts) -> bool:
    """A server of 2.9 does not say it, and has no setting for it."""
    return not isinstance(facts.server, Unknown) and (parse(facts.server.version) or OLD) < OLD


@check(
    "duplicate-window",
    "Rows of a flusher that was killed, or whose answer was lost, go out again after the lease; "
    "outside the window JetStream stores them twice.",
)
def duplicate_window(facts: Facts) -> Iterator[Result]:
    config = facts.config
    if not config.has_database:
        yield ok(f"{span(facts.window)}; no outbox")
        return
    retries = config.outbox_lease + config.outbox_flush_interval + config.outbox_max_seconds
    shown = (
        f"the stream's window is {span(facts.window)}, a killed flusher's rows go out again after "
        f"up to {span(retries)} (jetstream_outbox_lease + _flush_interval + _max_seconds)"
    )
    remedy = (
        f"set jetstream_duplicate_window to {retries / HEADROOM:g} or more and {PROVISION}; "
        "handlers with an inbox are not harmed by what is stored twice"
    )
    if facts.window <= retries:
        yield error(shown, remedy)
    elif facts.window * HEADROOM < retries:
        yield warning(shown, remedy)
    else:
        yield ok(shown)


CHECKS: tuple[Check, ...] = (
    topology,
    stream_storage,
    stream_limits,
    stream_max_age,
    replicas,
    sync_interval,
    duplicate_window,
)
