"""What is wanted of the server against what it has: the changes that make it so.

Receives configurations, wanted and found; hands on the :class:`Change` for each, a :class:`Plan`
of all, or the error that says why there can be none. Pure: :mod:`~celery_jetstream.topology`
asks the server and sends it the changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, NoReturn

from .exceptions import DriftError
from .specs import NANOSECONDS, Configuration, filters
from .subjects import covered

__all__ = ("Change", "Difference", "Ignored", "Plan", "compare")

Kind = Literal["stream", "consumer"]
Action = Literal["create", "update", "none"]
Ignored = frozenset[tuple[Kind, str]]
"""Fields that the server accepted and did not take over."""

_DURATIONS = ("duplicate_window", "max_age", "ack_wait", "backoff", "idle_heartbeat")

# Fields of what exists already that we do not change; the server refuses it for nearly all.
_FIXED = {
    "stream": ("storage", "retention", "mirror", "sealed", "no_ack"),
    "consumer": ("ack_policy", "deliver_policy", "replay_policy", "deliver_subject"),
}
_WHY = {
    "deliver_subject": " (a push consumer)",
    "filter_subjects": " (it would never deliver what others have now: it has passed that)",
}
_REMEDY = {
    "stream": "name another stream (jetstream_stream_name), or empty and delete this one: "
    "it is then made anew",
    "consumer": "delete the consumer (the stream keeps its messages): it is then made anew; "
    "or use another jetstream_app_name",
}


class Difference(NamedTuple):
    """One field that is not as wanted; durations in seconds, None where it is not set."""

    field: str
    found: Any
    wanted: Any

    def lines(self) -> list[str]:
        """As lines of a diff: ``+`` comes to what is there, ``~`` replaces it."""
        if self.field == "subjects":
            added = [subject for subject in self.wanted if subject not in (self.found or ())]
            return [f"  + subjects: {subject}" for subject in added]
        if self.found is None:
            return [f"  + {self.field}: {_text(self.field, self.wanted)}"]
        now, then = _text(self.field, self.found), _text(self.field, self.wanted)
        return [f"  ~ {self.field}: {now} -> {then}"]


@dataclass(frozen=True, kw_only=True)
class Change:
    """What is to be done about one stream or consumer, and why.

    ``differences`` are the fields that the action sets (on create: all that we name), ``config``
    is the whole configuration to send, with what others have set in it.
    """

    kind: Kind
    name: str
    action: Action
    differences: tuple[Difference, ...]
    config: Configuration = field(repr=False)

    def not_echoed(self, echo: Configuration) -> Ignored:
        """The fields that are not in the server's answer as they were sent."""
        return frozenset(
            (self.kind, key)
            for key, _, _ in self.differences
            # Subjects missing from the echo are another's update, not a field it does not know.
            if key != "subjects" and not _same(echo.get(key), self.config.get(key))
        )

    def lines(self) -> list[str]:
        """The change as text: what it is now, and what it will be, one thing a line."""
        sign = {"create": "+", "update": "~", "none": "="}[self.action]
        head = f"{sign} {self.kind} {self.name}: {self.action.replace('none', 'as wanted')}"
        return [head, *(line for difference in self.differences for line in difference.lines())]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "kind": self.kind,
            "name": self.name,
            "action": self.action,
            "differences": [difference._asdict() for difference in self.differences],
        }


@dataclass(frozen=True)
class Plan:
    """The changes that bring what is found to what is wanted, in the order to make them."""

    changes: tuple[Change, ...]

    @property
    def changed(self) -> bool:
        """Whether there is anything to do."""
        return any(change.action != "none" for change in self.changes)

    def lines(self) -> list[str]:
        """The plan as text, for ``jetstream provision --dry-run`` and the log."""
        return [line for change in self.changes for line in change.lines()]

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def summary(self, *, dry_run: bool) -> str:
        """How much of it is to be done, or (no ``dry_run``) has been, in a line."""
        count = sum(change.action != "none" for change in self.changes)
        if not count:
            return "nothing to do: all is as wanted"
        return f"{count} to be made or changed" if dry_run else f"{count} made or changed"

    def described(self, fields: Ignored) -> str:
        """Some of its differences as text, for a message."""
        return "; ".join(
            f"{key} of {change.kind} {change.name!r} (wanted {_text(key, wanted)}, "
            f"it has {_text(key, found)})"
            for change in self.changes
            for key, found, wanted in change.differences
            if (change.kind, key) in fields
        )


# ── wanted against found ─────────────────────────────────────────────────────


def compare(
    kind: Kind, name: str, found: Configuration, wanted: Configuration, stream: str
) -> Change:
    """Say what is to be done about a stream or consumer; ``found`` is empty where there is none.

    Raises:
        DriftError: A field that cannot be changed is not as wanted.
    """
    differences = tuple(
        Difference(key, _seconds(key, found.get(key)), _seconds(key, value))
        for key, value in wanted.items()
        if not _same(found.get(key), value)
    )
    drift = [d for d in differences if d.field in _FIXED[kind]]
    there = filters(found)
    if kind == "consumer" and not all(covered(subject, there) for subject in filters(wanted)):
        drift.append(Difference("filter_subjects", there, filters(wanted)))
    if found and drift:
        _raise_drift(kind, name, drift, stream)
    action: Action = "create" if not found else "update" if differences else "none"
    merged = {key: value for key, value in {**found, **wanted}.items() if value is not None}
    return Change(kind=kind, name=name, action=action, differences=differences, config=merged)


def _raise_drift(kind: Kind, name: str, drift: Sequence[Difference], stream: str) -> NoReturn:
    faults = "; ".join(
        f"{key} must be {_text(key, wanted)}, found {_text(key, found)}"
        + _WHY.get(key if found else "", "")
        for key, found, wanted in drift
    )
    raise DriftError(
        f"{kind} {name!r} exists and cannot be used: {faults}. That is not changed in "
        f"place: {_REMEDY[kind]}",
        stream=stream,
        differences=[(key, wanted, found) for key, found, wanted in drift],
    )


# ── small things ─────────────────────────────────────────────────────────────


def _same(found: object, wanted: object) -> bool:
    return (found or None) == (wanted or None)  # the server leaves out what is not set


def _seconds(key: str, value: Any) -> Any:
    if value is None or key not in _DURATIONS:
        return value
    return [v / NANOSECONDS for v in value] if key == "backoff" else value / NANOSECONDS


def _text(key: str, value: object) -> str:
    if value is None:
        return "not set"
    if key in _DURATIONS:
        numbers = value if isinstance(value, list) else [value]
        return ", ".join(f"{number:g} s" for number in numbers)
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
