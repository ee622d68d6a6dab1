"""The sources: the apps whose events this one receives, and what is set for each.

Receives ``jetstream_sources`` as a user wrote it; hands on :class:`Source`. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .readers import Reader, items, nearest, whole
from .subjects import validate_app_name

__all__ = ("Source", "sources")

_OPTIONS: dict[str, Reader] = {
    "batch_size": whole(1, 10_000),
    "max_ack_pending": whole(1, 1_000_000),
}


@dataclass(frozen=True, repr=False)
class Source:
    """An app whose events we receive.

    Attributes:
        name: the app's.
        max_ack_pending: how many of its events may be delivered and not settled; None is
            ``jetstream_max_ack_pending``, which the sources without a number of their own share.
        batch_size: the most messages that one pull asks for; None is ``jetstream_batch_size``.
    """

    name: str
    max_ack_pending: int | None = None
    batch_size: int | None = None

    def __repr__(self) -> str:
        return repr(self.name)

    @property
    def has_settings(self) -> bool:
        """Whether it needs a consumer of its own."""
        return self.max_ack_pending is not None or self.batch_size is not None


def sources(value: object) -> tuple[Source, ...]:
    """Return the sources of a list of names, text with commas, or a dict of names and settings."""
    given = value.items() if isinstance(value, Mapping) else ((one, None) for one in items(value))
    found = tuple(_source(name, options) for name, options in given)
    if len({source.name for source in found}) < len(found):
        raise ValueError("must name each app once")
    return found


def _source(name: Any, options: object) -> Source:
    if isinstance(name, Source):
        return name
    known = validate_app_name(name, "a source")
    if options is None:
        return Source(known)
    if not isinstance(options, Mapping):
        raise ValueError(f"{known}: must be a dict with {' or '.join(_OPTIONS)}")
    return Source(known, **{str(key): _option(known, key, options[key]) for key in options})


def _option(name: str, key: object, value: object) -> Any:
    if key not in _OPTIONS:
        near = nearest(str(key), _OPTIONS)
        hint = f"did you mean {near}?" if near else f"use {' or '.join(_OPTIONS)}"
        raise ValueError(f"{name}: {key} is not a setting of a source; {hint}")
    try:
        return None if value is None else _OPTIONS[str(key)](value)
    except ValueError as error:
        raise ValueError(f"{name}: {key} {error}") from None
