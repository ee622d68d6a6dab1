"""The states that health has names for, each with what to do about it. Pure.

A state is *unhealthy* where events do not get through, or not as the settings promise; *degraded*
where they do, and somebody should look. Some also say that this process is not ready (it takes
nothing now), or not alive (only a new start helps).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

__all__ = ("CODES", "DEGRADED", "HEALTHY", "UNHEALTHY", "Code", "State", "overall")

HEALTHY, DEGRADED, UNHEALTHY = "healthy", "degraded", "unhealthy"


@dataclass(frozen=True)
class Code:
    """A kind of state.

    Attributes:
        severity: ``unhealthy`` or ``degraded``.
        remedy: what to do.
        ready: whether this process still does its work.
        alive: False where only a new start of this process helps.
    """

    severity: str
    remedy: str
    ready: bool = True
    alive: bool = True


@dataclass(frozen=True)
class State:
    """One thing that is not as it should be.

    Attributes:
        code: a key of :data:`CODES`.
        text: what it is, with names and numbers.
    """

    code: str
    text: str

    @property
    def kind(self) -> Code:
        """What there is to know of the code."""
        return CODES[self.code]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        kind = self.kind
        return {
            "code": self.code,
            "severity": kind.severity,
            "text": self.text,
            "remedy": kind.remedy,
            "ready": kind.ready,
            "alive": kind.alive,
        }


_PROVISION = "run 'celery -A … jetstream provision'"

CODES: dict[str, Code] = {
    # this process
    "not_connected": Code(
        UNHEALTHY, "start the NATS servers, or mend the way to them; it connects by itself", False
    ),
    "refused": Code(
        UNHEALTHY,
        "correct user, password, token, creds or TLS in jetstream_nats_urls or "
        "jetstream_nats_options",
        False,
    ),
    "loop_hangs": Code(
        UNHEALTHY,
        "a signal's receiver or a hook blocks the connection's thread: hand its work to a task; "
        "start the process again",
        False,
        False,
    ),
    "bridge_hangs": Code(UNHEALTHY, "start the bridge again, and tell us", False, False),
    "not_pulling": Code(
        UNHEALTHY,
        "have what NATS denies it allowed (provision --print-permissions), see the other states "
        "and its log; it goes on trying by itself",
        False,
    ),
    "broker_away": Code(
        UNHEALTHY, "start the Celery broker; messages wait in the bridge until then", False
    ),
    "relay_waits": Code(
        DEGRADED, "bring its database or NATS back; rows wait, and no attempt is spent", False
    ),
    "pull_restarted": Code(DEGRADED, "a defect of ours: tell us what its log says"),
    "handlers_paused": Code(
        DEGRADED, "bring their database back; they go on by themselves, nothing is given up"
    ),
    "queue_crowded": Code(
        DEGRADED, "start a worker for the queue, or more of them (celery -A … worker -Q …)"
    ),
    "worker_full": Code(
        DEGRADED, "bring the database back that its handlers wait for; it takes nothing until then"
    ),
    # JetStream
    "no_jetstream": Code(UNHEALTHY, "start nats-server with -js, or give the account JetStream"),
    "no_answer": Code(
        UNHEALTHY, "look at the NATS servers: hung, without a leader, or very slow; ask again"
    ),
    "stream_missing": Code(UNHEALTHY, _PROVISION),
    "stream_subjects": Code(UNHEALTHY, _PROVISION),
    "stream_retention": Code(
        UNHEALTHY, "use another jetstream_stream_name, or make the stream anew as a work queue"
    ),
    "consumer_missing": Code(UNHEALTHY, f"{_PROVISION}, or start a bridge"),
    "stuck_messages": Code(
        UNHEALTHY,
        "set the consumer's max_deliver to -1 and let a bridge run, which makes dead letters of "
        "them",
    ),
    "feature_missing": Code(
        UNHEALTHY, "use a newer nats-server, or leave the setting out; then provision again"
    ),
    "consumer_gives_up": Code(DEGRADED, "set the consumer's max_deliver to -1"),
    "ack_pending_full": Code(
        DEGRADED, "let workers settle what they have, add workers, or raise max_ack_pending"
    ),
    "nobody_pulls": Code(
        DEGRADED,
        "start a bridge (celery -A … jetstream bridge), or a direct worker; or see the log and "
        "/readyz of the one that runs",
    ),
    "stream_nearly_full": Code(
        DEGRADED, "handle or purge what is stored, or raise the stream's limits"
    ),
    "replicas_missing": Code(
        DEGRADED, "bring the NATS servers back that have the stream's other replicas"
    ),
    "dead_letters": Code(
        DEGRADED, "find out why (celery -A … jetstream dlq list), then redrive or purge them"
    ),
    "dead_letter_too_big": Code(
        DEGRADED, "raise jetstream_max_payload, and the server's max_payload, for a while"
    ),
    "dead_letter_waits": Code(
        DEGRADED, "see why; its message is not lost, and comes again until it can be kept"
    ),
    # outbox and inbox
    "database_away": Code(
        UNHEALTHY, "bring the database back; nothing is lost, and it is used again by itself"
    ),
    "tables_missing": Code(
        UNHEALTHY, "run 'celery -A … jetstream outbox init' and 'inbox init', or your migrations"
    ),
    "tables_differ": Code(DEGRADED, "migrate the tables: 'jetstream outbox status' says what"),
    "outbox_late": Code(
        DEGRADED, "let beat (celery -A … worker -B) or a relay flush it; see the breaker"
    ),
    "outbox_given_up": Code(
        DEGRADED, "see 'jetstream outbox list --status failed'; then retry or cancel"
    ),
    "breaker_open": Code(
        DEGRADED, "NATS, or the stream of that subject, must be there: provision; it tries on"
    ),
}


def overall(states: Iterable[State]) -> str:
    """``healthy``, ``degraded`` or ``unhealthy``."""
    severities = {state.kind.severity for state in states}
    return next((word for word in (UNHEALTHY, DEGRADED) if word in severities), HEALTHY)
