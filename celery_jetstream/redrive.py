"""Redrive: a dead letter is sent again to where it came from. ``jetstream.dead_letters``.

Page by page: read, send, delete what JetStream has confirmed. Killed in between, a letter is there
still, and the next redrive sends it with the same ``Nats-Msg-Id``: the stream drops the second.
That id is made of the letter's number and its count of redrives. It is not the event's, which the
duplicate window may know still and would swallow; and not a random one, which would double what was
sent and not yet deleted. A letter's number is never given again, so that an event that dies anew,
and is redriven anew, has another. Once the window is over, an inbox is the guard.
"""

from __future__ import annotations

import getpass
import hashlib
import logging
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from typing import Any

from . import subjects
from .deadletter import REDRIVES
from .deadletter_admin import DeadLetterAdmin
from .exceptions import EventError, NotConnectedError, PermissionDeniedError, SubjectError
from .headers import CONTROL
from .letters import StoredDeadLetter
from .outcomes import Message, PublishResult, Verdict
from .publisher import Publisher

__all__ = ("Redrive", "RedriveResult", "message_of", "who")

logger = logging.getLogger(__name__)

#: Seconds for which one page is tried to be sent: an election takes 4 to 6.
TIMEOUT = 15.0
#: Problems that a result tells of.
MOST_PROBLEMS = 20


@dataclass(frozen=True)
class RedriveResult:
    """What a redrive did.

    Attributes:
        redriven: events that JetStream has stored again (``dry_run``: would be sent).
        duplicates: those of them that an earlier redrive had sent, and was killed then.
        skipped: dead letters that were passed over, and are kept.
        problems: why; of the first 20.
        last_sequence: all that was asked for up to this number is done.
        error: why it ended before the end; None where it came there.
        denied: since our NATS user may not; to repeat it does not help then.
    """

    redriven: int = 0
    duplicates: int = 0
    skipped: int = 0
    problems: tuple[str, ...] = ()
    last_sequence: int = 0
    error: str | None = None
    denied: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "problems": list(self.problems)}


class Redrive:
    """One redrive.

    Args:
        letters: the dead letters.
        publisher: the process's.
        subject: where to, in place of where they came from.
        by: who sends them again.
        most: how often one event may be sent again.
        force: more often, too.
        forget: has the inbox forget that an event is processed; None where it is not to.
        dry_run: send nothing.

    Raises:
        SubjectError: ``subject`` is none that can be published to.
    """

    def __init__(
        self,
        letters: DeadLetterAdmin,
        publisher: Publisher,
        *,
        subject: str | None,
        by: str,
        most: int,
        force: bool,
        forget: Callable[[str], object] | None,
        dry_run: bool,
    ) -> None:
        if subject is not None:
            subjects.validate_subject(subject)
        self._letters = letters
        self._publisher = publisher
        self._subject = subject
        self._by = by
        self._most = most
        self._force = force
        self._forget = forget
        self._dry_run = dry_run
        self._is_own = letters.app_name == letters.config.app_name
        self._without_stream: set[str] = set()
        self.result = RedriveResult()

    @property
    def done(self) -> int:
        """Dead letters that it has dealt with."""
        return self.result.redriven + self.result.skipped

    def parts(
        self, page: Sequence[StoredDeadLetter], size: int, limit: int | None
    ) -> Iterator[Sequence[StoredDeadLetter]]:
        """A page in parts of so many, up to the limit of all."""
        for first in range(0, len(page), size):
            left = None if limit is None else limit - self.done
            yield page[first : first + size][:left]

    def ended(self, error: str, *, denied: bool = False) -> RedriveResult:
        """The result of one that ended early."""
        self.result = replace(self.result, error=error, denied=denied)
        return self.result

    def reached(self, sequence: int) -> None:
        """All up to this number is done."""
        self.result = replace(self.result, last_sequence=sequence)

    def send(self, letters: Sequence[StoredDeadLetter], *, edited: bool = False) -> None:
        """Sends one page and deletes what is stored; what cannot be sent stays, and says why."""
        ready = [
            (letter, message)
            for letter in letters
            if (message := self._message(letter, edited)) is not None
        ]
        if self._dry_run or not ready:
            self.result = replace(self.result, redriven=self.result.redriven + len(ready))
        else:
            self._send(ready)
        if letters and not self.result.error:
            self.reached(letters[-1].sequence)

    def _message(self, letter: StoredDeadLetter, edited: bool) -> Message | None:
        try:
            if letter.redrives >= self._most and not self._force:
                raise EventError(
                    f"it was redriven {letter.redrives} times, and jetstream_max_redrives is "
                    f"{self._most}: mend what fails, then --force"
                )
            message = message_of(
                letter,
                self._letters.config.stream_name,
                self._letters.app_name,
                self._by,
                subject=self._subject,
                edited=edited,
                to_gem=not self._is_own and not letter.is_ours,
            )
            if self._is_own and not self._subject and not self._takes(message.subject):
                raise SubjectError(
                    f"{message.subject} is of no app in jetstream_sources or "
                    "jetstream_destination_app: its event would wait there, and nobody takes it. "
                    "Name its app there, or give the subject (--subject)",
                    subject=message.subject,
                )
            if message.subject in self._without_stream:
                raise EventError(f"no stream takes its subject {message.subject}")
        except (EventError, SubjectError) as error:
            self._skip(letter, str(error))
            return None
        return message

    def _takes(self, subject: str) -> bool:
        """Whether this app takes what comes there; no more, where an app got another name."""
        return subject in self._letters.config.consume_subjects

    def _send(self, ready: Sequence[tuple[StoredDeadLetter, Message]]) -> None:
        if self._forget is not None:
            for event_id in filter(None, (letter.event_id for letter, _ in ready)):
                self._forget(event_id)
        messages = [message for _, message in ready]
        results = self._letters.connection.run(self._publisher.send, messages, TIMEOUT)
        stored = []
        for (letter, message), result in zip(ready, results, strict=True):
            if result.success:
                stored.append((letter, message, result))
            else:
                self._failed(letter, result)
        if not stored:
            return
        try:
            self._letters.store.remove([letter.sequence for letter, _, _ in stored])
        except NotConnectedError as error:
            told = f"{len(stored)} events are sent, and perhaps not deleted here: {error}"
            self.ended(told, denied=isinstance(error, PermissionDeniedError))
            return
        self._count(stored)

    def _failed(self, letter: StoredDeadLetter, result: PublishResult) -> None:
        if result.verdict is Verdict.NO_STREAM:
            self._without_stream.add(result.subject)
        elif result.transient or result.verdict is Verdict.DENIED:
            denied = result.verdict is Verdict.DENIED
            self.ended(result.error or "it was not sent", denied=denied)
            return
        self._skip(letter, result.error or "it was refused")

    def _count(self, stored: Sequence[tuple[StoredDeadLetter, Message, PublishResult]]) -> None:
        for letter, message, _ in stored:
            logger.info(
                "dead letter %d is redriven to %s by %s",
                letter.sequence,
                message.subject,
                self._by,
                extra={
                    "event_id": letter.event_id,
                    "event_type": letter.event_type,
                    "handler": letter.handler,
                    "reason": letter.reason,
                    "redrives": letter.redrives + 1,
                },
            )
        self.result = replace(
            self.result,
            redriven=self.result.redriven + len(stored),
            duplicates=self.result.duplicates + sum(one.duplicate for _, _, one in stored),
        )

    def _skip(self, letter: StoredDeadLetter, why: str) -> None:
        told = f"dead letter {letter.sequence} (event {letter.event_id or 'without id'}): {why}"
        logger.info("not redriven: %s", told, extra={"event_id": letter.event_id})
        problems = (*self.result.problems, told)[:MOST_PROBLEMS]
        self.result = replace(self.result, skipped=self.result.skipped + 1, problems=problems)


