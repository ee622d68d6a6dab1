"""Two apps around one stream, for real: ``hub`` publishes here, ``desk`` handles in processes."""

from __future__ import annotations

import base64
import contextlib
import ctypes
import http.client
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from celery_jetstream import JetStream
from celery_jetstream.testing import wait_until
from tests.conftest import Names

ROOT = Path(__file__).parent.parent
#: A worker that polls quickly and starts without the talk of many workers.
WORKER = ("worker", "-l", "INFO", "--without-gossip", "--without-mingle", "-O", "fair")
#: For a test that is to hold in both modes.
in_both_modes = pytest.mark.parametrize("direct", [False, True], ids=["bridge", "direct"])
#: The same, where direct mode is left to `make crash`.
in_both_modes_soak = pytest.mark.parametrize(
    "direct",
    [False, pytest.param(True, marks=pytest.mark.soak)],
    ids=["bridge", "direct"],
)


class CeleryProcess:
    """One ``celery -A … …`` of a test: ends with it, by its own process id."""

    def __init__(
        self,
        log: Path,
        command: list[str],
        environment: Mapping[str, str],
        *,
        stdin: int | None = None,
    ) -> None:
        self.log = log
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                command,
                stdin=stdin,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                cwd=ROOT,
                preexec_fn=_end_with_the_parent,
                start_new_session=True,  # a group of its own: see end()
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    def poll(self) -> int | None:
        """The exit status; None while it runs."""
        return self.process.poll()

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL, and wait for its end (a pool's children end with their parent)."""
        self.process.kill()
        self.process.wait(10)

    def end(self) -> None:
        """SIGKILL to it and to what it has started: beat (``-B``) outlives a worker's SIGKILL."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.process.wait(10)

    def stop(self, timeout: float = 45) -> int:
        """SIGTERM; returns the exit status.

        A busy prefork worker of Celery's own needs 32 s in one of four cases: billiard's children
        wait for a count that the main process has stopped to keep.
        """
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(timeout)
            except subprocess.TimeoutExpired:
                self.kill()
                raise
        return self.process.returncode

    def wait(self, timeout: float = 30) -> int:
        return self.process.wait(timeout)

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_for(self, text: str, timeout: float = 30, times: int = 1) -> None:
        """Waits until the log has a text (so many times); fails early when the process ended."""

        def said() -> bool:
            if self.text().count(text) >= times:
                return True
            assert self.process.poll() is None, f"ended early:\n{self.text()[-3000:]}"
            return False

        wait_until(said, timeout, f"{text!r} in {self.log.name}")

    def get(self, path: str, method: str = "GET") -> tuple[int, str]:
        """Asks it by HTTP (``--http-address 0``): the status and the body."""
        self.wait_for(" serves /livez")
        found = re.search(r"http://127\.0\.0\.1:(\d+) serves", self.text())
        assert found
        return get(int(found[1]), path, method)


def get(port: int, path: str, method: str = "GET") -> tuple[int, str]:
    """The status and the body of an answer by HTTP."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=12)
    try:
        connection.request(method, path)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def _end_with_the_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class Stack:
    """The hub in this process, desk processes on demand, and the server's own account of both.

    Args:
        directory: for logs and the ledger.
        nats_url: of a running server.
        broker: the desk's Celery broker.
        names: the apps' and the stream's names.
        direct: workers take their messages from JetStream themselves; no bridge.
        settings: the desk's, beside what is needed (``jetstream_`` may be left out).
    """

    def __init__(
        self,
        directory: Path,
        nats_url: str,
        broker: str,
        names: Names,
        *,
        direct: bool = False,
        **settings: Any,
    ) -> None:
        self.direct = direct
        self.directory = directory
        self.names = names
        self.ledger_file = directory / "ledger"
        self._processes: list[CeleryProcess] = []
        common = {
            "jetstream_nats_urls": nats_url,
            "jetstream_stream_name": names.stream_name,
            "jetstream_num_replicas": settings.get("jetstream_num_replicas"),
        }
        app = Celery("hub", broker="memory://", set_as_current=False)
        app.conf.update(
            **common,
            jetstream_app_name=names.destination_app,
            jetstream_destination_app=names.app_name,
        )
        self.hub = JetStream(app)
        queue = f"desk-{names.app_name}"
        self.settings: dict[str, Any] = {
            **common,
            "broker_url": broker,
            "jetstream_app_name": names.app_name,
            "jetstream_destination_app": names.destination_app,
            "jetstream_backoff": [0.2],
            "task_default_queue": queue,
            "task_ignore_result": True,
            "broker_connection_retry_on_startup": True,
            "worker_cancel_long_running_tasks_on_connection_loss": False,
            "worker_lost_wait": 1,  # not 10 s: how soon a killed child's task is given up
            **settings,
        }

    # -- processes -------------------------------------------------------------------------------

    @property
    def environment(self) -> dict[str, str]:
        return {
            "DESK_CONF": json.dumps(self.settings),
            "DESK_LEDGER": str(self.ledger_file),
            "PYTHONPATH": str(ROOT),
        }

    def celery(self, *arguments: str, app: str = "tests.apps.desk", **extra: str) -> CeleryProcess:
        """Starts ``celery -A tests.apps.desk …``; ``extra`` goes to its environment."""
        name = f"{'-'.join(arguments[:2])}-{len(self._processes)}.log"
        command = [sys.executable, "-m", "celery", "-A", app, *arguments]
        process = CeleryProcess(self.directory / name, command, {**self.environment, **extra})
        self._processes.append(process)
        return process

    def start(self, *, workers: int = 1, **worker: Any) -> list[CeleryProcess]:
        """All that handles events: workers, and where they need one, a bridge; side by side."""
        started = [self.start_worker(**worker) for _ in range(workers)]
        if not self.direct:
            self.bridge()
        for process in started:
            process.wait_for("ready.")
        return started

    def worker(self, *arguments: str, **options: Any) -> CeleryProcess:
        """Starts a worker and waits until it is ready."""
        process = self.start_worker(*arguments, **options)
        process.wait_for("ready.")
        return process

    def start_worker(
        self, *arguments: str, pool: str = "prefork", concurrency: int = 2, **extra: str
    ) -> CeleryProcess:
        """A worker of the default queue (in direct mode, of none), not waited for."""
        command = ("jetstream", *WORKER) if self.direct else WORKER
        name = ("-n", f"w{len(self._processes)}@%h")
        return self.celery(*command, "-P", pool, "-c", str(concurrency), *name, *arguments, **extra)

    def bridge(self, *arguments: str, **extra: str) -> CeleryProcess:
        """Starts a bridge and waits until it pulls."""
        process = self.celery("jetstream", "bridge", *arguments, **extra)
        process.wait_for("bridge is ready")
        return process

    def close(self) -> None:
        for process in self._processes:
            process.end()
        self.hub.close()

    # -- what happened ---------------------------------------------------------------------------

    def publish(self, event_type: str, count: int = 1, **payload: Any) -> list[str]:
        """Publishes ``count`` events with ids 0, 1, …; returns their event_ids."""
        results = self.hub.publish_batch(
            [
                {"event_type": event_type, "payload": {"id": number, **payload}}
                for number in range(count)
            ]
        )
        assert all(results), [result.error for result in results if not result][:3]
        return [result.event_id for result in results]

    def ledger(self, what: str | None = None) -> list[dict[str, Any]]:
        """What the handlers wrote, oldest first."""
        if not self.ledger_file.exists():
            return []
        text = self.ledger_file.read_text()
        lines = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
        return [line for line in lines if what is None or line["what"] == what]

    def api(self, operation: str, request: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """One call of ``$JS.API``."""
        return self.hub.connection.run(self.hub._api, operation, request or {})

    def consumer(self) -> dict[str, Any]:
        """The server's account of the desk's consumer."""
        return self.api(f"CONSUMER.INFO.{self.names.stream_name}.{self.names.app_name}-workers")

    def left(self) -> int:
        """Messages for the desk that the stream still has."""
        return self._stored().get(f"{self.names.destination_app}.sync.{self.names.app_name}", 0)

    def dead_count(self) -> int:
        return self._stored().get(self._dlq, 0)

    def dead_letters(self) -> list[dict[str, Any]]:
        """The desk's dead letters: ``headers``, ``context`` (parsed) and ``body``, oldest first."""
        found, sequence = [], 1
        while True:
            answer = self.api(
                f"STREAM.MSG.GET.{self.names.stream_name}",
                {"seq": sequence, "next_by_subj": self._dlq},
            )
            if "error" in answer:
                return found
            message = answer["message"]
            sequence = message["seq"] + 1
            lines = base64.b64decode(message["hdrs"]).decode().split("\r\n")[1:]
            headers = dict(line.split(": ", 1) for line in lines if ": " in line)
            found.append(
                {
                    "headers": headers,
                    "reason": headers["x-dlq-reason"],
                    "context": json.loads(headers["x-dlq-context"]),
                    "body": base64.b64decode(message.get("data", "")),
                }
            )

    def wait_settled(self, timeout: float = 60) -> None:
        """Waits until the stream has nothing more for the desk, waiting, running or stuck."""

        def settled() -> bool:
            return self.left() == 0 and self.consumer()["num_ack_pending"] == 0

        try:
            wait_until(settled, timeout, "all messages to be settled")
        except TimeoutError as error:
            state = {k: self.consumer().get(k) for k in ("num_pending", "num_ack_pending")}
            raise AssertionError(
                f"{error}; left {self.left()}, {state}, dead {self.dead_count()}\n{self.logs()}"
            ) from None

    def wait_handled(self, count: int, timeout: float = 60) -> list[dict[str, Any]]:
        """Waits until so many runs have reached their end; returns those lines."""
        self.wait_ledger(lambda: len(self.ledger("handled")) >= count, timeout, f"{count} handled")
        return self.ledger("handled")

    def wait_ledger(self, condition: Callable[[], bool], timeout: float, what: str) -> None:
        try:
            wait_until(condition, timeout, what)
        except TimeoutError as error:
            raise AssertionError(
                f"{error}; ledger has {len(self.ledger())} lines\n{self.logs()}"
            ) from None

    def logs(self) -> str:
        return "\n".join(
            f"--- {process.log.name}\n{process.text()[-2500:]}" for process in self._processes
        )

    @property
    def _dlq(self) -> str:
        return f"{self.names.app_name}.sync.dlq"

    def _stored(self) -> dict[str, int]:
        """Messages by subject."""
        answer = self.api(f"STREAM.INFO.{self.names.stream_name}", {"subjects_filter": ">"})
        if "error" in answer:
            return {}
        found: dict[str, int] = answer["state"].get("subjects") or {}
        return found


def handled_once(stack: Stack, event_ids: list[str]) -> None:
    """Every one of these events was handled, and none of them twice."""
    counts: dict[str, int] = {}
    for line in stack.ledger("handled"):
        counts[line["event_id"]] = counts.get(line["event_id"], 0) + 1
    missing = [event_id for event_id in event_ids if event_id not in counts]
    assert not missing, f"{len(missing)} of {len(event_ids)} were never handled"
    twice = {event_id: count for event_id, count in counts.items() if count > 1}
    assert not twice, f"{len(twice)} were handled more than once: {list(twice.items())[:5]}"


def handled_all(stack: Stack, event_ids: list[str]) -> int:
    """Every one of these events was handled; returns how many runs were one too many."""
    lines = [line["event_id"] for line in stack.ledger("handled")]
    missing = set(event_ids) - set(lines)
    assert not missing, f"{len(missing)} of {len(event_ids)} were never handled"
    return len(lines) - len(set(lines))
