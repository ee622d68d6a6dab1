"""The examples and the README's code, run as a newcomer runs them."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nats
import pytest

from celery_jetstream.testing import NatsServer, wait_until
from examples.demo import __main__ as demo_program
from examples.demo.stream import DeadLetter
from examples.demo.view import Outbox, State
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
        process.end()


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
    assert sums["handled"] + sums["dead_lettered"] == 203
    assert sums["sent_twice"] == sums["skipped"] == 21
    assert sums["published"] == 203 + 21
    assert sums["killed"] == 2, "two children, in the middle of a handler"
    assert sums["left"] == 0
    outbox = sums["outbox"]
    assert outbox["written"] == outbox["taken_in"] == outbox["flushed"] == 102
    assert outbox["rolled_back"] == 11
    assert outbox["cut_off"] > 0, "the relay had sent rows when it was killed"
    assert sums["retried"] >= 8, "every check_run fails once, and two were killed"
    assert sorted((d["event_type"], d["reason"]) for d in sums["dead_letters"]) == [
        ("", "malformed_json"),
        ("github.security_advisory.updated", "unrecoverable_error"),
        ("github.security_advisory.withdrawn", "unrecoverable_error"),
    ]
    assert "could not convert string to float" in sums["dead_letters"][-1]["error"]
    assert left_behind(environment) == []


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.soak)]
)
@pytest.mark.parametrize("moment", ["starting", "first relay killed"])
def test_a_stopped_demo_leaves_no_process_and_no_file(
    start: Start, environment: dict[str, str], number: signal.Signals, moment: str
) -> None:
    need("nats")
    demo = start("demo", [*DEMO, "--rate=20"], environment)
    demo.wait_for(f"{moment}: ")
    assert len(processes_of(environment)) >= (2 if moment == "starting" else 7)
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
NAMES = ["ann", "shop"]
RECORD = [
    {"how": "at once", "event_type": "", "event_id": "", "names": []},
    {"how": "at once", "event_type": "github.push", "event_id": "good", "names": NAMES},
    {
        "how": "sent twice",
        "event_type": "github.push",
        "event_id": "good",
        "names": ["ann", "shop"],
    },
    {
        "how": "outbox",
        "event_type": "github.security_advisory.x",
        "event_id": "bad",
        "names": ["b"],
    },
    {"how": "rolled back", "event_type": "github.push", "event_id": "never", "names": ["ann"]},
]
TOTALS = {"ann": 1, "shop": 1}
OUTBOX = Outbox(taken_in=1, written=1, rolled_back=1, flushed=1, cut_off=1)


def faults(
    handled: dict[str, int],
    letters: list[DeadLetter],
    left: int = 0,
    outbox: Outbox = OUTBOX,
    totals: dict[str, int] = TOTALS,
    **more: int,
) -> list[str]:
    counts = {"sent_twice": 1, "skipped": 1, "killed": 1, **more}
    state = State(
        published=4,
        handled=len(handled),
        dead_lettered=len(letters),
        left=left,
        outbox=outbox,
        **counts,
    )
    demo: Any = SimpleNamespace(
        state=state,
        record=lambda: RECORD,
        handled=lambda: Counter(handled),
        totals=lambda: totals,
        dead_letters=lambda: letters,
    )
    return demo_program.faults(demo)


@pytest.mark.parametrize(
    ("handled", "letters", "left", "number"),
    [
        ({"good": 1}, [NO_JSON, LETTER], 0, 0),
        ({}, [NO_JSON, LETTER], 0, 2),  # one is lost: the sum, and its id
        ({"bad": 1}, [NO_JSON, LETTER], 0, 1),  # the sum is right, the event is not
        ({"never": 1}, [NO_JSON, LETTER], 0, 1),  # it was rolled back
        ({"good": 2}, [NO_JSON, LETTER], 0, 1),
        ({"good": 1}, [NO_JSON], 1, 3),
        ({"good": 1}, [LETTER, dataclasses.replace(NO_JSON, reason="no_handler")], 0, 1),
    ],
)
def test_the_demo_finds_what_does_not_add_up(
    handled: dict[str, int], letters: list[DeadLetter], left: int, number: int
) -> None:
    assert len(faults(handled, letters, left)) == number


@pytest.mark.parametrize(
    ("wrong", "number"),
    [
        ({"totals": {"ann": 2, "shop": 1}}, 1),  # counted up twice
        ({"totals": {"ann": 1}}, 1),
        ({"skipped": 0}, 2),  # the sum, and what was sent twice
        ({"killed": 0}, 1),
    ],
)
def test_the_demo_finds_effects_that_are_not_exactly_once(
    wrong: dict[str, Any], number: int
) -> None:
    assert len(faults({"good": 1}, [NO_JSON, LETTER], **wrong)) == number


@pytest.mark.parametrize(
    "wrong", [{"taken_in": 0}, {"written": 2, "flushed": 2}, {"flushed": 0}, {"cut_off": 0}]
)
def test_the_demo_finds_an_outbox_that_does_not_add_up(wrong: dict[str, int]) -> None:
    outbox = dataclasses.replace(OUTBOX, **wrong)
    assert len(faults({"good": 1}, [NO_JSON, LETTER], outbox=outbox)) == 1


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


# -- the transactional outbox ----------------------------------------------------------------------

SHOP, MAILER = (f"examples.transactional_outbox.{name}" for name in ("app", "mailer"))
PLACED = """\
order 1: placed, paid and shipped; its reminder is cancelled
order 2: placed, paid and shipped; its reminder is cancelled
order 3: placed; a reminder waits
declined, and no event of it was sent: order 4 of dan@example.com
"""


def stored_in(url: str, stream: str) -> list[tuple[str, str]]:
    """The type and the resource_id of each event in a stream, in order."""

    async def read() -> list[tuple[str, str]]:
        client = await nats.connect(url)
        jetstream = client.jetstream()
        last = (await jetstream.stream_info(stream)).state.last_seq
        messages = [await jetstream.get_msg(stream, seq) for seq in range(1, last + 1)]
        await client.close()
        events = [json.loads(message.data) for message in messages]
        return [(event["event_type"], event["resource_id"]) for event in events]

    return asyncio.run(read())


@pytest.mark.parametrize("kind", ["postgresql", pytest.param("sqlite", marks=pytest.mark.soak)])
def test_the_shop_publishes_what_it_commits(
    request: pytest.FixtureRequest,
    start: Start,
    environment: dict[str, str],
    server: NatsServer,
    kind: str,
) -> None:
    if kind == "postgresql":
        environment["DATABASE_URL"] = request.getfixturevalue("postgresql").url
    environment["NATS_URL"] = server.url
    celery = [sys.executable, "-m", "celery", "-A"]

    def outbox(*arguments: str) -> str:
        ended = subprocess.run(
            [*celery, SHOP, "jetstream", "outbox", *arguments],
            env=environment, cwd=ROOT, capture_output=True, text=True, timeout=30,
        )  # fmt: skip
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout

    def states() -> list[str]:
        return [row["state"] for row in json.loads(outbox("list", "--json"))]

    assert "the outbox is ready" in outbox("init")
    worker = start("shop", [*celery, SHOP, "worker", "-B", "-c", "1", "-l", "INFO"], environment)
    worker.wait_for(" ready.")
    shop = start("orders", [sys.executable, "-m", SHOP], environment)
    assert shop.wait() == 0, shop.text()
    assert shop.text() == PLACED
    wait_until(lambda: states().count("sent") == 7, 30, "the events to be sent")
    assert Counter(states()) == {"sent": 7, "cancelled": 2, "scheduled": 1}
    assert "1 pending, 7 sent" in outbox("status")
    stored = stored_in(server.url, "jetstream-bridge-stream")
    for order, steps in ("1", ["placed", "paid", "shipped"]), ("3", ["placed"]), ("4", []):
        assert [what for what, key in stored if key == order] == [f"order.{s}" for s in steps]

    mailer = start("mailer", [*celery, MAILER, "worker", "-c", "1", "-l", "INFO"], environment)
    mailer.wait_for(" ready.")
    start("bridge", [*celery, MAILER, "jetstream", "bridge"], environment)
    mailer.wait_for("to ben@example.com: order 2 is shipped")
    mailer.wait_for("to cleo@example.com: order 3 is placed")
    assert "dan@example.com" not in mailer.text()


# -- the README ---------------------------------------------------------------------------------

USE = """
from sqlalchemy.orm import Session
import app
from celery_jetstream.testing import wait_until
outbox = app.jetstream.outbox
result = app.check_stock({"id": 1})
print(result.stream, result.sequence, result.subject)
with Session(outbox.database.engine) as session, session.begin():
    app.place_order(session, {"id": 7})
outbox.drain()
wait_until(lambda: [row.state for row in outbox.find()] == ["sent"], 10, "the event to be sent")
app.jetstream.inbox.create_tables()
with Session(outbox.database.engine) as session, session.begin():
    session.execute(app.text("CREATE TABLE invoices (id INTEGER)"))
    app.on_invoice({"event_type": "invoice.sent", "payload": {"id": 1}}, session=session)
    print(session.scalar(app.text("SELECT count(*) FROM invoices")))
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

    assert "the outbox is ready" in run("-m", "celery", "-A", "app", "jetstream", "outbox", "init")
    assert run("-c", USE).splitlines() == [
        "jetstream-bridge-stream 1 shop.sync.billing",
        "1",
    ]
    plan = run("-m", "celery", "-A", "app", "jetstream", "provision", "--dry-run")
    assert "nothing to do: all is as wanted" in plan


def test_the_readme_keeps_its_length() -> None:
    lines = (ROOT / "README.md").read_text("utf-8").splitlines()
    assert len(lines) <= 200
    assert lines.index("```python") < 30, "code on the first screen"
