"""What became of a publish: a verdict that says whose fault it is, if anybody's.

Receives a message and the server's answer (or what came instead of one); hands on a
:class:`PublishResult`. Pure.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from .events import Event
from .exceptions import EventError, NoResponders, PermissionDeniedError, PublishError

__all__ = (
    "Message",
    "PublishResult",
    "Verdict",
    "answered",
    "batch_answered",
    "failed",
    "takes_no_batches",
    "verdict_of",
)


class Verdict(str, Enum):
    """What became of a publish."""

    STORED = "stored"
    """JetStream has it, or had it: a duplicate."""
    OUTAGE = "outage"
    """Nobody's fault; try again for ever."""
    NO_STREAM = "no_stream"
    """No stream takes the subject, or one elects its leader: an outage until confirmed."""
    REFUSED = "refused"
    """This message, as it is, will never be stored."""
    UNKNOWN = "unknown"
    """Anything else: an answer that is no PubAck, or none yet."""
    BEHIND = "behind"
    """Not sent: an earlier one with the same key was not stored."""
    QUEUED = "queued"
    """A row of the outbox, to be published."""
    DENIED = "denied"
    """Our NATS user may not publish to the subject, or is not let in: tell who waits; a row waits
    until it may."""


TRANSIENT = frozenset({Verdict.OUTAGE, Verdict.NO_STREAM, Verdict.BEHIND})
"""The verdicts after which the same message is sent again."""

BY_ERROR_CODE: Mapping[int, Verdict] = {
    10002: Verdict.OUTAGE,  # JSAccountResourcesExceededErr; sent with 400
    10008: Verdict.OUTAGE,  # JSClusterNotAvailErr
    10009: Verdict.OUTAGE,  # JSClusterNotLeaderErr; sent with 500
    10023: Verdict.OUTAGE,  # JSInsufficientResourcesErr
    10028: Verdict.OUTAGE,  # JSMemoryResourcesExceededErr; sent with 500
    10039: Verdict.OUTAGE,  # JSNotEnabledForAccountErr
    10047: Verdict.OUTAGE,  # JSStorageResourcesExceededErr; sent with 500
    10054: Verdict.REFUSED,  # JSStreamMessageExceedsMaximumErr
    10059: Verdict.NO_STREAM,  # JSStreamNotFoundErr
    10060: Verdict.REFUSED,  # JSStreamNotMatchErr
    10063: Verdict.OUTAGE,  # JSStreamSequenceNotMatchErr: a replica's count, not the publisher's
    10070: Verdict.REFUSED,  # JSStreamWrongLastMsgIDErrF
    10071: Verdict.REFUSED,  # JSStreamWrongLastSequenceErrF
    10076: Verdict.OUTAGE,  # JSNotEnabledErr
    10077: Verdict.OUTAGE,  # JSStreamStoreFailedF: the stream is full and discards new messages
    10097: Verdict.REFUSED,  # JSStreamHeaderExceedsMaximumErr
    10109: Verdict.REFUSED,  # JSStreamSealedErr
    10111: Verdict.REFUSED,  # JSStreamRollupFailedF; sent with 500
    10118: Verdict.OUTAGE,  # JSStreamOfflineErr; sent with 500
    10120: Verdict.OUTAGE,  # JSNoLimitsErr: the account lost its limits; sent with 400
    10158: Verdict.OUTAGE,  # JSStreamDuplicateMessageConflict: the id is being stored; with 409
    10163: Verdict.OUTAGE,  # JSStreamExpectedLastSeqPerSubjectNotReady
    10164: Verdict.REFUSED,  # JSStreamWrongLastSequenceConstantErr
    10165: Verdict.REFUSED,  # JSMessageTTLInvalidErr
    10166: Verdict.REFUSED,  # JSMessageTTLDisabledErr
    10167: Verdict.OUTAGE,  # JSStreamTooManyRequests
    10193: Verdict.REFUSED,  # JSStreamExpectedLastSeqPerSubjectInvalid
    10194: Verdict.OUTAGE,  # JSStreamOfflineReasonErrF; sent with 500
}
"""By the server's ``err_code``: what a publish can be answered with, by nats-server 2.9 to 2.15."""

BY_STATUS: Mapping[int, Verdict] = {
    400: Verdict.REFUSED,
    404: Verdict.NO_STREAM,
    408: Verdict.OUTAGE,
    412: Verdict.REFUSED,
    429: Verdict.OUTAGE,
    503: Verdict.OUTAGE,
}
"""By the status of an answer whose ``err_code`` is not among those."""

_BY_ERROR = {EventError: Verdict.REFUSED, PermissionDeniedError: Verdict.DENIED}


@dataclass(frozen=True)
class Message:
    """What is sent, byte for byte, at each attempt; ``event`` where it carries one of ours."""

    event_id: str
    subject: str
    body: bytes
    headers: dict[str, str]
    event: Event | None = None

    @property
    def log_fields(self) -> dict[str, Any]:
        """What a line about it has in its ``extra``."""
        event_type = None if self.event is None else self.event.event_type
        return {"event_id": self.event_id, "event_type": event_type, "subject": self.subject}


