"""The end of an interpreter that has published: bounded and quiet, whatever threads and NATS do."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from celery_jetstream.testing import NatsServer, wait_until
from tests.conftest import Names
from tests.databases import Database
from tests.publishing import Source
from tests.servers import need
from tests.stack import ROOT, CeleryProcess

pytestmark = pytest.mark.timeout(90)

#: Of ``tests.apps.leaver``.
PROGRAMS = [
    *("idle", "daemon", "exits", "threads"),
    *("fork_exit", "fork_underscore_exit", "fork_unused", "multiprocessing_child"),
    *(["gevent"] if importlib.util.find_spec("gevent") else []),
]
#: Seconds: those of ``close()``, twice (a child's and its parent's), and some for a slow machine.
BOUND = 30.0


class Leaver(CeleryProcess):
    """A program that ends when it is told to."""

    def __init__(self, log: Path, program: str, settings: dict[str, Any]) -> None:
        command = [sys.executable, "-X", "faulthandler", "-m", "tests.apps.leaver", program]
        self._read, self._write = os.pipe()
        environment = {"LEAVER_CONF": json.dumps(settings), "PYTHONPATH": str(ROOT)}
        super().__init__(log, command, environment, stdin=self._read)
        self.program = program
        os.close(self._read)

    def leave(self) -> None:
        os.write(self._write, b"x")
        os.close(self._write)

    def stacks(self) -> str:
        """Where its threads are."""
        os.killpg(self.pid, signal.SIGABRT)
        self.process.wait(10)
        return self.text()[-6000:]


@pytest.mark.parametrize(
    "server_is",
    [
        pytest.param("there", marks=pytest.mark.soak),
        "hung",
        pytest.param("gone", marks=pytest.mark.soak),
    ],
)
def test_every_end_is_bounded_and_quiet(server_is: str, tmp_path: Path, names: Names) -> None:
    need("nats")
    with NatsServer() as server:
        settings = {
            "jetstream_nats_urls": server.url,
            "jetstream_stream_name": names.stream_name,
            "jetstream_app_name": names.app_name,
            "jetstream_destination_app": names.destination_app,
        }
        leavers = [Leaver(tmp_path / f"{program}.log", program, settings) for program in PROGRAMS]
        try:
            for leaver in leavers:
                leaver.wait_for("there", 60)
            if server_is == "hung":
                server.pause()
            elif server_is == "gone":
                server.kill()
            began = time.monotonic()
            for leaver in leavers:
                leaver.leave()
            took = {leaver.program: _seconds(leaver, began) for leaver in leavers}
            print(f"server {server_is}: {took}")
            for leaver in leavers:
                assert leaver.poll() == 0, f"{leaver.program}: {leaver.text()[-3000:]}"
                said = [line for line in leaver.text().splitlines() if line != "there"]
                assert not any(map(_is_bad, said)), f"{leaver.program}: {leaver.text()[-3000:]}"
        finally:
            for leaver in leavers:
                leaver.end()


def test_a_flush_after_a_commit_leaves_no_lease(
    tmp_path: Path, nats_server: NatsServer, names: Names, postgresql: Database
) -> None:
    """Else what is in its buckets would wait for the lease to end, 30 s."""
    source = Source(nats_server.url, names, postgresql)
    leaver = Leaver(tmp_path / "flushes.log", "flushes", source.settings)
    try:
        leaver.wait_for("there", 60)
        leaver.leave()
        print(f"it ended in {_seconds(leaver, time.monotonic())} s")
        assert leaver.poll() == 0, leaver.text()[-3000:]
        assert source.jetstream.outbox.status()["leases"] == {}
    finally:
        leaver.end()
        source.jetstream.close()


def _seconds(leaver: Leaver, began: float) -> float:
    try:
        wait_until(lambda: leaver.poll() is not None, BOUND, "its end")
    except TimeoutError:
        raise AssertionError(f"{leaver.program} does not end:\n{leaver.stacks()}") from None
    return round(time.monotonic() - began, 1)


def _is_bad(line: str) -> bool:
    return any(words in line for words in ("Traceback", "Fatal", "Exception ignored", "destroyed"))
