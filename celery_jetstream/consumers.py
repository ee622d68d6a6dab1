"""The consumers of an app: one for all its sources, or one for each.

Receives the settings; hands on the stream and the consumers to ask for. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .config import Config
from .sources import Source
from .specs import ConsumerSpec, StreamSpec
from .subjects import covered, durable_name, publish_subject

__all__ = ("consumer_specs", "peer_spec", "possible_specs", "stream_spec")


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


def consumer_specs(
    config: Config, *, can_share: bool = False, found: Sequence[str] | None = None
) -> tuple[ConsumerSpec, ...]:
    """The consumers that take the app's messages.

    The first is called ``{app_name}-workers``; of each other one the source's name is behind that.
    Sources without settings of their own share the first. But a consumer that is there gets no
    further subject: it has passed what that had before, and would never deliver it. Such a source
    has a consumer of its own.

    Args:
        config: the settings.
        can_share: the server knows ``filter_subjects``. Else each source has one.
        found: the subjects of the first consumer, where it is there; patterns go.
    """
    plain = [source for source in config.sources if not source.has_settings]
    if found is not None:
        there = [s for s in config.sources if covered(_subject(config, s), found)]
        main = [source for source in there if source in plain] or there[:1]
    else:
        main = plain if can_share else plain[:1]
    main = main or [config.sources[0]]
    rest = [[source] for source in config.sources if source not in main]
    return tuple(_spec(config, group, number) for number, group in enumerate([main, *rest]))


def possible_specs(config: Config, *, can_share: bool) -> tuple[ConsumerSpec, ...]:
    """Those that may be there, for who cannot ask (``auto_provision`` is off).

    A source that came later has a consumer of its own, beside the one that the others share:
    those are ``optional``.
    """
    sure = consumer_specs(config, can_share=can_share)
    plain = [source for source in config.sources if not source.has_settings][1:]
    named = {spec.durable for spec in sure}
    own = [replace(_spec(config, [source], 1), optional=True) for source in plain]
    return (*sure, *(spec for spec in own if spec.durable not in named))


def peer_spec(peer: Config, *, apart: bool = False) -> ConsumerSpec:
    """The consumer that brings one app's events to another, for who provisions that as well.

    Made where it is missing, and else left as it is: how it is to be is the other app's business.

    Args:
        peer: the other app's settings.
        apart: its first consumer is there for other sources only.
    """
    return replace(_spec(peer, list(peer.sources), int(apart)), is_peers=True)


def _subject(config: Config, source: Source) -> str:
    return publish_subject(source.name, config.app_name)


def _spec(config: Config, group: list[Source], number: int) -> ConsumerSpec:
    head = group[0]
    source = head.name if number else None
    return ConsumerSpec(
        stream=config.stream_name,
        durable=durable_name(config.app_name, source),
        filter_subjects=tuple(_subject(config, one) for one in group),
        ack_wait=config.ack_wait,
        max_ack_pending=head.max_ack_pending or config.max_ack_pending,
        batch_size=head.batch_size or config.batch_size,
        deliver_subject=_deliver_subject(config, source) if config.pushes else "",
    )


def _deliver_subject(config: Config, source: str | None) -> str:
    own = publish_subject(config.destination_app, config.app_name) + ".worker"
    subject = config.delivery_subject or own
    return f"{subject}.{source}" if source else subject
