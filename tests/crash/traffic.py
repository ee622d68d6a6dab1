"""Events published all the while, by a thread, and the account of what became of them.

Not many more are published than are handled: a backlog would hide that nothing is delivered.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from celery_jetstream.outcomes import PublishResult
from tests.banking import Bank
from tests.crash.faults import until

__all__ = ("Line", "Traffic")

PATIENCE = 120.0

Send = Callable[[Sequence[dict[str, Any]]], Iterable[PublishResult]]


@dataclass
class Line:
    """One fault in the table; ``str()`` prints it.

    Stalls in seconds: the longest call that published, and the longest time without an effect.
    """

    fault: str
    published: int
    acked: int
    failed: int
    publish_stall: float
    effect_stall: float
    seconds: float

    def __str__(self) -> str:
        return (
            f"| {self.fault} | {self.seconds:.1f} s | {self.published} published, {self.acked} "
            f"acked, {self.failed} reported failed | publish stall {self.publish_stall:.1f} s | "
            f"effect stall {self.effect_stall:.1f} s |"
        )


class Traffic:
    """Publishes ten events at a time while the ``with`` block runs.

    Args:
        bank: whose handlers have the effects.
        send: publishes events (``event_type`` and ``payload``); a result for each, in order.
    """

    SIZE = 10
    #: Seconds between two batches.
    PACE = 0.1
    #: So many are on their way before the next batch waits.
    MOST = 30

    def __init__(self, bank: Bank, send: Send) -> None:
        self._bank, self._send = bank, send
        self._over = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="traffic", daemon=True)
        self._lock = threading.Lock()
        self._ledger, self._read_so_far = list[float](), 0
        self._calls: list[tuple[float, float]] = []
        self.acked: set[str] = set()
        self.failed: list[PublishResult] = []

    def __enter__(self) -> Traffic:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), "publishing did not end"
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        number = 0
        try:
            while not self._over.wait(self.PACE):
                if len(self.acked) - self._handled() > self.MOST:
                    continue
                began = time.time()
                batch = range(number, number + self.SIZE)
                number += self.SIZE
                results = self._send(
                    [{"event_type": "paid.load", "payload": {"id": n}} for n in batch]
                )
                self._calls.append((began, time.time()))
                for result in results:
                    if result.success:
                        self.acked.add(result.event_id)
                    else:
                        self.failed.append(result)
        except BaseException as error:
            self._error = error

    def goes_on(self, count: int) -> None:
        """Waits until so many more events are acked, and so many more effects are there."""
        for what in (self._published, self._handled):
            wanted = what() + count
            try:
                until(
                    lambda w=wanted, f=what: self._alive() and f() >= w, PATIENCE, f"{count} more"
                )
            except TimeoutError as error:
                raise AssertionError(
                    f"{error}: {self._published()} acked, {self._handled()} handled, "
                    f"{len(self.failed)} failed: {[result.error for result in self.failed[-3:]]}\n"
                    f"{self._bank.logs()}"
                ) from None

    def under(self, fault: str, do: Callable[[], object], *, count: int = 100) -> Line:
        """Does it in the middle, has the traffic go on after it; prints the line for the table."""
        self.goes_on(50)
        began, published = time.time(), self._published()
        failed = len(self.failed)
        do()
        self.goes_on(count)
        ended = time.time()
        acked = self._published() - published
        failed = len(self.failed) - failed
        line = Line(
            fault,
            published=acked + failed,
            acked=acked,
            failed=failed,
            publish_stall=max(after - before for before, after in self._calls if after > began),
            effect_stall=_longest(self._handled_at(), began, ended),
            seconds=ended - began,
        )
        print(line)
        return line

    def right(self, fault: str) -> None:
        """Of all that was acked each has its effect, once; nothing is dead, nothing left.

        What was reported failed may have been stored all the same: then it has one effect too.
        """
        bank, acked = self._bank, self.acked
        may_be = {result.event_id for result in self.failed}
        bank.wait_effects(list(acked), PATIENCE)
        effects = bank.effects()
        lost, doubled = acked - effects.keys(), {e: n for e, n in effects.items() if n > 1}
        strangers = effects.keys() - acked - may_be
        states = Counter(row.status for row in bank.inbox.find(limit=1_000_000))
        print(
            f"{fault}: {len(acked) + len(may_be)} published, {len(acked)} acked, {len(may_be)} "
            f"reported failed and {len(may_be & effects.keys())} of those stored; lost "
            f"{len(lost)}, doubled {len(doubled)}, dead {bank.dead_count()}, "
            f"{len(bank.ledger('begun')) - len(effects)} runs too many, {bank.refused()} refused"
        )
        assert not lost, f"{fault}: {len(lost)} lost: {list(lost)[:3]}"
        assert not doubled, f"{fault}: {len(doubled)} doubled: {list(doubled.items())[:3]}"
        assert not strangers, f"{fault}: effects of no event: {list(strangers)[:3]}"
        assert states == {"processed": len(effects)}, f"{fault}: {states}"
        assert bank.dead_count() == 0, f"{fault}: {bank.dead_letters()[:3]}"
        refused = [result for result in self.failed if not result.transient]
        assert not refused, f"{fault}: an outage was taken for a verdict: {refused[:3]}"

    def _alive(self) -> bool:
        if self._error is not None:
            raise self._error
        return True

    def _published(self) -> int:
        return len(self.acked)

    def _handled(self) -> int:
        return len(self._handled_at())

    def _handled_at(self) -> list[float]:
        """When runs ended, by the ledger; asked often, so each line is read once."""
        file = self._bank.ledger_file
        with self._lock:
            if file.exists():
                with file.open("rb") as ledger:
                    ledger.seek(self._read_so_far)
                    new = ledger.read()
                new = new[: new.rfind(b"\n") + 1]
                self._read_so_far += len(new)
                lines = map(json.loads, new.splitlines())
                self._ledger += [line["at"] for line in lines if line["what"] == "handled"]
            return self._ledger


def _longest(times: Iterable[float], began: float, ended: float) -> float:
    """The longest time in a span in which nothing came to its end, in seconds."""
    within = sorted(at for at in times if began <= at <= ended)
    return max(later - earlier for earlier, later in pairwise([began, *within, ended]))
