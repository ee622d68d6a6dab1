"""The examples and the README's code, run as a newcomer runs them."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from celery_jetstream.testing import NatsServer, wait_until
from examples.demo import __main__ as demo_program
from examples.demo.stream import DeadLetter
from examples.demo.view import State
from tests.servers import need
from tests.stack import ROOT, CeleryProcess

DEMO = [sys.executable, "-m", "examples.demo"]
Start = Callable[..., CeleryProcess]

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """The mark by which processes and files of these tests are known: all are under a folder."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    others = ("CELERY_", "NATS_", "JETSTREAM_")
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(others)}
    return {**inherited, "TMPDIR": str(scratch)}


@pytest.fixture
def server() -> Iterator[NatsServer]:
    """One of its own, for the examples use the names that come by default."""
    need("nats")
    with NatsServer() as running:
        yield running


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    running: list[CeleryProcess] = []

    def begin(name: str, command: list[str], environment: dict[str, str]) -> CeleryProcess:
        process = CeleryProcess(tmp_path / f"{name}.log", command, environment)
        running.append(process)
        return process

    yield begin
    for process in running:
        if process.process.poll() is None:
            process.kill()


def processes_of(environment: dict[str, str]) -> list[int]:
    """The processes that have our TMPDIR in their environment."""
    mark = f"TMPDIR={environment['TMPDIR']}".encode()
    found = []
    for file in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark in file.read_bytes():
                found.append(int(file.parent.name))
        except OSError:  # it has ended, or is another user's
            continue
    return found


def left_behind(environment: dict[str, str]) -> list[Any]:
    return [*processes_of(environment), *Path(environment["TMPDIR"]).iterdir()]


# -- the demo -----------------------------------------------------------------------------------


def test_the_demo_adds_up_and_leaves_nothing_behind(environment: dict[str, str]) -> None:
    need("nats")
    command = [*DEMO, "--json", "--rate=0"]
    ended = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=90
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    sums = json.loads(ended.stdout)
    assert sums["adds_up"] is True
    assert sums["published"] == sums["handled"] + sums["dead_lettered"] == 203
    assert sums["left"] == 0
    assert sums["retried"] == 6, "every check_run fails once"
    assert sorted((d["event_type"], d["reason"]) for d in sums["dead_letters"]) == [
        ("", "malformed_json"),
        ("github.security_advisory.updated", "unrecoverable_error"),
        ("github.security_advisory.withdrawn", "unrecoverable_error"),
    ]
    assert "could not convert string to float" in sums["dead_letters"][-1]["error"]
    assert left_behind(environment) == []


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["starting", "running"])
def test_a_stopped_demo_leaves_no_process_and_no_file(
    start: Start, environment: dict[str, str], number: signal.Signals, moment: str
) -> None:
    need("nats")
    demo = start("demo", [*DEMO, "--rate=20"], environment)
    demo.wait_for("handled," if moment == "starting" else "running: 31 published")
    assert len(processes_of(environment)) >= (2 if moment == "starting" else 6)
    demo.send(number)
    assert demo.wait(20) == 128 + number
    assert "Traceback" not in demo.text()
    wait_until(lambda: not processes_of(environment), 5, "all its processes to end")
    assert left_behind(environment) == []


def test_the_demo_fails_when_it_does_not_add_up(environment: dict[str, str]) -> None:
    """Its own alarm: with a deadline that cannot be met it says so, and how far it came."""
    need("nats")
    command = [*DEMO, "--timeout=0.5"]
    ended = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 1
    assert "not done in 0.5 s" in ended.stdout
    assert left_behind(environment) == []


LETTER = DeadLetter("unrecoverable_error", "ValueError", "github.security_advisory.x", "bad", 3)
NO_JSON = DeadLetter("malformed_json", "DecodeError", "", "", 1)
RECORD = [
    {"event_type": "", "event_id": "", "sequence": 1},
    {"event_type": "github.push", "event_id": "good", "sequence": 2},
    {"event_type": "github.security_advisory.x", "event_id": "bad", "sequence": 3},
]


@pytest.mark.parametrize(
    ("handled", "letters", "left", "faults"),
    [
        ({"good"}, [NO_JSON, LETTER], 0, 0),
        (set(), [NO_JSON, LETTER], 0, 2),  # one is lost: the sum, and its id
        ({"bad"}, [NO_JSON, LETTER], 0, 1),  # the sum is right, the event is not
        ({"good"}, [NO_JSON], 1, 3),
        ({"good"}, [LETTER, dataclasses.replace(NO_JSON, reason="no_handler")], 0, 1),
    ],
)
def test_the_demo_finds_what_does_not_add_up(
    handled: set[str], letters: list[DeadLetter], left: int, faults: int
) -> None:
    state = State(published=3, handled=len(handled), dead_lettered=len(letters), left=left)
    demo: Any = SimpleNamespace(
        state=state,
        record=lambda: RECORD,
        handled=lambda: handled,
        dead_letters=lambda: letters,
    )
    assert len(demo_program.faults(demo)) == faults


# -- the quickstart -----------------------------------------------------------------------------


def test_the_quickstart_handles_its_event(
    start: Start, environment: dict[str, str], server: NatsServer
) -> None:
    environment["NATS_URL"] = server.url
    celery = [sys.executable, "-m", "celery", "-A", "examples.quickstart.app"]
    worker = start("worker", [*celery, "worker", "-c", "1", "-l", "INFO"], environment)
    worker.wait_for(" ready.")
    bridge = start("bridge", [*celery, "jetstream", "bridge"], environment)
    bridge.wait_for("bridge is ready")
    shop = start("shop", [sys.executable, "-m", "examples.quickstart.app"], environment)
    assert shop.wait() == 0, shop.text()
    assert "stored in jetstream-bridge-stream as number 1" in shop.text()
    worker.wait_for("to ann@example.com: thank you for order 7")
    assert bridge.stop() == 0


# -- the README ---------------------------------------------------------------------------------

USE = """
import app
result = app.place_order({"id": 7})
print(result.stream, result.sequence, result.subject)
app.on_invoice({"event_type": "invoice.sent", "payload": {"id": 1}})
"""


def test_the_readme_code_runs(
    tmp_path: Path, environment: dict[str, str], server: NatsServer
) -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    code = re.search(r"```python\n(.*?)```", readme, re.DOTALL)
    assert code, "the README has no Python"
    (tmp_path / "app.py").write_text(code[1])
    environment = {**environment, "NATS_URL": server.url, "PYTHONPATH": str(ROOT)}

    def run(*arguments: str) -> str:
        ended = subprocess.run(
            [sys.executable, *arguments],
            env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=30,
        )  # fmt: skip
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout

    assert run("-c", USE).splitlines() == [
        "jetstream-bridge-stream 1 shop.sync.billing",
        "invoice.sent {'id': 1}",
    ]
    plan = run("-m", "celery", "-A", "app", "jetstream", "provision", "--dry-run")
    assert plan.count("as wanted") == 2, plan


def test_the_readme_keeps_its_length() -> None:
    lines = (ROOT / "README.md").read_text("utf-8").splitlines()
    assert len(lines) <= 200
    assert lines.index("```python") < 30, "code on the first screen"
