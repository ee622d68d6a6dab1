"""The exceptions of celery_jetstream: one root, attributes instead of parsing.

::

    CeleryJetStreamError
    ├── ConfigurationError   (+ ImproperlyConfigured)  .setting
    ├── SubjectError         (+ ValueError)            .subject
    ├── EventError           (+ ValueError)
    │   ├── EncodeError                                .path
    │   ├── DecodeError                                .reason
    │   └── PayloadError                               .errors
    ├── PublishError                                   .event_id .subject .transient
    ├── TopologyError                                  .stream
    │   ├── SubjectOverlapError                        .subject .other_stream
    │   └── DriftError                                 .differences
    ├── InboxError
    ├── OutageError                                    .pauses
    ├── DatabaseUnavailableError (+ ConnectionError)
    │   ├── OutboxUnavailableError
    │   └── InboxUnavailableError
    └── NotConnectedError    (+ ConnectionError)
        ├── ConnectionRefusedByServer
        ├── NoResponders
        └── PermissionDeniedError                      .operation .subject

Handlers raise none of these to say how a message ends: Celery's own words do that
(return, ``self.retry()``, ``Reject``, ``Ignore``, or any exception).
"""

from __future__ import annotations

from collections.abc import Sequence

from celery.exceptions import ImproperlyConfigured

__all__ = (
    "CeleryJetStreamError",
    "ConfigurationError",
    "ConnectionRefusedByServer",
    "DatabaseUnavailableError",
    "DecodeError",
    "DriftError",
    "EncodeError",
    "EventError",
    "InboxError",
    "InboxUnavailableError",
    "NoResponders",
    "NotConnectedError",
    "OutageError",
    "OutboxUnavailableError",
    "PayloadError",
    "PermissionDeniedError",
    "PublishError",
    "SubjectError",
    "SubjectOverlapError",
    "TopologyError",
    "kind_of",
    "shown",
)


def shown(value: object) -> str:
    """Return how a value stands in a message: its repr, of at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def kind_of(value: object) -> str:
    """Return the type of a value as messages call it; JSON's word for ``None``."""
    return "null" if value is None else type(value).__name__


class CeleryJetStreamError(Exception):
    """Root of every exception this library raises."""


class ConfigurationError(CeleryJetStreamError, ImproperlyConfigured):
    """A setting (or a handler's option) cannot be used as it is given.

    The message names the setting, the value (never a credential) and a good value.
    """

    def __init__(self, message: str, *, setting: str | None = None) -> None:
        super().__init__(message)
        self.setting = setting


class SubjectError(CeleryJetStreamError, ValueError):
    """A subject, a subject token or an event-type pattern is not a legal one."""

    def __init__(self, message: str, *, subject: object = None) -> None:
        super().__init__(message)
        self.subject = subject


class EventError(CeleryJetStreamError, ValueError):
    """An event is not one that can be sent or read."""


class EncodeError(EventError):
    """An event cannot be written to the wire; ``path`` leads to the value at fault."""

    def __init__(self, message: str, *, path: str = "") -> None:
        super().__init__(message)
        self.path = path


class DecodeError(EventError):
    """A message is no event; ``reason`` is the dead-letter reason.

    ``reason`` is ``malformed_json`` (the body is not JSON) or ``invalid_envelope``
    (it is JSON, but not an envelope).
    """

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class PayloadError(EventError):
    """A payload is not of the type that its handler takes.

    ``errors`` holds ``(path, what is wrong)`` for each place; the message names ten at the most.
    """

    def __init__(self, errors: Sequence[tuple[str, str]]) -> None:
        told = [f"{path}: {message[:200]}" for path, message in errors[:10]]
        if len(errors) > len(told):
            told.append(f"and {len(errors) - len(told)} more")
        super().__init__("; ".join(told))
        self.errors = tuple(errors)

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.errors,)


class PublishError(CeleryJetStreamError):
    """JetStream did not store an event.

    ``transient`` tells an outage (try again with the same ``event_id``) from a refusal.
    """

    def __init__(
        self,
        message: str,
        *,
        event_id: str | None = None,
        subject: str | None = None,
        transient: bool = False,
    ) -> None:
        super().__init__(message)
        self.event_id = event_id
        self.subject = subject
        self.transient = transient


class TopologyError(CeleryJetStreamError):
    """A stream or a consumer is not there, or not as it must be."""

    def __init__(self, message: str, *, stream: str | None = None) -> None:
        super().__init__(message)
        self.stream = stream


class SubjectOverlapError(TopologyError):
    """Another stream already takes one of our subjects (server error 10065)."""

    def __init__(self, message: str, *, stream: str, subject: str, other_stream: str) -> None:
        super().__init__(message, stream=stream)
        self.subject = subject
        self.other_stream = other_stream


class DriftError(TopologyError):
    """A stream or consumer exists with a configuration that cannot be brought to ours.

    ``differences`` holds ``(field, wanted, found)`` for each field.
    """

    def __init__(
        self,
        message: str,
        *,
        stream: str,
        differences: Sequence[tuple[str, object, object]] = (),
    ) -> None:
        super().__init__(message, stream=stream)
        self.differences = tuple(differences)


class DatabaseUnavailableError(CeleryJetStreamError, ConnectionError):
    """A database is away. An outage: nothing was written, nothing is lost."""


class OutboxUnavailableError(DatabaseUnavailableError):
    """The outbox's database is away."""


class InboxUnavailableError(DatabaseUnavailableError):
    """The inbox's database is away; the message comes again, for as long as that lasts."""


class InboxError(CeleryJetStreamError):
    """A handler ended the transaction that its inbox row is in; it was rolled back."""


class OutageError(CeleryJetStreamError):
    """An attempt met an outage; in direct mode its message waits in the worker for the next.

    ``pauses``: its handler's other messages wait as well.
    """

    def __init__(self, message: str, pauses: bool = False) -> None:
        super().__init__(message, pauses)
        self.pauses = pauses

    def __str__(self) -> str:
        return str(self.args[0])


class NotConnectedError(CeleryJetStreamError, ConnectionError):
    """There is no connection to NATS now. An outage, never a verdict on the event."""


class NoResponders(NotConnectedError):
    """Nobody listens on the subject: no stream, no consumer, or an election (NATS 503)."""


class PermissionDeniedError(NotConnectedError):
    """Our NATS user may not publish to a subject, or subscribe to it: the server said so.

    No message is at fault: what is kept (the outbox's rows, messages) waits until it is allowed.

    Args:
        operation: ``publish to`` or ``subscribe to``.
        subject: the subject to be allowed; with wildcards where it goes for more than one.
    """

    def __init__(self, operation: str, subject: str) -> None:
        super().__init__(operation, subject)
        self.operation = operation
        self.subject = subject

    def __str__(self) -> str:
        return (
            f"the NATS user may not {self.operation} {self.subject}: have that allowed (what this "
            "app needs is listed by 'celery -A … jetstream provision --print-permissions')"
        )


class ConnectionRefusedByServer(NotConnectedError):
    """The server (or its certificate) was reached and the connection refused.

    Wrong credentials, failed TLS verification, a ``tls://`` URL against a plain server:
    trying again does not help, so start-up fails at once.
    """
