"""Upcasting: payloads of an older ``schema_version`` made into those that handlers know. Pure.

The upcasters are the process's, whatever the app, as shared tasks are: what an event's version
means is a fact of the event.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import defaultdict
from collections.abc import Callable
from typing import Any, TypeVar

from . import subjects
from .events import Event
from .exceptions import ConfigurationError, PayloadError

__all__ = ("upcast", "upcasted", "upcasters_of")

F = TypeVar("F", bound=Callable[[Any], Any])


@dataclasses.dataclass(frozen=True)
class Upcaster:
    """One step: a payload of one version becomes one of another."""

    pattern: str
    from_version: str
    to_version: str
    function: Callable[[Any], Any]

    @property
    def name(self) -> str:
        """The function's, with its module."""
        return f"{self.function.__module__}.{self.function.__qualname__}"


_upcasters: dict[str, dict[str, Upcaster]] = defaultdict(dict)


def upcast(
    event_type: str, *, from_version: str | float, to_version: str | float | None = None
) -> Callable[[F], F]:
    """Makes a function the upcaster of a version's payloads: ``payload -> payload``.

    Applied before the middleware, the handler and its ``payload=`` see the event; step by step, as
    long as there is one for the version that is reached. The function may change what it is given:
    it is a copy. ``event.schema_version`` is the new one then, ``event.envelope`` what came.

    Args:
        event_type: a type, or a pattern as handlers have it; of several for one version the most
            specific applies.
        from_version: the ``schema_version`` that it reads; ``1`` and ``"1.0"`` are the same.
        to_version: the one that it makes; default the next whole one (``"1.2"``: ``"2.0"``).

    Raises:
        SubjectError: the pattern is not legal.
        ConfigurationError: there is one already, or the versions lead in a circle.
    """
    subjects.validate_pattern(event_type)
    before = _version(from_version)
    after = _next(before) if to_version is None else _version(to_version)

    def decorate(function: F) -> F:
        step = Upcaster(event_type, before, after, function)
        other = _upcasters[event_type].get(before)
        if other is not None and other.name != step.name:
            raise ConfigurationError(
                f"two upcasters for {event_type!r} from {before}: {other.name} and {step.name}",
                setting="upcast",
            )
        _check_circle({**_upcasters[event_type], before: step}, step)
        _upcasters[event_type][before] = step
        return function

    return decorate


def _check_circle(steps: dict[str, Upcaster], step: Upcaster) -> None:
    seen, version = {step.from_version}, step.to_version
    while version in steps or version in seen:
        if version in seen:
            raise ConfigurationError(
                f"upcasters of {step.pattern!r} lead in a circle: {step.name} makes "
                f"{step.to_version} of {step.from_version}",
                setting="upcast",
            )
        seen.add(version)
        version = steps[version].to_version


def upcasted(event: Event) -> Event:
    """The event in the newest version that there is a way to.

    Raises:
        PayloadError: an upcaster failed.
    """
    if not _upcasters:
        return event
    seen: set[str] = set()
    while (step := _find(event)) is not None:
        if step.from_version in seen:
            raise PayloadError([("payload", f"upcasters lead in a circle at {step.from_version}")])
        seen.add(step.from_version)
        event = _apply(step, event)
    return event


def _apply(step: Upcaster, event: Event) -> Event:
    try:
        payload = step.function(copy.deepcopy(event.payload))
    except Exception as error:
        text = f"upcaster {step.name} from {step.from_version} failed: {error!r}"
        raise PayloadError([("payload", text)]) from error
    return dataclasses.replace(event, payload=payload, schema_version=step.to_version)


def upcasters_of(pattern: str) -> list[Upcaster]:
    """Those that events of a handler's pattern may meet."""
    return [
        step
        for other, steps in sorted(_upcasters.items())
        if subjects.overlap(other, pattern)
        for step in sorted(steps.values(), key=lambda step: step.from_version)
    ]


def _find(event: Event) -> Upcaster | None:
    version = _version(event.schema_version)
    steps = [
        steps[version]
        for pattern, steps in _upcasters.items()
        if version in steps and subjects.matches(pattern, event.event_type)
    ]
    return min(steps, key=lambda step: subjects.specificity(step.pattern), default=None)


def _version(version: str | float) -> str:
    text = str(version).strip()
    return f"{text}.0" if text.isdigit() else text


def _next(version: str) -> str:
    whole = version.partition(".")[0]
    if not whole.isdigit():
        raise ConfigurationError(
            f"from_version={version!r} has no next whole version; give to_version",
            setting="upcast",
        )
    return f"{int(whole) + 1}.0"
