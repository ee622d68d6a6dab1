"""The table of faults over all runs of a session, for the terminal and as JSON."""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.crash.chaos.run import Firing, Result

__all__ = ("PROPERTY", "Row", "account_of", "rows_of", "say", "table")

#: What a test's report carries, also from one of xdist's processes.
PROPERTY = "chaos"


@dataclass
class Row:
    """A fault, over all its times.

    Attributes:
        fault: its name.
        times: how often it was injected, and met somebody.
        events: in flight meanwhile: written before the end of its volley, and not handled before
            the volley's beginning.
        lost: of those.
        doubled: of those.
        stuck: of those.
        stall: seconds, the longest time without any effect from a volley's beginning until
            effects came again, where the fault was the only one; it includes the standstill or
            absence itself.
        stall_with_others: the same, with others at once.
    """

    fault: str
    times: int = 0
    events: int = 0
    lost: int = 0
    doubled: int = 0
    stuck: int = 0
    stall: float = 0.0
    stall_with_others: float = 0.0

    def add(self, other: Row) -> None:
        """Takes in another one of the same fault."""
        for name in ("times", "events", "lost", "doubled", "stuck"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.stall = max(self.stall, other.stall)
        self.stall_with_others = max(self.stall_with_others, other.stall_with_others)


def rows_of(result: Result) -> list[dict[str, Any]]:
    """A run's rows, each as a dict; the last is all of it."""
    rows: dict[str, Row] = {}
    handled = _first(result.effects)
    moments = [at for _, at in result.effects]
    for firing in result.firings:
        events = {
            event_id
            for event_id, at in result.written
            if at <= firing.flowing and handled.get(event_id, float("inf")) >= firing.begun
        }
        stall = longest_gap(moments, firing.begun, firing.flowing)
        for name in {fault.name for fault in firing.met}:
            rows.setdefault(name, Row(name)).add(_row(name, firing, events, stall, result))
    found = result.found
    whole = Row(
        "all of it",
        sum(len(firing.met) for firing in result.firings),
        *(len(found.orders), len(found.lost), len(found.doubled), len(found.stuck)),
        max((row.stall for row in rows.values()), default=0.0),
        max((row.stall_with_others for row in rows.values()), default=0.0),
    )
    return [asdict(row) for row in (*rows.values(), whole)]


def _row(name: str, firing: Firing, events: set[str], stall: float, result: Result) -> Row:
    found, alone = result.found, len(firing.met) == 1
    return Row(
        name,
        sum(fault.name == name for fault in firing.met),
        len(events),
        *(len(events & of) for of in (found.lost, found.doubled, found.stuck)),
        stall=stall if alone else 0.0,
        stall_with_others=0.0 if alone else stall,
    )


def slowest(result: Result, count: int = 3) -> list[tuple[float, str, str]]:
    """The events that took longest from being written to their first effect: seconds, id, kind.

    A handler that stands still does not show in the stall, while others go on.
    """
    handled = _first(result.effects)
    took = [
        (round(handled[event_id] - at, 1), event_id, result.found.orders[event_id])
        for event_id, at in result.written
        if event_id in handled and event_id in result.found.orders
    ]
    return sorted(took, reverse=True)[:count]


def _first(effects: Iterable[tuple[str, float]]) -> dict[str, float]:
    first: dict[str, float] = {}
    for event_id, at in effects:
        first.setdefault(event_id, at)
    return first


def longest_gap(moments: list[float], begin: float, end: float) -> float:
    """The longest time without a moment that touches the span; moments are sorted."""
    first, last = bisect_left(moments, begin), bisect_right(moments, end)
    inside = [begin, *moments[first:last], end]
    return max(later - earlier for earlier, later in pairwise(inside))


def table(rows: Iterable[dict[str, Any]]) -> list[str]:
    """The lines of a table, one row for each fault."""
    merged: dict[str, Row] = {}
    for given in rows:
        merged.setdefault(given["fault"], Row(given["fault"])).add(Row(**given))
    whole = merged.pop("all of it", None)
    ordered = [merged[name] for name in sorted(merged)] + ([whole] if whole else [])
    lines = [f"{'fault':<42}{'times':>6}{'events':>8}{'lost':>6}{'doubled':>9}{'stuck':>7}  stall"]
    for row in ordered:
        alone = f"{row.stall:.1f} s" if row.stall else "–"
        others = f" (with others {row.stall_with_others:.1f} s)" if row.stall_with_others else ""
        lines.append(
            f"{row.fault:<42}{row.times:>6}{row.events:>8}{row.lost:>6}{row.doubled:>9}"
            f"{row.stuck:>7}  {alone}{others}"
        )
    return lines


def account_of(result: Result) -> dict[str, Any]:
    """A run as plain values."""
    return {
        "mode": result.mode,
        "seed": result.seed,
        "volleys": result.volleys,
        "seconds": round(result.seconds, 1),
        "quiet_after": round(result.quiet_after, 1),
        "violations": result.violations,
        "notes": dict(Counter(result.notes)),
        "slowest": slowest(result),
        "faults": rows_of(result),
    }


def say(terminal: Any, path: str | None) -> None:
    """At the end of a session: the table, and the file where one is asked for."""
    reports = [report for kind in ("passed", "failed") for report in terminal.stats.get(kind, ())]
    runs = [
        json.loads(value)
        for report in reports
        if report.when == "call"
        for name, value in report.user_properties
        if name == PROPERTY
    ]
    if not runs:
        return
    terminal.section("chaos")
    for run in runs:
        terminal.write_line(
            f"{run['mode']}, seed {run['seed']}: {run['volleys']} volleys in {run['seconds']} s, "
            f"quiet after {run['quiet_after']} s, {len(run['violations'])} violations"
            + "".join(f"; {count} × {note}" for note, count in run["notes"].items())
        )
        slow = ", ".join(f"{kind} {event} {took} s" for took, event, kind in run["slowest"])
        terminal.write_line(f"    slowest from its writing to its effect: {slow}")
    for line in table(row for run in runs for row in run["faults"]):
        terminal.write_line(line)
    if path:
        Path(path).write_text(json.dumps(runs, indent=1) + "\n")
