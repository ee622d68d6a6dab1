"""Medians, spreads and tables: what the rounds of a benchmark say."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Sample:
    """One variant in one round.

    Attributes:
        variant: its name.
        rate: messages per second.
        cpu: microseconds of CPU per message, by process.
        more: anything else worth keeping.
    """

    variant: str
    rate: float
    cpu: dict[str, float] = field(default_factory=dict)
    more: dict[str, float] = field(default_factory=dict)


def summarise(samples: Sequence[Sample], base: str) -> dict[str, dict[str, object]]:
    """By variant: median and spread of the rate, of the CPU, and of the ratio to ``base``.

    The ratio is taken within each round, whose variants shared the machine's mood.
    """
    found: dict[str, dict[str, object]] = {}
    base_rates = [s.rate for s in samples if s.variant == base]
    for variant in dict.fromkeys(s.variant for s in samples):
        mine = [s for s in samples if s.variant == variant]
        ratios = [s.rate / b for s, b in zip(mine, base_rates, strict=True)]
        found[variant] = {
            "rounds": len(mine),
            "rate": _spread([s.rate for s in mine]),
            "ratio": _spread(ratios),
            "cpu_us": {name: _spread([s.cpu.get(name, 0.0) for s in mine]) for name in mine[0].cpu},
            "more": {name: _spread([s.more[name] for s in mine]) for name in mine[0].more},
        }
    return found


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 3),
        "min": round(min(values), 3),
        "max": round(max(values), 3),
    }


def table(summary: dict[str, dict[str, object]], base: str) -> str:
    """The summary as text: one line per variant."""
    names = list(next(iter(summary.values()))["cpu_us"])  # type: ignore[call-overload]
    head = ["", "msg/s", "(min … max)", f"x {base}", "(min … max)", *names]
    lines = [head]
    for variant, line in summary.items():
        rate, ratio, cpu = line["rate"], line["ratio"], line["cpu_us"]
        assert isinstance(rate, dict)
        assert isinstance(ratio, dict)
        assert isinstance(cpu, dict)
        lines.append(
            [
                variant,
                f"{rate['median']:.0f}",
                f"{rate['min']:.0f} … {rate['max']:.0f}",
                f"{ratio['median']:.2f}",
                f"{ratio['min']:.2f} … {ratio['max']:.2f}",
                *(f"{cpu[name]['median']:.0f}" if name in cpu else "-" for name in names),
            ]
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
