"""What a report of health amounts to: the named states of :mod:`~celery_jetstream.states`. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from .capabilities import ATOMIC_BATCHES
from .states import UNHEALTHY, State

__all__ = ("diagnose",)

#: Seconds without a turn after which a thread counts as hanging.
HUNG = 10.0
#: Seconds without an answer of the Celery broker's, or of a relay's database.
SILENT = 5.0
#: Seconds for which an event may be due in the outbox, or twice the interval of the flushes.
LATE = 60.0
#: Seconds for which a pull that had to be begun anew is worth a look.
RECENT = 600.0
#: Part of a stream's limits from which on it counts as nearly full.
NEARLY_FULL = 0.9


Report = Mapping[str, Any]


def diagnose(report: Report) -> list[State]:
    """The states of a report, the worst first; what is not known is no state."""
    states = [state for look in _LOOKS for state in look(report)]
    return sorted(states, key=lambda state: state.kind.severity != UNHEALTHY)


# -- this process ----------------------------------------------------------------------------------


def _connection(report: Report) -> Iterator[State]:
    connection = report["connection"]
    if connection["refused"]:
        yield State("refused", connection["error"])
    elif connection["state"] in ("connecting", "reconnecting"):
        why = f": {connection['error']}" if connection["error"] else ""
        urls = ", ".join(connection["urls"])
        yield State("not_connected", f"no connection to NATS at {urls}{why}")
    if (silent := connection["loop_silent"]) > HUNG:
        yield State("loop_hangs", f"the NATS connection's thread hangs for {silent:.0f} s")


def _bridge(report: Report) -> Iterator[State]:
    bridge = report.get("bridge")
    if bridge is None:
        return
    if bridge["phase"] != "running":
        yield State("not_pulling", f"the bridge is {bridge['phase']}")
    elif bridge["trouble"]:
        yield State("not_pulling", f"the bridge: {bridge['trouble']}")
    broker = bridge["broker"]
    if not broker["up"]:
        yield State("broker_away", f"the Celery broker is away: {broker['error']}")
    elif broker["silent"] > SILENT:
        silent = f"{broker['silent']:.0f} s"
        yield State("broker_away", f"the Celery broker has not answered for {silent}")
    for thread, ago in bridge["turned"].items():
        if bridge["phase"] == "running" and ago > HUNG:
            yield State("bridge_hangs", f"the bridge's {thread} thread hangs for {ago:.0f} s")
    for queue in bridge["crowded"]:
        here = bridge["queues"].get(queue, {"unclaimed": 0, "waiting": 0})
        yield State(
            "queue_crowded",
            f"queue {queue} has {here['unclaimed']} copies that no worker takes, and "
            f"{here['waiting']} more wait in the bridge",
        )


def _worker(report: Report) -> Iterator[State]:
    direct = report.get("direct")
    if direct is None:
        return
    if direct["trouble"]:
        yield State("not_pulling", f"the direct worker: {direct['trouble']}")
    restarted = direct["restarted_ago"]
    if restarted is not None and restarted < RECENT:
        yield State(
            "pull_restarted",
            f"the direct worker's pull ended and was begun anew, {direct['restarts']} times, "
            f"last {restarted:.0f} s ago: {direct['error']}",
        )
    if direct["full"]:
        yield State(
            "worker_full", f"{direct['waiting']} messages wait in the worker for an outage to end"
        )


def _paused(report: Report) -> Iterator[State]:
    for name in ("bridge", "direct"):
        if paused := (report.get(name) or {}).get("paused_handlers"):
            names = ", ".join(paused)
            yield State("handlers_paused", f"handlers pause, their database is away: {names}")


def _relay(report: Report) -> Iterator[State]:
    relay = report.get("relay")
    if relay is None:
        return
    if relay["trouble"]:
        yield State("relay_waits", f"the relay: {relay['trouble']}")
    elif relay["turned"] > HUNG:
        yield State("relay_waits", f"the relay's flush takes {relay['turned']:.0f} s by now")


# -- JetStream -------------------------------------------------------------------------------------


def _jetstream(report: Report) -> Iterator[State]:
    if report["unanswered"]:
        yield State("no_answer", report["unanswered"])
    server = report["server"]
    if server["error"]:
        absent = server["error_code"] == 503
        yield State("no_jetstream" if absent else "no_answer", f"JetStream: {server['error']}")
    for lack in server["lacks"]:
        if lack["asked_for"]:
            yield State(
                "feature_missing",
                f"{lack['setting']} is on, and nats-server {server['version']} has no "
                f"{lack['feature']} (from {lack['since']} on): {lack['instead']}",
            )


def _stream(report: Report) -> Iterator[State]:
    stream = report["stream"]
    name = stream["name"]
    if stream["error"]:
        missing = stream["exists"] is False
        text = f"stream {name}: {stream['error']}"
        yield State("stream_missing" if missing else "no_answer", text)
    for subject in stream["missing_subjects"]:
        yield State("stream_subjects", f"stream {name} does not take {subject}")
    if not stream["exists"]:
        return
    if stream["retention"] != "workqueue":
        kept = stream["retention"]
        yield State(
            "stream_retention", f"stream {name} is no work queue, but keeps messages by {kept}"
        )
    lacks = {lack["feature"] for lack in report["server"]["lacks"]}
    wanted = report["config"].get("outbox_atomic") and ATOMIC_BATCHES.name not in lacks
    if wanted and not stream["atomic"]:
        yield State(
            "feature_missing",
            f"jetstream_outbox_atomic is on, and stream {name} takes no atomic batches "
            f"(allow_atomic): {ATOMIC_BATCHES.instead}",
        )
    for what, most in (("bytes", stream["max_bytes"]), ("messages", stream["max_messages"])):
        if most and stream[what] >= NEARLY_FULL * most:
            yield State("stream_nearly_full", f"stream {name} has {stream[what]} of {most} {what}")
    if stream["replicas_offline"]:
        offline = ", ".join(stream["replicas_offline"])
        yield State("replicas_missing", f"stream {name} has replicas that are away: {offline}")


def _consumers(report: Report) -> Iterator[State]:
    for consumer in report["consumers"]:
        name = f"consumer {consumer['name']}"
        if consumer["error"]:
            missing = consumer["exists"] is False
            text = f"{name}: {consumer['error']}"
            yield State("consumer_missing" if missing else "no_answer", text)
        if consumer["stuck"]:
            count = consumer["stuck"]
            yield State(
                "stuck_messages",
                f"{name}: {count} messages are stuck: stored, and never delivered again",
            )
        if consumer["max_deliver"]:
            yield State(
                "consumer_gives_up",
                f"{name} has max_deliver={consumer['max_deliver']}: it gives messages up by "
                "itself, and leaves them in the stream until a bridge makes dead letters of them",
            )
        yield from _flow(consumer, name)


def _flow(consumer: Report, name: str) -> Iterator[State]:
    pending, unsettled = consumer["pending"], consumer["ack_pending"]
    most = consumer["max_ack_pending"]
    if most and unsettled >= most:
        yield State(
            "ack_pending_full",
            f"{name}: {unsettled} messages are delivered and not settled, as many as it may have "
            f"(max_ack_pending={most}); {pending} others wait",
        )
    if pending and not unsettled and consumer["taken"] is False:
        yield State("nobody_pulls", f"{name}: {pending} messages wait, and nobody asks for them")


def _dead_letters(report: Report) -> Iterator[State]:
    dead = report["dead_letters"]
    if dead["count"]:
        age = "" if dead["oldest"] is None else f", the oldest for {dead['oldest']:.0f} s"
        yield State("dead_letters", f"{dead['count']} dead letters on {dead['subject']}{age}")


def _too_big(report: Report) -> Iterator[State]:
    if count := report["too_big"]:
        yield State(
            "dead_letter_too_big",
            f"{count} messages are given up, and too big to become dead letters: they stay in the "
            "stream, and are tried again each hour",
        )


def _not_kept(report: Report) -> Iterator[State]:
    if error := report["not_kept"]:
        yield State("dead_letter_waits", f"a dead letter could not be stored: {error}")


# -- outbox and inbox ------------------------------------------------------------------------------


def _databases(report: Report) -> Iterator[State]:
    for name in ("outbox", "inbox"):
        found = report[name]
        if found is None:
            continue
        if found["error"]:
            yield State("database_away", found["error"])
        elif found["needed"] and "counts" not in found:
            yield State("tables_missing", f"the {name}'s tables are not there")
        elif found.get("differences") and "counts" in found:
            differences = "; ".join(found["differences"])
            yield State("tables_differ", f"the {name}'s tables: {differences}")


def _outbox(report: Report) -> Iterator[State]:
    outbox, breaker = report["outbox"] or {}, report["breaker"] or {}
    most = max(LATE, 2 * (report["config"].get("outbox_flush_interval") or 0))
    if (due := outbox.get("oldest_due") or 0) > most:
        yield State("outbox_late", f"an event has been due in the outbox for {due:.0f} s")
    counts = outbox.get("counts", {})
    given_up = {name: counts[name] for name in ("failed", "exception") if counts.get(name)}
    if given_up:
        parked = outbox.get("parked_keys")
        what = " and ".join(f"{count} {name}" for name, count in given_up.items())
        yield State(
            "outbox_given_up", f"the outbox has given events up: {what}; {parked} keys wait"
        )
    if breaker.get("outage"):
        yield State("breaker_open", f"the outbox waits: {breaker['outage']}")
    for subject, error in breaker.get("subjects", {}).items():
        yield State("breaker_open", f"the outbox leaves {subject} alone: {error}")


_LOOKS: tuple[Callable[[Report], Iterator[State]], ...] = (
    *(_connection, _bridge, _worker, _paused, _relay),
    *(_jetstream, _stream, _consumers, _dead_letters, _too_big, _not_kept),
    *(_databases, _outbox),
)