@dataclass(frozen=True)
class PublishResult:
    """What became of one event.

    Attributes:
        success: JetStream has stored it (or had already: ``duplicate``), or will (``queued``).
        event_id: the envelope's, also the ``Nats-Msg-Id``.
        subject: where it was sent.
        stream: the stream that has it.
        sequence: its number in the stream.
        duplicate: the stream had this ``event_id`` within its duplicate window.
        error: why it is not stored, as text.
        verdict: what became of it, for programs.
        error_code: the server's ``err_code``, where it gave one.
        queued: it is a row of the outbox, and not yet in JetStream.
    """

    success: bool
    event_id: str
    subject: str
    stream: str | None = None
    sequence: int | None = None
    duplicate: bool = False
    error: str | None = None
    verdict: Verdict = Verdict.UNKNOWN
    error_code: int | None = None
    queued: bool = False

    def __bool__(self) -> bool:
        return self.success

    @property
    def transient(self) -> bool:
        """An outage, not a refusal; try again with the same ``event_id``."""
        return self.verdict in TRANSIENT

    def raise_for_error(self) -> PublishResult:
        """Returns itself; raises :class:`PublishError` where the event is not stored."""
        if not self.success:
            raise PublishError(
                f"event {self.event_id} was not published to {self.subject}: {self.error}",
                event_id=self.event_id,
                subject=self.subject,
                transient=self.transient,
            )
        return self

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as Celery's result backends want them."""
        return {**vars(self), "verdict": self.verdict.value, "transient": self.transient}


def answered(message: Message, answer: bytes) -> PublishResult:
    """What the server's answer says of a message: a PubAck or an error."""
    try:
        ack = json.loads(answer.decode())
        problem = ack.get("error")
        stream, sequence = ack.get("stream"), ack.get("seq")
    except (ValueError, AttributeError):
        return failed(message, Verdict.UNKNOWN, "the answer is no PubAck")
    if isinstance(problem, dict):
        return _complaint(message, problem)
    if problem or not (isinstance(stream, str) and isinstance(sequence, int)):
        return failed(message, Verdict.UNKNOWN, "the answer is no PubAck")
    return PublishResult(
        True,
        message.event_id,
        message.subject,
        stream,
        sequence,
        bool(ack.get("duplicate")),
        verdict=Verdict.STORED,
    )


def batch_answered(
    messages: Sequence[Message], batch: str, answer: bytes
) -> list[PublishResult] | None:
    """What the answer to the last message of an atomic batch says of all of them.

    Args:
        messages: of the batch, in its order.
        batch: its ``Nats-Batch-Id``.
        answer: to the last one.

    Returns:
        A result for each; None where the batch was refused, and each may be sent by itself. Also
        where the answer does not name the batch: an old server took each message for itself.
    """
    last = answered(messages[-1], answer)
    if last.success and json.loads(answer).get("batch") == batch and last.sequence:
        first = last.sequence - len(messages) + 1
    elif last.transient:
        first = None
    else:
        return None
    return [
        replace(
            last,
            event_id=message.event_id,
            subject=message.subject,
            sequence=None if first is None else first + place,
        )
        for place, message in enumerate(messages)
    ]


def takes_no_batches(answer: bytes) -> bool:
    """Whether an atomic batch was refused because the stream takes none."""
    with contextlib.suppress(ValueError, AttributeError):
        found = json.loads(answer).get("error", {}).get("err_code")
        return bool(found == 10174)  # JSAtomicPublishDisabledErr
    return False


def failed(
    message: Message, why: Verdict | Exception, text: str = "", error_code: int | None = None
) -> PublishResult:
    """A message that is not stored: for a verdict with its text, or for what was raised.

    A server that refuses our credentials is an outage here: no message is at fault.
    """
    if isinstance(why, NoResponders):
        why = Verdict.NO_STREAM
        text = (
            f"no stream takes the subject {message.subject}: is it provisioned ('celery -A … "
            "jetstream provision'), is JetStream up?"
        )
    elif isinstance(why, Exception):
        text = str(why)
        why = next((v for kind, v in _BY_ERROR.items() if isinstance(why, kind)), Verdict.OUTAGE)
    return PublishResult(
        False, message.event_id, message.subject, error=text, verdict=why, error_code=error_code
    )


def verdict_of(status: object, error_code: object) -> Verdict:
    """The verdict on an error of the server: by its ``err_code``, else by its status."""
    if isinstance(error_code, int) and error_code in BY_ERROR_CODE:
        return BY_ERROR_CODE[error_code]
    return BY_STATUS.get(status, Verdict.UNKNOWN) if isinstance(status, int) else Verdict.UNKNOWN


def _complaint(message: Message, problem: Mapping[str, Any]) -> PublishResult:
    code = problem.get("err_code")
    words = str(problem.get("description", "refused"))
    words = words.encode(errors="backslashreplace").decode()  # for logs: they are written as UTF-8
    return failed(
        message,
        verdict_of(problem.get("code"), code),
        f"{words} (error {'?' if code is None else code})",
        code if isinstance(code, int) else None,
    )
