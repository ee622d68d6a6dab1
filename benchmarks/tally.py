"""Counts what the handlers did without disturbing them: one memory-mapped file per process.

A handler's process writes the time of each run into its own file (half a microsecond, no system
call, no lock); the benchmark reads all files. The clock is the machine's monotonic one, which all
processes share.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from pathlib import Path

DIRECTORY = "BENCH_TALLY"
_COUNT = struct.Struct("<q")
_TIME = struct.Struct("<d")
_SIZE = 8 * 2**22  # four million runs; the file is sparse

_pid = 0
_count = 0
_map: mmap.mmap


def tick() -> None:
    """Notes one run of a handler."""
    global _count
    if _pid != os.getpid():
        _open()
    _count += 1
    _TIME.pack_into(_map, 8 * _count, time.monotonic())
    _COUNT.pack_into(_map, 0, _count)


def _open() -> None:
    global _pid, _count, _map
    _pid, _count = os.getpid(), 0
    file = os.open(Path(os.environ[DIRECTORY]) / str(_pid), os.O_RDWR | os.O_CREAT)
    try:
        os.ftruncate(file, _SIZE)
        _map = mmap.mmap(file, _SIZE)
    finally:
        os.close(file)


class Reader:
    """What all processes wrote since :meth:`mark`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._maps: dict[str, mmap.mmap] = {}
        self._marks: dict[str, int] = {}

    def mark(self) -> None:
        """Counts from here on."""
        self._marks = {name: _COUNT.unpack_from(file)[0] for name, file in self._all().items()}

    @property
    def count(self) -> int:
        return sum(
            _COUNT.unpack_from(file)[0] - self._marks.get(name, 0)
            for name, file in self._all().items()
        )

    def times(self) -> list[float]:
        """When each run since the mark was, sorted (seconds of ``time.monotonic``)."""
        return sorted(
            _TIME.unpack_from(file, 8 * number)[0]
            for name, file in self._all().items()
            for number in range(self._marks.get(name, 0) + 1, _COUNT.unpack_from(file)[0] + 1)
        )

    def _all(self) -> dict[str, mmap.mmap]:
        for path in self._directory.iterdir():
            if path.name not in self._maps and path.stat().st_size == _SIZE:
                with path.open("rb") as file:
                    self._maps[path.name] = mmap.mmap(file.fileno(), _SIZE, prot=mmap.PROT_READ)
        return self._maps
