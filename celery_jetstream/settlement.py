"""How a task's end becomes a settlement: one pure function, :func:`decide`.

No clock, socket or randomness: what it needs of those is given to it. Acting on a settlement is
:mod:`celery_jetstream.settler`'s work.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone

from billiard.exceptions import Terminated
from celery.exceptions import Ignore, Reject, Retry

from .exceptions import PayloadError

__all__ = ("Ack", "DeadLetter", "End", "Nak", "Policy", "Settlement", "decide")


@dataclass(frozen=True)
class Ack:
    """The message is done with; JetStream removes it."""


@dataclass(frozen=True)
class Nak:
    """The message is to come again after ``delay`` seconds.

    Attributes:
        delay: in seconds.
        pause: the handler that a bridge dispatches no more to for a while; "" for none.
    """

    delay: float = 0.0
    pause: str = ""


@dataclass(frozen=True)
class DeadLetter:
    """The message is given up and kept on the dead-letter subject with its reason.

    Attributes:
        reason: one word, as ``x-dlq-reason`` has it.
        error_class: the error's class; "" where none was raised.
        error_message: its text, or what else there is to say.
        handler: the task's name, filled in when it is settled; "" where there is none.
    """

    reason: str
    error_class: str = ""
    error_message: str = ""
    handler: str = field(default="", compare=False)


Settlement = Ack | Nak | DeadLetter


#: Deliveries beyond the limit before a message is given up unrun: each end of a bridge or worker
#: that has the message, begun or not, costs it a delivery, and five deploys without a worker must
#: not make a dead letter of what never ran.
HAND_BACKS = 10
#: The same where an inbox counts the attempts: then the deliveries mean little.
HAND_BACKS_WITH_INBOX = 100


class End(enum.Enum):
    """The ends of a task that are not an exception."""

    RETURNED = "returned"
    REVOKED = "revoked"
    EXPIRED = "the copy's lease was over before a worker had it"
    UNKNOWN_TASK = "this worker does not know the task, or cannot read the copy"
    DUPLICATE = "a duplicate of one that is running"
    NOT_BEGUN = "the worker stops before the task began"
    CUT_OFF = "the worker ended at once, and the task with it"
    OUTAGE = "the inbox's database is away"
    CONFLICT = "a transaction lost against another"


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What a handler and its app settle by; durations are seconds.

    Attributes:
        limit: the handler's ``max_retries + 1`` where given, else ``jetstream_max_deliver``;
            None for no limit.
        backoff: the delay after the first, second, … attempt; the last one repeats.
        ack_wait: the consumer's ``ack_wait``.
        unrecoverable: errors that trying again does not mend.
        outages: errors that say nothing about the event, only about what is around it.
        handler: the task's name.
        hand_backs: deliveries beyond the limit before a message is given up unrun.
    """

    limit: int | None = 5
    backoff: tuple[float, ...] = (1.0, 5.0, 15.0, 30.0, 60.0)
    ack_wait: float = 30.0
    unrecoverable: tuple[type[BaseException], ...] = field(
        default=(TypeError, ValueError, NameError, AttributeError)
    )
    outages: tuple[type[BaseException], ...] = ()
    handler: str = ""
    hand_backs: int = HAND_BACKS

    def delay(self, attempt: int) -> float:
        """Seconds to wait after attempt number ``attempt`` (1 is the first)."""
        return self.backoff[min(max(attempt, 1), len(self.backoff)) - 1]

    def left(self, attempt: int) -> bool:
        """Whether another attempt may follow this one."""
        return self.limit is None or attempt < self.limit

    def spent(self, num_delivered: int) -> bool:
        """Whether it was delivered so often that its attempts cannot have ended.

        A message that takes its whole worker down each time is never settled by it, so there
        must be an end without its help. Deliveries that never became an attempt have
        ``hand_backs`` of their own.
        """
        return self.limit is not None and num_delivered > self.limit + self.hand_backs


