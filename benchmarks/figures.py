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
        rate: messages per second, or what else the benchmark measures.
        cpu: microseconds of CPU per message, by process.
        more: anything else worth keeping.
    """

    variant: str
    rate: float
    cpu: dict[str, float] = field(default_factory=dict)
    more: dict[str, float] = field(default_factory=dict)


def summarise(samples: Sequence[Sample], base: str) -> dict[str, dict[str, object]]:
    """By variant: median and spread of the rate, of the CPU, and of the ratio to ``base``."""
    found: dict[str, dict[str, object]] = {}
    for variant in dict.fromkeys(s.variant for s in samples):
        mine = [s for s in samples if s.variant == variant]
        found[variant] = {
            "rounds": len(mine),
            "rate": _spread([s.rate for s in mine]),
            "ratio": ratio(samples, variant, base),
            "cpu_us": {name: _spread([s.cpu.get(name, 0.0) for s in mine]) for name in mine[0].cpu},
            "more": {name: _spread([s.more[name] for s in mine]) for name in mine[0].more},
        }
    return found


def ratio(samples: Sequence[Sample], variant: str, base: str) -> dict[str, float]:
    """Of two variants' rates: taken within each round, whose variants shared the machine's mood."""
    rates = [s.rate for s in samples if s.variant == variant]
    base_rates = [s.rate for s in samples if s.variant == base]
    return _spread([rate / b for rate, b in zip(rates, base_rates, strict=True)])


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 3),
        "min": round(min(values), 3),
        "max": round(max(values), 3),
    }


def table(
    summary: dict[str, dict[str, object]],
    base: str,
    *,
    unit: str = "msg/s",
    more: Sequence[str] = (),
) -> str:
    """The summary as text: one line per variant.

    Args:
        summary: what :func:`summarise` gave.
        base: what the ratios are to.
        unit: of the rate.
        more: which of ``Sample.more`` is shown beside the CPU.
    """
    names = list(next(iter(summary.values()))["cpu_us"])  # type: ignore[call-overload]
    head = ["", unit, "(min … max)", f"x {base}", "(min … max)", *names, *more]
    lines = [head]
    for variant, line in summary.items():
        rate, ratios, cpu, others = line["rate"], line["ratio"], line["cpu_us"], line["more"]
        assert isinstance(rate, dict)
        assert isinstance(ratios, dict)
        assert isinstance(cpu, dict)
        assert isinstance(others, dict)
        lines.append(
            [
                variant,
                shown(rate["median"]),
                f"{shown(rate['min'])} … {shown(rate['max'])}",
                f"{ratios['median']:.2f}",
                f"{ratios['min']:.2f} … {ratios['max']:.2f}",
                *(f"{cpu[name]['median']:.0f}" if name in cpu else "-" for name in names),
                *(shown(others[name]["median"]) if name in others else "-" for name in more),
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


def shown(value: float) -> str:
    """A number with as many digits as are worth reading."""
    if value >= 100 or value == int(value):
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.3g}"
