"""``make bench``: the figures, as a table on stdout and as JSON in ``benchmarks/results/``.

Starts its own servers. The variants of a benchmark take turns, in the opposite order every other
round, so that a busy machine is unfair to all of them alike; look at the ratios and at the CPU per
message, not at single rates. ``others`` is what else ran on the machine meanwhile.

    python benchmarks/run.py [--rounds 3] [--count n] [--rows 1000000] [--only outbox] …

Each benchmark is explained in its module; ``plans`` and ``pinned`` print tables of their own. What
needs a server that is not on the machine, or a peer that cannot be installed, is left out, which is
said.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

from benchmarks import (
    drain,
    growth,
    inbox,
    intake,
    latency,
    memory,
    outbox,
    outbox_growth,
    outbox_latency,
    outbox_writers,
    peers,
    publish,
)
from benchmarks.figures import Sample, shown, summarise, table
from benchmarks.rig import peer_versions
from tests.servers import missing

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parent.parent
VERSIONS = ("celery", "kombu", "nats-py", "redis", "sqlalchemy", "psycopg")

Variants = Mapping[str, Callable[[], Sample]]
Options = argparse.Namespace


@dataclass(frozen=True)
class Goal:
    """What a variant is to reach: a figure, or that beside another variant's.

    Attributes:
        variant: whose.
        value: what it is to reach; None where only the figure is wanted.
        to: the other variant; None for the figure itself.
        at_most: it is to stay below.
        of: which figure: the rate, a process' CPU (``cpu bridge``), or another (``p99``).
        unit: of a figure that is not the rate.
        less: the other variant's is subtracted, and not divided by.
    """

    variant: str
    value: float | None = None
    to: str | None = None
    at_most: bool = False
    of: str = "rate"
    unit: str = ""
    less: bool = False

    def line(self, samples: Sequence[Sample], unit: str) -> str:
        """What was found, what was wanted, and whether it is met; empty where it was not run."""
        names = {sample.variant for sample in samples}
        if not {self.variant, self.to or self.variant} <= names:
            return ""
        found = self._found(samples)
        what = self.variant if self.of == "rate" else f"{self.variant}, {self.of}"
        if self.to is None:
            text = f"{what}: {shown(found)} {self.unit or unit}"
        else:
            sign = "-" if self.less else "/"
            text = f"{what} {sign} {self.to}: {found:.2f}"
        if self.value is None:
            return text
        met = found <= self.value if self.at_most else found >= self.value
        bound = f"goal: at {'most' if self.at_most else 'least'} {self.value:g}"
        return f"{text} ({bound}; {'met' if met else 'NOT MET'})"

    def _found(self, samples: Sequence[Sample]) -> float:
        if self.to is None:
            return statistics.median(self._figures(samples, self.variant))
        pairs = zip(
            self._figures(samples, self.variant), self._figures(samples, self.to), strict=True
        )
        return statistics.median(a - b if self.less else a / b for a, b in pairs)

    def _figures(self, samples: Sequence[Sample], variant: str) -> list[float]:
        """One for each round."""
        mine = [sample for sample in samples if sample.variant == variant]
        if self.of == "rate":
            return [sample.rate for sample in mine]
        if self.of.startswith("cpu "):
            return [sample.cpu[self.of.removeprefix("cpu ")] for sample in mine]
        return [sample.more[self.of] for sample in mine]


@dataclass(frozen=True)
class Benchmark:
    """One benchmark: its rounds of samples, and how they are shown.

    Attributes:
        samples: gives them, in the order in which they are shown.
        bases: what ratios are to: the first of these that was run.
        goals: what is wanted.
        unit: of the rates.
        more: what else is shown of a sample.
        needs: the servers without which it is left out.
    """

    samples: Callable[[str, Options], list[Sample]]
    bases: tuple[str, ...]
    goals: tuple[Goal, ...]
    unit: str = "msg/s"
    more: tuple[str, ...] = ()
    needs: tuple[str, ...] = ("nats",)

    def base(self, samples: Iterable[Sample]) -> str:
        names = {sample.variant for sample in samples}
        return next(base for base in self.bases if base in names)


# -- what there is ---------------------------------------------------------------------------------


@contextmanager
def _intake(options: Options) -> Iterator[Variants]:
    with intake.running(options.count or 20_000) as found:
        yield found.variants


@contextmanager
def _publish(options: Options) -> Iterator[Variants]:
    with publish.running(max(100, (options.count or 3000) // 3)) as benchmark:
        yield benchmark.variants


@contextmanager
def _drain(options: Options) -> Iterator[Variants]:
    with drain.running(options.count or 3000) as benchmark:
        yield benchmark.variants


@contextmanager
def _threads(options: Options) -> Iterator[Variants]:
    with drain.running(options.count or 3000, pool=drain.THREADS) as benchmark:
        yield benchmark.variants


@contextmanager
def _handler_latency(options: Options) -> Iterator[Variants]:
    with latency.running(min(options.count or 200, 200)) as benchmark:
        yield benchmark.turns


@contextmanager
def _threads_latency(options: Options) -> Iterator[Variants]:
    with latency.running(min(options.count or 200, 200), pool=drain.THREADS) as benchmark:
        yield benchmark.turns


@contextmanager
def _peers(options: Options) -> Iterator[Variants]:
    with peers.running(options.count or 3000) as benchmark:
        _left_out(benchmark.left_out)
        yield benchmark.variants


@contextmanager
def _inbox(options: Options) -> Iterator[Variants]:
    with inbox.running(options.count or 3000) as variants:
        yield variants


@contextmanager
def _outbox(options: Options) -> Iterator[Variants]:
    with outbox.running(options.count or 10_000) as benchmark:
        _left_out(benchmark.left_out)
        yield benchmark.variants


@contextmanager
def _latency(options: Options) -> Iterator[Variants]:
    with outbox_latency.running(min(options.count or 100, 100)) as benchmark:
        _left_out(benchmark.left_out)
        yield benchmark.variants


@contextmanager
def _writers(options: Options) -> Iterator[Variants]:
    with outbox_writers.running(options.seconds) as benchmark:
        _left_out(benchmark.left_out)
        yield benchmark.variants


@contextmanager
def _adding(options: Options) -> Iterator[Variants]:
    with outbox_writers.running(options.seconds) as benchmark:
        yield benchmark.adding


def _rounds(
    variants: Callable[[Options], AbstractContextManager[Variants]],
) -> Callable[[str, Options], list[Sample]]:
    def samples(name: str, options: Options) -> list[Sample]:
        found: list[Sample] = []
        with variants(options) as turns:
            for number in range(options.rounds):
                names = list(turns)
                for variant in reversed(names) if number % 2 else names:
                    found.append(turns[variant]())
                    _progress(f"{name} {number + 1}/{options.rounds}", found[-1])
            order = list(turns)
        return sorted(found, key=lambda sample: order.index(sample.variant))

    return samples


def _outbox_growth(name: str, options: Options) -> list[Sample]:
    with outbox_growth.running(options.rounds, options.rows) as benchmark:
        return _shown(name, benchmark.samples())


def _growth(name: str, options: Options) -> list[Sample]:
    with growth.running(options.count or 5000) as benchmark:
        found = _shown(name, benchmark.samples(options.rounds, options.rows))
        order = list(benchmark.turns(options.rows))
    return sorted(found, key=lambda sample: order.index(sample.variant))


def _memory(name: str, options: Options) -> list[Sample]:
    with memory.running(options.count or 500_000) as benchmark:
        return _shown(name, benchmark.samples())


def _shown(name: str, samples: Iterable[Sample]) -> list[Sample]:
    found = []
    for sample in samples:
        found.append(sample)
        _progress(name, sample)
    return found


DATABASE = ("nats", "postgresql")
BENCHMARKS = {
    "publish": Benchmark(
        _rounds(_publish),
        (publish.BASE,),
        (
            Goal("apublish", 0.9, publish.BASE),
            Goal("publish", 0.6, publish.BASE),
            Goal("publish_batch", 0.8, publish.PIPELINED),
            Goal("publish_batch", 5.0, "publish"),
        ),
    ),
    "intake": Benchmark(
        _rounds(_intake),
        (intake.FETCH,),
        (
            Goal(intake.PLAIN, 3.0, intake.FETCH),
            Goal(intake.PULL, 3.0, intake.CONFIRMED),
            Goal(intake.PUSH, None, intake.PULL),
        ),
    ),
    "drain": Benchmark(
        _rounds(_drain),
        (drain.BASE,),
        (
            Goal(drain.BRIDGED, 0.9, drain.BASE),
            Goal(drain.BRIDGED, 200, at_most=True, of="cpu bridge", unit="us"),
            Goal(drain.DIRECT, 2.0, drain.BASE),
        ),
        needs=("nats", "redis"),
    ),
    "drain-threads": Benchmark(
        _rounds(_threads),
        (drain.BASE,),
        (Goal(drain.BRIDGED, None, drain.BASE), Goal(drain.DIRECT, 4.0, drain.BASE)),
        needs=("nats", "redis"),
    ),
    "latency": Benchmark(
        _rounds(_handler_latency),
        (drain.BASE,),
        (
            Goal(drain.BRIDGED, 3.0, drain.BASE, at_most=True, less=True),
            Goal(drain.DIRECT, 10.0, at_most=True, of="p99", unit="ms"),
        ),
        unit="ms",
        more=("p99", "max"),
        needs=("nats", "redis"),
    ),
    "latency-threads": Benchmark(
        _rounds(_threads_latency),
        (drain.BASE,),
        (Goal(drain.DIRECT, 10.0, at_most=True, of="p99", unit="ms"),),
        unit="ms",
        more=("p99", "max"),
        needs=("nats", "redis"),
    ),
    "growth": Benchmark(
        _growth,
        ("direct, backlog 1,000",),
        tuple(
            Goal(f"{mode}, backlog 1,000,000", None, f"{mode}, backlog 10,000")
            for mode in (drain.DIRECT, drain.BRIDGED)
        ),
        needs=("nats", "redis"),
    ),
    "memory": Benchmark(
        _memory,
        (f"{drain.DIRECT}, worker",),
        tuple(
            Goal(f"{mode}, {process}", 1.1, at_most=True, unit="of what it was")
            for mode, process in (
                (drain.DIRECT, "worker"),
                (drain.DIRECT, "child"),
                (drain.BRIDGED, "worker"),
                (drain.BRIDGED, "child"),
                (drain.BRIDGED, "bridge"),
            )
        ),
        unit="x",
        more=("before", "after"),
        needs=("nats", "redis"),
    ),
    "peers": Benchmark(
        _rounds(_peers),
        (peers.BASE,),
        tuple(Goal(peers.DIRECT, None, name) for name in (peers.BASE, *peers.HANDLERS)),
        needs=("nats", "redis"),
    ),
    "inbox": Benchmark(
        _rounds(_inbox),
        (inbox.BASE,),
        (
            Goal(inbox.INBOX, 0.75, inbox.BASE),
            Goal(inbox.INBOX, None, inbox.PLAIN),
            Goal(inbox.DIRECT_INBOX, None, inbox.PLAIN),
        ),
        needs=("nats", "redis", "postgresql"),
    ),
    "outbox": Benchmark(
        _rounds(_outbox),
        (outbox.BASE, outbox.WITHOUT_PEERS),
        (
            Goal("ours", 20_000),
            Goal("ours", 7.0, outbox.BASE),
            Goal("ours", None, "nats-outbox 1000"),
            Goal("ours", None, outbox.BEST_PEER),
        ),
        unit="rows/s",
        more=("statements", "dead", "hot", "wal", "inversions"),
        needs=DATABASE,
    ),
    "outbox-latency": Benchmark(
        _rounds(_latency),
        (outbox_latency.BASE,),
        (Goal(outbox_latency.BASE, 10.0, at_most=True),),
        unit="ms",
        more=("p95", "max"),
        needs=DATABASE,
    ),
    "outbox-writers": Benchmark(
        _rounds(_writers),
        (outbox_writers.BASE,),
        tuple(
            Goal(f"{kind}, {threads}", value, f"event, {threads}")
            for threads in outbox_writers.THREADS
            for kind, value in (
                ("event, nudge here", None),
                ("event, nudge by task", 0.8),
                ("event, NOTIFY", None),
            )
        ),
        unit="commits/s",
        more=("add_us",),
        needs=DATABASE,
    ),
    "outbox-add": Benchmark(
        _rounds(_adding), (outbox_writers.ADD_BASE,), (), unit="events/s", needs=DATABASE
    ),
    "outbox-growth": Benchmark(
        _outbox_growth,
        (outbox_growth.BASE,),
        (Goal("1,000,000", 0.8, outbox_growth.BASE),),
        unit="rows/s",
        needs=DATABASE,
    ),
}
#: Programs with tables of their own, and which of our options they take.
PROGRAMS = {"plans": ("rows",), "pinned": ()}


# -- the run ---------------------------------------------------------------------------------------


def main() -> int:
    options = _options()
    found: dict[str, list[Sample]] = {}
    failed = 0
    for name in options.only or (*BENCHMARKS, *PROGRAMS):
        needs = DATABASE if name in PROGRAMS else BENCHMARKS[name].needs
        if reasons := [reason for server in needs if (reason := missing(server))]:
            _left_out([f"{name}: {'; '.join(reasons)}"])
            continue
        if name in PROGRAMS:
            failed |= _run_program(name, options)
            continue
        benchmark = BENCHMARKS[name]
        found[name] = benchmark.samples(name, options)
        _show(name, benchmark, found[name])
    if found:
        _show_goals(found)
        _write(found, options)
    return failed


def _options() -> Options:
    parser = argparse.ArgumentParser(description=__doc__, prog="make bench")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--count", type=int, help="messages per turn; each has a default")
    parser.add_argument("--rows", type=int, default=1_000_000, help="the longest backlog")
    parser.add_argument("--seconds", type=float, default=outbox_writers.SECONDS, help="writers'")
    parser.add_argument("--only", action="append", choices=(*BENCHMARKS, *PROGRAMS))
    parser.add_argument("--output", type=Path, help="the JSON file; default: results/<time>.json")
    return parser.parse_args()


def _run_program(name: str, options: Options) -> int:
    print(f"\n{name}:", flush=True)
    given = [f"--{option}={getattr(options, option)}" for option in PROGRAMS[name]]
    command = [sys.executable, "-m", f"benchmarks.{name}", *given]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


def _left_out(reasons: Iterable[str]) -> None:
    for reason in reasons:
        print(f"left out: {reason}")


def _progress(where: str, sample: Sample) -> None:
    others = sample.more.get("others_cores")
    note = "" if others is None else f" (others: {others:.2f} cores)"
    print(f"{where}: {sample.variant} {shown(sample.rate)}{note}", file=sys.stderr)


def _show(name: str, benchmark: Benchmark, samples: list[Sample]) -> None:
    base = benchmark.base(samples)
    print(f"\n{name}: {benchmark.unit}, and microseconds of CPU for each by process")
    print(table(summarise(samples, base), base, unit=benchmark.unit, more=benchmark.more))
    for goal in benchmark.goals:
        if line := goal.line(samples, benchmark.unit):
            print(line)
    print()


def _show_goals(found: Mapping[str, Sequence[Sample]]) -> None:
    """Every goal that was run for, side by side."""
    print("goals:")
    for name, samples in found.items():
        benchmark = BENCHMARKS[name]
        for goal in benchmark.goals:
            line = goal.line(samples, benchmark.unit)
            if line and goal.value is not None:
                print(f"  {name:16}{line}")
    print()


def _write(found: Mapping[str, list[Sample]], options: Options) -> None:
    now = datetime.now(timezone.utc)
    path = options.output or RESULTS / f"{now:%Y%m%d-%H%M%S}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    report = {
        "at": now.isoformat(timespec="seconds"),
        "machine": {
            "cpus": os.cpu_count(),
            "platform": platform.platform(),
            "python": platform.python_version(),
            "load": os.getloadavg(),
        },
        "versions": {**{name: version(name) for name in VERSIONS}, **peer_versions()},
        "rounds": options.rounds,
        "count": options.count,
        "summary": {
            name: summarise(samples, BENCHMARKS[name].base(samples))
            for name, samples in found.items()
        },
        "samples": {name: [asdict(sample) for sample in s] for name, s in found.items()},
    }
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    sys.exit(main())
