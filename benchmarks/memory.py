"""Memory of bridge and worker over many messages: it must not grow.

Each mode handles ``count`` events in blocks, with nothing else between them. The resident set
of each process is read after a tenth of them, when all has been used once, and after the last. A
sample's figure is their ratio; the sizes, in MiB, are beside it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks import cpu
from benchmarks.drain import BRIDGED, DIRECT, Drain, event
from benchmarks.figures import Sample
from celery_jetstream.testing import wait_until

BLOCK = 5_000


class Memory(Drain):
    """As a drain, for longer."""

    def samples(self) -> Iterator[Sample]:
        """Each process, by mode."""
        yield from self._mode(DIRECT, {"worker": self.workers[DIRECT].pid})
        yield from self._mode(
            BRIDGED, {"worker": self.workers[BRIDGED].pid, "bridge": self.bridge.pid}
        )

    def _mode(self, mode: str, pids: dict[str, int]) -> Iterator[Sample]:
        pids = {**pids, "child": cpu.children(self.workers[mode].pid)[0]}
        first: dict[str, float] = {}
        for done in range(0, self.count, BLOCK):
            self._block(mode)
            if not first and done + BLOCK >= self.count // 10:
                first = {name: resident(pid) for name, pid in pids.items()}
        for name, pid in pids.items():
            before, after = first[name], resident(pid)
            more = {"before": before, "after": after}
            yield Sample(f"{mode}, {name}", after / before, {}, more)

    def _block(self, mode: str) -> None:
        self.tally.mark()
        results = self.hubs[mode].publish_batch(
            [event(number) for number in range(BLOCK)], timeout=120
        )
        assert all(results), next(result.error for result in results if not result)
        wait_until(lambda: self.tally.count >= BLOCK, 600, f"{BLOCK} handled")
        wait_until(lambda: self._settled(mode), 60, "everything to be settled")


def resident(pid: int) -> float:
    """MiB of memory that a process has (Linux)."""
    text = Path(f"/proc/{pid}/status").read_text()
    (line,) = (line for line in text.splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) / 1024


@contextmanager
def running(count: int) -> Iterator[Memory]:
    """A :class:`Memory` with a directory of its own."""
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as directory,
        Memory(Path(directory), count) as memory,
    ):
        yield memory
