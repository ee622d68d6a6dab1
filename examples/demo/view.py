"""What one sees of the demo: a live board in a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from examples.demo.stream import DeadLetter


@dataclass(frozen=True)
class Outbox:
    """The hub's outbox: rows, by what became of them."""

    taken_in: int = 0
    written: int = 0
    rolled_back: int = 0
    flushed: int = 0
    waiting: int = 0
    cut_off: int = 0


@dataclass(frozen=True)
class State:
    """What there is to see at one moment."""

    step: str = "starting"
    hub_ended: bool = False
    total: int = 0
    published: int = 0
    outbox: Outbox = Outbox()
    sent_twice: int = 0
    handled: int = 0
    skipped: int = 0
    killed: int = 0
    retried: int = 0
    dead_lettered: int = 0
    left: int = 0
    repositories: Sequence[tuple[Any, ...]] = ()
    actors: Sequence[tuple[Any, ...]] = ()


class Nothing:
    """Shows nothing (``--json``)."""

    def __enter__(self) -> Nothing:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def show(self, state: State) -> None:
        pass


class Lines(Nothing):
    """A line for each change."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last = ""

    def show(self, state: State) -> None:
        line = (
            f"{state.step}: {state.published} published ({state.outbox.waiting} wait in the "
            f"outbox), {state.handled} handled, {state.skipped} skipped, "
            f"{state.retried} retried, {state.dead_lettered} dead-lettered"
        )
        if line != self._last:
            self._last = line
            self._console.print(line, highlight=False)


class Screen(Nothing):
    """Bars and the activity board, drawn over and over."""

    def __init__(self, console: Console) -> None:
        self._live = Live(console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> Screen:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def show(self, state: State) -> None:
        self._live.update(Group(_bars(state), activity(state)), refresh=True)


def console(*, stderr: bool) -> Console:
    found = Console(stderr=stderr)
    return found if found.is_terminal else Console(stderr=stderr, width=120)


def screen(console: Console) -> Nothing:
    return Screen(console) if console.is_terminal else Lines(console)


def _bars(state: State) -> RenderableType:
    bars = Table.grid(padding=(0, 1))
    for name, count, colour in (
        ("in the outbox", state.outbox.waiting, "magenta"),
        ("published", state.published, "cyan"),
        ("handled", state.handled, "green"),
        ("skipped", state.skipped, "blue"),
        ("retried", state.retried, "yellow"),
        ("dead-lettered", state.dead_lettered, "red"),
    ):
        bar = ProgressBar(
            total=max(1, state.total), completed=count, width=40, complete_style=colour,
            finished_style=colour,
        )  # fmt: skip
        bars.add_row(name, bar, f"{count:>4}")
    return Group(Text(f"\nhub → JetStream → desk: {state.step}\n", style="bold"), bars, Text())


def activity(state: State) -> RenderableType:
    """Who did what where, as the handlers have put it on the board."""
    repositories = Table(box=None, pad_edge=False)
    repositories.add_column("repository", no_wrap=True, min_width=28)
    repositories.add_column("events", justify="right", min_width=6)
    repositories.add_column("actors", justify="right", min_width=6)
    repositories.add_column("latest", no_wrap=True, style="dim")
    for name, events, actors, latest in state.repositories:
        repositories.add_row(name, str(events), str(actors), Text(latest or ""))
    busiest = ", ".join(f"{name} {events}" for name, events in state.actors)
    return Group(repositories, Text(f"busiest: {busiest}\n" if busiest else ""))


def sums(state: State) -> RenderableType:
    """The tables that add up."""
    outbox = state.outbox
    rows = Table("the hub's outbox", "events", box=None, pad_edge=False)
    rows.columns[1].justify = "right"
    rows.add_row("written", str(outbox.written + outbox.rolled_back))
    rows.add_row("rolled back", str(outbox.rolled_back))
    rows.add_row("flushed", str(outbox.flushed))
    rows.add_row("… with the first relay when it got SIGKILL", str(outbox.cut_off))
    table = Table("the stream", "messages", box=None, pad_edge=False)
    table.columns[1].justify = "right"
    once = state.published - outbox.flushed - state.sent_twice
    table.add_row("published at once", str(once))
    table.add_row("published by the outbox", str(outbox.flushed))
    table.add_row("of these sent a second time", str(state.sent_twice))
    table.add_row("published", str(state.published), style="bold", end_section=True)
    table.add_row("handled, each once", str(state.handled))
    table.add_row("skipped, for the inbox had them", str(state.skipped))
    table.add_row("dead-lettered", str(state.dead_lettered))
    table.add_row("left in the stream", str(state.left))
    told = f"worker children killed in mid-handler: {state.killed}\n"
    return Group(rows, Text(), table, Text(f"{told}retried on the way: {state.retried}\n"))


def letters(dead_letters: Sequence[DeadLetter]) -> RenderableType:
    """Each dead letter with its reason and error."""
    table = Table(box=None, pad_edge=False)
    table.add_column("dead letter", no_wrap=True, min_width=34)
    table.add_column("reason", no_wrap=True, min_width=19)
    table.add_column("error")
    for letter in dead_letters:
        name = letter.event_type or f"message {letter.sequence}"
        table.add_row(name, letter.reason, Text(letter.error))
    return Group(table, Text())
