"""Two apps, a bridge, a worker and real webhooks, with nothing to install or start.

Starts a nats-server and a Celery broker made of files in a temporary directory; ``hub`` publishes
202 webhook deliveries and one message that is no event, ``desk`` handles them. A tenth is sent
twice, and two of the worker's children are killed in the middle of a handler. About half of them
are written to the hub's outbox, beside a row of its own; where the same delivery comes a second
time, both are rolled back. The first relay of the outbox is killed (SIGKILL) when JetStream has
what it sent and it has not noted that yet; the second takes over. Every number shown is asked from
the server, from the hub's database, or read from what the handlers wrote. The exit status is 0
only if all that was committed or published was stored and handled once, or became a dead letter,
and only what should; and if the totals on the board are exact.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from celery import Celery
from rich.console import Console

from celery_jetstream import JetStream
from celery_jetstream.exceptions import CeleryJetStreamError
from celery_jetstream.testing import NatsServer
from examples.demo import processes, view
from examples.demo.board import Board
from examples.demo.processes import Program
from examples.demo.store import Store
from examples.demo.stream import DeadLetter, Stream
from examples.demo.view import Outbox, State

POISON = "github.security_advisory."
STALLED = re.compile(r"stalled with (\d+) rows")
#: The worker is the only one of its kind.
ALONE = ("--without-gossip", "--without-mingle", "--without-heartbeat")


class Stopped(Exception):
    """A signal asked the demo to end."""


class Failed(Exception):
    """The demo cannot go on; says why."""


def main() -> int:
    options = read_options()
    signals = Signals()
    directory = Path(tempfile.mkdtemp(prefix="celery-jetstream-demo-")).resolve()
    console = view.console(stderr=options.json)
    try:
        with Demo(directory, options, signals) as demo:
            with view.Nothing() if options.json else view.screen(console) as screen:
                demo.run(screen)
            return report(demo, console, as_json=options.json)
    except Stopped:
        console.print("stopped")
        return 128 + signals.received
    except (Failed, CeleryJetStreamError) as error:
        console.print(f"the demo failed: {error}", style="red", markup=False, highlight=False)
        return 1
    finally:
        if options.keep:
            console.print(f"kept: {directory}", markup=False, soft_wrap=True)
        else:
            shutil.rmtree(directory, ignore_errors=True)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__)
    parser.add_argument("--events", type=int, help="only the first so many")
    parser.add_argument("--rate", type=float, default=100, help="events per second; 0: no limit")
    parser.add_argument("--timeout", type=float, default=60, help="seconds until it has failed")
    parser.add_argument("--json", action="store_true", help="no display; the sums as JSON")
    parser.add_argument("--keep", action="store_true", help="keep the directory with the logs")
    return parser.parse_args()


class Signals:
    """SIGINT, SIGTERM and SIGHUP set a mark, which the demo looks at ten times a second.

    Nothing is raised where a signal happens to arrive: that could leave a process behind.
    """

    def __init__(self) -> None:
        self.received = 0
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._receive)

    def _receive(self, number: int, _: object) -> None:
        self.received = self.received or number


class Demo:
    """Everything that runs, from start to end."""

    def __init__(self, directory: Path, options: argparse.Namespace, signals: Signals) -> None:
        self._directory = directory
        self._options = options
        self._signals = signals
        self._began = time.monotonic()
        self._server = NatsServer(directory / "nats")
        self._programs: list[Program] = []
        self._record = directory / "published"
        self._board = Board(directory)
        self._store = Store(directory)
        app = Celery("watcher", set_as_current=False)
        app.conf.update(jetstream_app_name="hub", jetstream_destination_app="desk")
        app.conf.update(jetstream_nats_urls=self._server.url)
        self._jetstream = JetStream(app)
        self._stream = Stream(self._jetstream)
        self.state = State()
        self.seconds = 0.0

    def __enter__(self) -> Demo:
        return self

    def __exit__(self, *_: object) -> None:
        self._jetstream.close()
        self._store.close()
        processes.end(self._programs, patience=3)
        self._server.stop()

    # -- the demo --------------------------------------------------------------------------------

    def run(self, screen: view.Nothing) -> None:
        """Starts everything, and returns when everything is settled."""
        self._server.start()
        self._board.make()
        self._store.make()
        desk = ["-m", "celery", "-A", "examples.demo.desk"]
        relay = ["-m", "celery", "-A", "examples.demo.hub", "jetstream", "outbox", "relay"]
        worker = self._start("worker", *desk, "worker", "-c", "2", "-l", "INFO", *ALONE)
        self._hub = self._start("hub", "-m", "examples.demo.hub", *self._hub_options())
        first = self._start("first relay", *relay, DEMO_STALL="1")
        # The queue is the worker's to declare: with files, two at a time may trip over each other.
        self._wait(lambda: worker.says(" ready."), "starting", screen)
        self._start("bridge", *desk, "jetstream", "bridge")
        self._wait(lambda: first.says("stalled with"), "running", screen)
        first.kill()
        self._start("second relay", *relay)
        self._wait(self._settled, "first relay killed", screen)
        self.seconds = time.monotonic() - self._began

    def _start(self, name: str, *arguments: str, **environment: str) -> Program:
        program = Program(
            name,
            list(arguments),
            self._directory / f"{name}.log",
            DEMO_DIRECTORY=str(self._directory),
            NATS_URL=self._server.url,
            TMPDIR=str(self._directory),
            PYTHONUNBUFFERED="1",
            **environment,
        )
        self._programs.append(program)
        return program

    def _hub_options(self) -> list[str]:
        options = [f"--rate={self._options.rate}", f"--record={self._record}"]
        if self._options.events is not None:
            options.append(f"--events={self._options.events}")
        return options

    def _wait(self, condition: Callable[[], bool], step: str, screen: view.Nothing) -> None:
        while True:
            self._look(step)
            screen.show(self.state)
            if condition():
                return
            if self._signals.received:
                raise Stopped
            for program in self._programs:
                if program.status is not None and not self._may_have_ended(program):
                    raise Failed(program.last_words())
            if time.monotonic() > self._began + self._options.timeout:
                logs = "\n".join(program.last_words() for program in self._programs)
                raise Failed(f"not done in {self._options.timeout:g} s: {self.state}\n{logs}")
            time.sleep(0.1)

    def _may_have_ended(self, program: Program) -> bool:
        return program.killed or (program is self._hub and program.status == 0)

    def _look(self, step: str) -> None:
        """In the order of the path: what has left one station is seen at the next."""
        hub_ended = self._hub.status == 0
        rows = self._store.outbox()
        published, left = self._stream.counts()
        self.state = State(
            step=step,
            hub_ended=hub_ended,
            total=max(published, len(self.noted("at once", "outbox", "sent twice"))),
            published=published,
            sent_twice=len(self.noted("sent twice")),
            outbox=Outbox(
                taken_in=self._store.taken_in(),
                written=sum(rows.values()),
                rolled_back=len(self.noted("rolled back")),
                flushed=rows.get("sent", 0),
                waiting=rows.get("pending", 0),
                cut_off=self._cut_off(),
            ),
            handled=len(self.handled()),
            skipped=self._board.skipped(),
            killed=len(list(self._directory.glob("killed-*"))),
            retried=self._board.retried(),
            dead_lettered=len(self.dead_letters()),
            left=left,
            repositories=self._board.repositories(8),
            actors=self._board.actors(6),
        )

    def _cut_off(self) -> int:
        """Rows that the first relay had when it was killed."""
        for program in self._programs:
            if program.killed and (said := STALLED.search(program.log.read_text())):
                return int(said[1])
        return 0

    def _settled(self) -> bool:
        state = self.state
        return state.hub_ended and state.outbox.waiting == state.left == 0 < state.published

    # -- what came of it -------------------------------------------------------------------------

    def record(self) -> list[dict[str, Any]]:
        """What the hub says that it has done."""
        if not self._record.exists():
            return []
        text = self._record.read_text()
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def noted(self, *how: str) -> list[dict[str, Any]]:
        return [line for line in self.record() if line["how"] in how]

    def handled(self) -> Counter[str]:
        """How often each event was handled."""
        return self._board.handled()

    def totals(self) -> dict[str, int]:
        """How many events the board has counted for each repository and actor."""
        return self._board.totals()

    def dead_letters(self) -> list[DeadLetter]:
        return self._stream.dead_letters()


def report(demo: Demo, console: Console, *, as_json: bool) -> int:
    """Prints the sums; returns the exit status."""
    state, wrong = demo.state, list(faults(demo))
    if as_json:
        print(json.dumps(numbers(demo, wrong), indent=2))
    else:
        console.print(view.activity(state), view.letters(demo.dead_letters()), view.sums(state))
        if not wrong:
            console.print(f"It adds up, after {demo.seconds:.1f} s.", style="green")
        for fault in wrong:
            console.print(fault, style="red", markup=False)
    return 1 if wrong else 0


def faults(demo: Demo) -> list[str]:
    """What does not add up, by the ids of the events and not only by their number."""
    state, outbox, record = demo.state, demo.state.outbox, demo.record()
    by_way = Counter(line["how"] for line in record)
    meant = [line for line in record if line["how"] != "rolled back"]
    published = {line["event_id"] for line in meant if line["event_id"]}
    poison = {line["event_id"] for line in meant if line["event_type"].startswith(POISON)}
    handled = demo.handled()
    twice = sorted(event_id for event_id, times in handled.items() if times > 1)
    happened = [line for line in meant if line["how"] != "sent twice"]
    totals = Counter(
        name for line in happened if line["event_id"] not in poison for name in line["names"]
    )
    victims = {kind for line in happened if (kind := _victim(line["event_type"]))}
    dead = {(letter.event_id, letter.reason) for letter in demo.dead_letters()}
    expected = {(event_id, "unrecoverable_error") for event_id in poison}
    expected |= {("", "malformed_json") for line in meant if not line["event_id"]}
    found = {
        f"published {state.published} is not handled {state.handled} + skipped {state.skipped} + "
        f"dead-lettered {state.dead_lettered}": (
            state.published != state.handled + state.skipped + state.dead_lettered
        ),
        f"sent twice {state.sent_twice}, skipped {state.skipped}": (
            state.sent_twice != state.skipped
        ),
        f"children killed {state.killed}, to be killed {len(victims)}": (
            state.killed != len(victims)
        ),
        f"the totals are not exact: {sorted(totals.items() ^ demo.totals().items())}": (
            totals != demo.totals()
        ),
        f"the hub published {len(meant)}, the stream took {state.published}": (
            len(meant) != state.published
        ),
        f"{state.left} messages are left in the stream": state.left > 0,
        f"committed {by_way['outbox']} with their rows {outbox.taken_in}, the outbox has "
        f"{outbox.written} and has sent {outbox.flushed}": (
            len({by_way["outbox"], outbox.taken_in, outbox.written, outbox.flushed}) > 1
        ),
        "the relay that was killed had no rows": outbox.cut_off == 0,
        f"handled twice: {twice}": bool(twice),
        f"not as published: {sorted(handled.keys() ^ (published - poison))}": (
            handled.keys() != published - poison
        ),
        f"dead letters are {sorted(dead)}, expected {sorted(expected)}": dead != expected,
    }
    return [fault for fault, is_there in found.items() if is_there]


def _victim(event_type: str) -> str:
    """The kind, where its handler is killed once."""
    kind = event_type.split(".")[1] if event_type else ""
    return kind if kind in ("push", "issues") else ""


def numbers(demo: Demo, wrong: list[str]) -> dict[str, Any]:
    names = ("published", "sent_twice", "handled", "skipped", "killed", "retried")
    names += ("dead_lettered", "left")
    return {
        **{name: getattr(demo.state, name) for name in names},
        "outbox": dataclasses.asdict(demo.state.outbox),
        "adds_up": not wrong,
        "faults": wrong,
        "dead_letters": [dataclasses.asdict(letter) for letter in demo.dead_letters()],
        "seconds": round(demo.seconds, 1),
    }


if __name__ == "__main__":
    sys.exit(main())
