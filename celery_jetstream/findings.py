"""What the doctor says: one check is a code, why it matters, and a decision about facts. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Literal, NamedTuple

from .facts import Facts, Unknown

__all__ = ("Check", "Finding", "Result", "check", "error", "ok", "skipped", "warning")

Severity = Literal["error", "warning", "ok", "skipped"]


@dataclass(frozen=True)
class Finding:
    """What one check says.

    Attributes:
        code: the check's, stable: docs/reference/doctor.md has a row for each.
        severity: ``error``, ``warning``, ``ok`` or ``skipped``.
        found: what there is, values with units; why, where it was skipped.
        why: why that matters; "" where nothing is wrong.
        remedy: what to do; "" where nothing is wrong.
    """

    code: str
    severity: Severity
    found: str
    why: str = ""
    remedy: str = ""

    def as_dict(self) -> dict[str, str]:
        """Plain values, for ``--json``."""
        return asdict(self)


class Result(NamedTuple):
    """A finding without what all of its check's have."""

    severity: Severity
    found: str
    remedy: str = ""


def ok(found: str) -> Result:
    """All is well."""
    return Result("ok", found)


def skipped(why: str) -> Result:
    """It cannot be known."""
    return Result("skipped", why)


def warning(found: str, remedy: str) -> Result:
    """It works, and will cost somebody a day."""
    return Result("warning", found, remedy)


def error(found: str, remedy: str) -> Result:
    """Something is lost, stands still, or is run twice."""
    return Result("error", found, remedy)


@dataclass(frozen=True)
class Check:
    """One check: a code, why it matters, and the decision. Pure."""

    code: str
    why: str
    decide: Callable[[Facts], Iterable[Result]]

    def __call__(self, facts: Facts) -> Iterator[Finding]:
        """What it finds: at least one finding; skipped where a fact is unknown."""
        try:
            results = list(self.decide(facts))
        except Unknown as unknown:
            results = [skipped(str(unknown))]
        for result in results:
            wrong = result.severity in ("error", "warning")
            yield Finding(
                self.code, result.severity, result.found, self.why if wrong else "", result.remedy
            )


def check(code: str, why: str) -> Callable[[Callable[[Facts], Iterable[Result]]], Check]:
    """Makes a decision a check."""
    return lambda decide: Check(code, why, decide)
