"""gunicorn for real: forks after the app has published, threads, greenlets, reloads, ends.

Each request is one event; a client whose connection breaks asks again with the same ``event_id``,
as a browser or a proxy would. So each event is to be stored once, whatever happens meanwhile.
"""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import itertools
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from celery_jetstream.testing import NatsServer, wait_until
from tests.conftest import Names
from tests.databases import Database
from tests.publishing import Source
from tests.stack import ROOT, CeleryProcess

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(importlib.util.find_spec("gunicorn") is None, reason="no gunicorn"),
]

GEVENT = pytest.mark.skipif(importlib.util.find_spec("gevent") is None, reason="no gevent")
#: How requests publish; under gevent two greenlets must not run a loop each at once.
WAYS = {"sync": ("publish", "outbox", "async"), "gevent": ("publish", "outbox")}
WAYS["gthread"] = WAYS["sync"]
#: What is asked for at once.
CLIENTS = 6
#: Of gunicorn: requests have so long to end.
GRACE = 30
#: A worker that could not end its flush in time leaves a lease of 30 s behind.
FLUSHED = 60


class Web:
    """gunicorn with two workers, and clients that ask it again and again."""

    def __init__(
        self,
        directory: Path,
        nats_url: str,
        names: Names,
        database: Database,
        kind: str,
        *options: str,
    ) -> None:
        self._ways = WAYS[kind]
        self.source = Source(nats_url, names, database)
        first = "1" if "--preload" in options else ""
        self.before = ["before-the-fork-1", "before-the-fork-2"] if first else []
        command = [sys.executable, "-m", "gunicorn", "tests.apps.web:app", "-k", kind, *options]
        command += ["-b", "127.0.0.1:0", "-w", "2", "--graceful-timeout", str(GRACE)]
        command += ["--no-control-socket"]
        environment = {
            "WEB_CONF": json.dumps(self.source.settings),
            "WEB_FIRST": first,
            "PYTHONPATH": path(),
        }
        self.process = CeleryProcess(directory / "gunicorn.log", command, environment)
        self.process.wait_for("Booting worker", times=2)
        (port,) = re.findall(r"Listening at: http://127.0.0.1:(\d+)", self.process.text())
        self.port = int(port)
        self.answered: dict[str, dict[str, Any]] = {}
        self.again = 0
        self._numbers = itertools.count()
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=self._ask, daemon=True) for _ in range(CLIENTS)]

    def close(self) -> None:
        self._stopped.set()
        self.process.end()
        self.source.jetstream.close()

    # -- clients ---------------------------------------------------------------------------------

    def __enter__(self) -> Web:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive(), f"a request hangs\n{self.process.text()[-3000:]}"

    def _ask(self) -> None:
        while not self._stopped.is_set():
            number = next(self._numbers)
            event_id = f"web-{number}"
            while event_id not in self.answered and not self._stopped.is_set():
                self._ask_once(self._ways[number % len(self._ways)], event_id)

    def _ask_once(self, way: str, event_id: str) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=25)
        with contextlib.closing(connection):
            try:
                connection.request("GET", f"/{way}/{event_id}")
                answer = connection.getresponse()
                text = answer.read()
            except (OSError, http.client.HTTPException):
                self.again += 1
                time.sleep(0.01)
                return
            assert answer.status == 200, text
            self.answered[event_id] = json.loads(text)

    def goes_on(self, count: int = 60) -> None:
        """Waits for so many more answers."""
        wanted = len(self.answered) + count
        self._wait(
            lambda: wait_until(lambda: len(self.answered) >= wanted, 40, f"{count} more answers")
        )

    def _wait(self, waiting: Callable[[], object]) -> None:
        try:
            waiting()
        except TimeoutError as error:
            leases = self.source.jetstream.outbox.status()["leases"]
            raise AssertionError(f"{error}; {leases}\n{self.process.text()[-4000:]}") from None

    # -- what is stored --------------------------------------------------------------------------

    def stored_once(self) -> None:
        """What was answered, and what was published before the fork, is in the stream once."""
        assert all(answer["success"] for answer in self.answered.values())
        wanted = {*self.answered, *self.before}
        self._wait(lambda: self.source.wait_flushed(FLUSHED))
        found = [event_id for event_id in self.source.stored() if event_id in wanted]
        assert set(found) == wanted, f"{len(wanted - set(found))} are lost"
        assert len(found) == len(wanted), "some are stored twice"


def path() -> str:
    return os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])


@pytest.fixture
def make_web(
    tmp_path: Path, nats_server: NatsServer, names: Names, postgresql: Database
) -> Iterator[Callable[..., Web]]:
    webs: list[Web] = []

    def make(*options: str) -> Web:
        webs.append(Web(tmp_path, nats_server.url, names, postgresql, *options))
        return webs[-1]

    yield make
    for web in webs:
        web.close()


@pytest.mark.parametrize(
    ("kind", "preload"),
    [
        ("sync", True),
        pytest.param("sync", False, marks=pytest.mark.soak),
        pytest.param("gthread", True, marks=pytest.mark.soak),
        ("gthread", False),
        pytest.param("gevent", True, marks=[GEVENT, pytest.mark.soak]),
        pytest.param("gevent", False, marks=[GEVENT, pytest.mark.soak]),
    ],
)
def test_requests_publish_through_a_reload_and_to_the_end(
    make_web: Callable[..., Web], kind: str, preload: bool
) -> None:
    """HUP starts new workers and lets the old ones end; TERM ends all."""
    threads = ["--threads", "3"] if kind == "gthread" else []
    web = make_web(kind, *threads, *(["--preload"] if preload else []))
    with web:
        web.goes_on()
        web.process.send(signal.SIGHUP)
        web.process.wait_for("Booting worker", times=4)
        web.goes_on()
        before = time.monotonic()
        web.process.send(signal.SIGTERM)
        assert web.process.wait(2 * GRACE) == 0, web.process.text()[-3000:]
        took = time.monotonic() - before
    print(f"{kind}: {len(web.answered)} answers, {web.again} asked again, ended in {took:.1f} s")
    assert "was sent SIGKILL" not in web.process.text(), "a worker did not end in time"
    workers = {answer["pid"] for answer in web.answered.values()}
    assert web.process.pid not in workers
    assert len(workers) >= 3, "the reload brought no new worker"
    assert "Traceback" not in web.process.text(), web.process.text()[-4000:]
    web.stored_once()
