"""What our NATS user may not do, found out before a message depends on it.

A server says nothing of a user's permissions until it denies something. So each is tried in a way
that changes nothing: JetStream does not heed a request that asks for no answer, nor a word about a
delivery that there is not, and stores nothing that is for a stream of another name. What events are
published to is not tried.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from nats.aio.msg import Msg

from .acks import IN_PROGRESS
from .config import Config
from .exceptions import ConfigurationError, NotConnectedError, PermissionDeniedError
from .session import Session
from .specs import ConsumerSpec

__all__ = ("ELSEWHERE", "check_permissions")

#: Seconds for the server to have taken in all of it.
TIMEOUT = 10.0
#: With these headers JetStream stores nothing: it has no stream of that name.
ELSEWHERE = {"Nats-Expected-Stream": "celery-jetstream-nowhere"}


async def check_permissions(
    session: Session, config: Config, consumers: Sequence[ConsumerSpec], *, claims: bool
) -> None:
    """Tries what handling messages takes. In the connection's loop thread.

    Args:
        session: the live session.
        config: the settings.
        consumers: those whose messages are taken.
        claims: whether to hear which messages workers have, as a bridge must.

    Raises:
        ConfigurationError: the user may not do something; names all of it, and what it is for.
        NotConnectedError: the server did not answer.
    """
    denied: dict[str, str] = {}

    def on_denial(subject: str, why: str) -> None:
        def told(error: PermissionDeniedError) -> None:
            denied[f"{error.operation} {error.subject}"] = why

        session.on_denial(subject, told)

    heard = []
    for consumer in consumers:
        subject = f"$JS.ACK.{consumer.stream}.{consumer.durable}.>"
        if claims:
            on_denial(subject, "else the bridge would send running tasks again")
            heard.append(await session.subscribe(subject, _ignore))
    for subject, body, why in _harmless(config, consumers):
        on_denial(subject, why)
        await session.publish(subject, body)
    if config.use_dlq:
        on_denial(
            config.dead_letter_subject, "else no dead letter can be kept, and handlers run on"
        )
        await session.publish(config.dead_letter_subject, b"", ELSEWHERE)
    if not await session.round_trip(TIMEOUT):
        raise NotConnectedError("the NATS server did not answer in time")
    for subscription in heard:
        await session.unsubscribe(subscription)
    if denied:
        listed = "".join(f"\n  may not {what}: {why}" for what, why in denied.items())
        raise ConfigurationError(
            f"the NATS user lacks permissions:{listed}\nHave them allowed; 'celery -A … jetstream "
            "provision --print-permissions' lists all that this app needs"
        )


def _harmless(
    config: Config, consumers: Sequence[ConsumerSpec]
) -> Iterator[tuple[str, bytes, str]]:
    for consumer in consumers:
        name = f"{consumer.stream}.{consumer.durable}"
        yield f"$JS.ACK.{name}.1.0.0.0.0", IN_PROGRESS, "else no message can be settled"
        if consumer.deliver_subject:
            yield f"$JS.FC.{name}.0", b"", "else the server soon sends no more"
        else:
            yield f"$JS.API.CONSUMER.MSG.NEXT.{name}", b"", "else no message can be taken"
    if config.use_dlq:
        read = f"$JS.API.STREAM.MSG.GET.{config.stream_name}"
        yield read, b"", "else a message that is given up cannot be kept as a dead letter"


def _ignore(_: Msg) -> None:
    """What is heard meanwhile is heard by others, too."""
