"""Which dead letters a command is about, and how many there are of each kind. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from . import subjects
from .letters import StoredDeadLetter, canonical_reason

__all__ = ("EVERY_LETTER", "DeadLetterCounts", "DeadLetterFilter", "counted")


@dataclass(frozen=True, kw_only=True)
class DeadLetterFilter:
    """Which ones; all that is given must be true of one, and nothing given is all of them.

    Attributes:
        reason: such as ``unrecoverable_error``; our words also find the gem's.
        event_type: a type, or a pattern as handlers have it: ``user.*``, ``order.>``.
        source: the app that published the event.
        handler: the task's name.
        error: a part of ``{error_class}: {error_message}``, in any case.
        older_than: seconds since it was given up, by this machine's clock, at least.
        newer_than: the same, at most.
        ids: event_ids, or numbers in the stream: digits only are a number.
    """

    reason: str | None = None
    event_type: str | None = None
    source: str | None = None
    handler: str | None = None
    error: str | None = None
    older_than: float | None = None
    newer_than: float | None = None
    ids: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.event_type is not None:
            subjects.validate_pattern(self.event_type)

    @classmethod
    def of(cls, chosen: DeadLetterFilter | Mapping[str, Any] | str | int) -> DeadLetterFilter:
        """A filter as it is, or of its attributes, or that of one event_id or number.

        Raises:
            SubjectError: ``event_type`` is no pattern.
            TypeError: there is no such attribute.
        """
        if isinstance(chosen, DeadLetterFilter):
            return chosen
        if isinstance(chosen, Mapping):
            ids = chosen.get("ids", ())
            return cls(**{**chosen, "ids": tuple(map(str, ids))})
        return cls(ids=(str(chosen),))

    @property
    def is_empty(self) -> bool:
        """Whether it lets every one through."""
        return all(getattr(self, one.name) in (None, ()) for one in fields(self))

    @property
    def sequences(self) -> tuple[int, ...] | None:
        """The numbers that it names, in order; None where it is not about numbers only."""
        if not self.ids or not all(map(_is_number, self.ids)):
            return None
        return tuple(sorted({int(one) for one in self.ids}))

    def admits(self, letter: StoredDeadLetter) -> bool:
        """Whether it is about this one."""
        return (
            self._is_named(letter)
            and (
                self.reason is None
                or canonical_reason(self.reason) == canonical_reason(letter.reason)
            )
            and (self.source is None or self.source == letter.source)
            and (self.handler is None or self.handler == letter.handler)
            and (self.error is None or self.error.casefold() in _error(letter).casefold())
            and (self.older_than is None or letter.age >= self.older_than)
            and (self.newer_than is None or letter.age <= self.newer_than)
            and self._is_of_type(letter.event_type)
        )

    def _is_named(self, letter: StoredDeadLetter) -> bool:
        return not self.ids or any(
            int(one) == letter.sequence if _is_number(one) else one == letter.event_id
            for one in self.ids
        )

    def _is_of_type(self, event_type: str) -> bool:
        pattern = self.event_type
        if pattern is None or pattern == event_type:
            return True
        legal = subjects.fault(event_type) is None
        return legal and subjects.matches(pattern, event_type)


EVERY_LETTER = DeadLetterFilter()


@dataclass(kw_only=True)
class DeadLetterCounts:
    """How many dead letters there are, of each kind; the most frequent first.

    Attributes:
        total: all of them.
        oldest: seconds since the first was given up; None where there is none.
        newest: the same, of the last.
        by_reason: the reason to a count.
        by_event_type: the type; "" where there is none to be read.
        by_handler: the task's name; "" where none began.
        by_source: the app that published the event.
        by_error: the error's class.
    """

    total: int = 0
    oldest: float | None = None
    newest: float | None = None
    by_reason: Mapping[str, int] = field(default_factory=dict)
    by_event_type: Mapping[str, int] = field(default_factory=dict)
    by_handler: Mapping[str, int] = field(default_factory=dict)
    by_source: Mapping[str, int] = field(default_factory=dict)
    by_error: Mapping[str, int] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def counted(letters: list[StoredDeadLetter], before: DeadLetterCounts) -> DeadLetterCounts:
    """The counts with these added."""
    ages = [age for age in (before.oldest, before.newest) if age is not None]
    ages += [letter.age for letter in letters]
    return DeadLetterCounts(
        total=before.total + len(letters),
        oldest=max(ages, default=None),
        newest=min(ages, default=None),
        by_reason=_more(before.by_reason, [one.reason for one in letters]),
        by_event_type=_more(before.by_event_type, [one.event_type for one in letters]),
        by_handler=_more(before.by_handler, [one.handler for one in letters]),
        by_source=_more(before.by_source, [one.source for one in letters]),
        by_error=_more(before.by_error, [one.error_class for one in letters]),
    )


def _more(before: Mapping[str, int], words: list[str]) -> Mapping[str, int]:
    return dict((Counter(before) + Counter(words)).most_common())


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


def _error(letter: StoredDeadLetter) -> str:
    return f"{letter.error_class}: {letter.error_message}"