def decide(
    end: End | BaseException | Settlement,
    policy: Policy,
    attempt: int,
    *,
    exhausted: bool = False,
    jitter: float = 1.0,
    now: datetime | None = None,
) -> Settlement | None:
    """The settlement of a message whose task ended like this.

    Args:
        end: how it ended: an :class:`End`, the exception that the task raised (or that Celery
            raised about it: ``WorkerLostError``, ``TimeLimitExceeded``), or a settlement that
            a middleware returned, which stands as it is.
        policy: the handler's.
        attempt: 1 for the first.
        exhausted: ``self.retry()`` (or ``autoretry_for``) found no attempt left.
        jitter: 0 to 1, multiplies the delay after an outage so that not all come back at once.
        now: the time that a ``Retry(when=datetime)`` counts from.

    Returns:
        The settlement; None where nothing is to be sent (``End.EXPIRED``: the bridge has, or
        will have, dispatched another copy of the same delivery).
    """
    if isinstance(end, Settlement):
        settlement: Settlement | None = end
    elif isinstance(end, End):
        settlement = _of_end(end, policy, attempt, jitter)
    else:
        settlement = _of_error(end, policy, attempt, exhausted, jitter, now)
    if isinstance(settlement, DeadLetter):
        return replace(settlement, handler=settlement.handler or policy.handler)
    return settlement


def _of_end(end: End, policy: Policy, attempt: int, jitter: float) -> Settlement | None:
    match end:
        case End.RETURNED:
            return Ack()
        case End.REVOKED:
            return DeadLetter("revoked")
        case End.UNKNOWN_TASK:
            return Nak(policy.delay(attempt))
        case End.DUPLICATE:
            return Nak(policy.ack_wait)
        case End.NOT_BEGUN | End.CUT_OFF:
            return Nak(0.0)
        case End.CONFLICT:
            return Nak(_jittered(policy, attempt, jitter))
        case End.OUTAGE:
            return Nak(_jittered(policy, attempt, jitter), pause=policy.handler)
        case End.EXPIRED:
            return None


def _of_error(
    error: BaseException,
    policy: Policy,
    attempt: int,
    exhausted: bool,
    jitter: float,
    now: datetime | None,
) -> Settlement:
    if isinstance(error, Reject):
        return Nak(policy.delay(attempt)) if error.requeue else _dead("rejected", error)
    if isinstance(error, Retry):
        if policy.left(attempt):
            return Nak(_seconds_until(error.when, now, policy.delay(attempt)))
        return _dead("max_deliveries_exceeded", error.exc or error)
    if isinstance(error, (Ignore, Terminated, PayloadError)):
        return _at_once(error)
    if isinstance(error, policy.outages):
        return Nak(_jittered(policy, attempt, jitter))
    if exhausted:
        return _dead("max_deliveries_exceeded", error)
    if isinstance(error, policy.unrecoverable) and not isinstance(error, OSError):
        return _dead("unrecoverable_error", error)
    if policy.left(attempt):
        return Nak(policy.delay(attempt))
    return _dead("max_deliveries_exceeded", error)


def _at_once(error: Ignore | Terminated | PayloadError) -> Settlement:
    if isinstance(error, Ignore):
        return Ack()
    if isinstance(error, Terminated):
        return DeadLetter("revoked")
    return _dead("invalid_payload", error)


def _jittered(policy: Policy, attempt: int, jitter: float) -> float:
    return policy.delay(attempt) * (0.5 + jitter / 2)


def _dead(reason: str, error: BaseException) -> DeadLetter:
    cause = error.reason if isinstance(error, Reject) and error.reason is not None else error
    name = type(error).__name__ if isinstance(error, Reject) else type(cause).__name__
    return DeadLetter(reason, name, str(cause))


def _seconds_until(when: object, now: datetime | None, default: float) -> float:
    if isinstance(when, datetime):
        now = now or datetime.now(timezone.utc)
        if when.tzinfo is None:
            when = when.replace(tzinfo=now.tzinfo)
        return max(0.0, (when - now).total_seconds())
    if isinstance(when, (int, float)):
        return max(0.0, float(when))
    return default
