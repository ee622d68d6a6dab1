"""``make bench``: the figures, as a table on stdout and as JSON in ``benchmarks/results/``.

Starts its own servers. The variants of a benchmark take turns, in the opposite order every other
round, so that a busy machine is unfair to all of them alike; look at the ratios and at the CPU per
message, not at single rates. ``others`` is what else ran on the machine meanwhile.

    python benchmarks/run.py [--rounds 3] [--count 3000] [--only drain|publish]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

from benchmarks import drain, publish
from benchmarks.figures import Sample, summarise, table
from tests.servers import missing

RESULTS = Path(__file__).parent / "results"
GOALS = {
    "drain": ("bridged", 0.75),
    "publish": ("publish_batch", 5.0),
}


def main() -> int:
    options = _options()
    found: dict[str, list[Sample]] = {}
    for name in options.only or ("publish", "drain"):
        if name == "drain" and (reason := missing("redis")):
            print(f"drain: left out, {reason}")
            continue
        found[name] = _benchmark(name, options)
    _write(found, options)
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, prog="make bench")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--count", type=int, default=3000, help="messages per turn")
    parser.add_argument("--only", action="append", choices=("drain", "publish"))
    parser.add_argument("--output", type=Path, help="the JSON file; default: results/<time>.json")
    return parser.parse_args()


def _benchmark(name: str, options: argparse.Namespace) -> list[Sample]:
    if name == "drain":
        with drain.running(options.count) as benchmark:
            variants = {"plain": benchmark.plain, "bridged": benchmark.bridged}
            samples = _rounds(name, options.rounds, variants)
    else:
        with publish.running(max(100, options.count // 3)) as publishing:
            samples = _rounds(name, options.rounds, publishing.variants)
    _show(name, samples)
    return samples


def _rounds(name: str, rounds: int, variants: Mapping[str, Callable[[], Sample]]) -> list[Sample]:
    samples: list[Sample] = []
    for number in range(rounds):
        turns = list(variants.values())
        for variant in reversed(turns) if number % 2 else turns:
            sample = variant()
            samples.append(sample)
            print(
                f"{name} {number + 1}/{rounds}: {sample.variant} {sample.rate:.0f}/s "
                f"(others: {sample.more['others_cores']:.2f} cores)",
                file=sys.stderr,
            )
    order = list(variants)
    return sorted(samples, key=lambda sample: order.index(sample.variant))


def _base(name: str) -> str:
    return drain.BASE if name == "drain" else publish.BASE


def _show(name: str, samples: list[Sample]) -> None:
    summary = summarise(samples, _base(name))
    variant, goal = GOALS[name]
    print(f"\n{name}: messages per second, and microseconds of CPU per message by process")
    print(table(summary, _base(name)))
    ratio = summary[variant]["ratio"]
    assert isinstance(ratio, dict)
    print(f"{variant} / {_base(name)}: {ratio['median']:.2f} (goal: at least {goal:g})\n")


def _write(found: Mapping[str, list[Sample]], options: argparse.Namespace) -> None:
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
        "versions": {name: version(name) for name in ("celery", "kombu", "nats-py", "redis")},
        "rounds": options.rounds,
        "count": options.count,
        "summary": {name: summarise(s, _base(name)) for name, s in found.items()},
        "samples": {name: [asdict(sample) for sample in s] for name, s in found.items()},
    }
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    sys.exit(main())