def message_of(
    letter: StoredDeadLetter,
    stream: str,
    app_name: str,
    by: str,
    *,
    subject: str | None = None,
    edited: bool = False,
    to_gem: bool = False,
    now: datetime | None = None,
) -> Message:
    """What a dead letter is sent as: the original's bytes and headers, and who sent it again.

    Args:
        letter: the dead letter.
        stream: the stream that has it.
        app_name: whose it is.
        by: who sends it again.
        subject: where to, in place of where it came from.
        edited: its body is another one; what is sent twice is then told by the body too.
        to_gem: a consumer of the Ruby gem's gets it. That copies every header to its dead letter,
            and a ``Nats-Msg-Id`` would have the stream drop that as a duplicate, for good.
        now: for ``x-redriven-at``.

    Raises:
        EventError: its body cannot be unpacked.
        SubjectError: it came from a subject that is none of that app's. Whoever may publish a
            dead letter could have an administrator's process publish anywhere.
    """
    if packed := [problem for problem in letter.problems if "unpacked" in problem]:
        raise EventError(packed[0])
    count = letter.redrives + 1
    message_id = f"redrive-{stream}-{letter.sequence}-{count}"
    if edited:
        message_id += f"-{hashlib.sha256(letter.body).hexdigest()[:16]}"
    when = (now or datetime.now(timezone.utc)).strftime("%Y-%m-%dT%H:%M:%SZ")
    headers = {
        **{name: text for name, text in letter.headers.items() if not _is_own(name)},
        REDRIVES: str(count),
        "x-redriven-at": when,
        "x-redriven-by": CONTROL.sub("", by).strip()[:200],
    }
    if not to_gem:
        headers["Nats-Msg-Id"] = message_id
    elif letter.event_id:
        headers["nats-msg-id"] = letter.event_id  # as the gem has it; the server passes over it
    where = subject or _subject_of(letter, app_name)
    return Message(letter.event_id, where, letter.body, headers)


def _is_own(name: str) -> bool:
    low = name.lower()
    own = ("x-dead-letter", "x-deliveries", REDRIVES, "x-redriven-at", "x-redriven-by")
    return low.startswith(("nats-", "x-dlq-")) or low in own


def _subject_of(letter: StoredDeadLetter, app_name: str) -> str:
    """Where it came from; else, where the app that its envelope names would send it."""
    found = letter.original_subject
    if not found and letter.source:
        found = subjects.publish_subject(letter.source, app_name)
    tokens = found.split(".")
    if len(tokens) == 3 and tokens[1:] == ["sync", app_name] and not subjects.fault(found):
        return found
    told = (
        f"it came from {found!r}, which is no subject of {app_name}"
        if found
        else ("where it came from is not known")
    )
    raise SubjectError(f"{told}: give the subject (--subject)", subject=found)


def who() -> str:
    """The user and the host of this process."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError, ImportError):  # a container's user without a name
        user = "unknown"
    return f"{user}@{socket.gethostname()}"
