"""The consumers of an app: one for all its sources, or one for each.

Receives the settings; hands on the stream and the consumers to ask for. Pure.
"""

from __future__ import annotations

from .config import Config
from .sources import Source
from .specs import ConsumerSpec, StreamSpec
from .subjects import durable_name, publish_subject

__all__ = ("consumer_specs", "may_share", "stream_spec")


def stream_spec(config: Config) -> StreamSpec:
    """The stream that both ends of each pair share."""
    return StreamSpec(
        name=config.stream_name,
        subjects=config.subjects,
        num_replicas=config.num_replicas,
        duplicate_window=config.duplicate_window,
        max_age=config.max_age,
        allow_atomic=config.outbox_atomic,
    )


def may_share(config: Config) -> bool:
    """Whether several sources could share a consumer: those without settings of their own."""
    return len(_sharing(config)) > 1


def consumer_specs(config: Config, *, shared: bool = False) -> tuple[ConsumerSpec, ...]:
    """The consumers that take the app's messages.

    The first is called ``{app_name}-workers``; of each other one the source's name is behind that.

    Args:
        config: the settings.
        shared: one consumer for all sources without settings of their own: the server must know
            ``filter_subjects``. Else each source has one.
    """
    sharing = _sharing(config)
    groups = [[source] for source in config.sources if source.has_settings]
    groups[:0] = [sharing] if shared and sharing else [[source] for source in sharing]
    return tuple(_spec(config, group, number) for number, group in enumerate(groups))


def _sharing(config: Config) -> list[Source]:
    return [source for source in config.sources if not source.has_settings]


def _spec(config: Config, group: list[Source], number: int) -> ConsumerSpec:
    head = group[0]
    source = head.name if number else None
    return ConsumerSpec(
        stream=config.stream_name,
        durable=durable_name(config.app_name, source),
        filter_subjects=tuple(publish_subject(one.name, config.app_name) for one in group),
        ack_wait=config.ack_wait,
        max_ack_pending=head.max_ack_pending or config.max_ack_pending,
        batch_size=head.batch_size or config.batch_size,
        deliver_subject=_deliver_subject(config, source) if config.pushes else "",
    )


def _deliver_subject(config: Config, source: str | None) -> str:
    own = publish_subject(config.destination_app, config.app_name) + ".worker"
    subject = config.delivery_subject or own
    return f"{subject}.{source}" if source else subject
