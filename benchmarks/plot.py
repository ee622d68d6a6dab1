"""Draws a report of ``run.py`` for the docs: ``python -m benchmarks.plot report.json image.svg``.

Runs in the peers' environment, which has matplotlib.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
mpl.rcParams["svg.hashsalt"] = "celery_jetstream"  # the same figures give the same file
mpl.rcParams["svg.fonttype"] = "none"
from matplotlib import pyplot as plt  # noqa: E402 - after the backend is chosen

OURS, OTHERS = "#6fb3c9", "#cccccc"
OUR_VARIANTS = ("bridged", "direct", "committed, direct")
NAMES = {
    "plain": "plain Celery",
    "bridged": "bridge",
    "direct": "direct mode",
    "committed, direct": "commit, outbox, direct",
}
PANELS = (
    ("drain", "prefork, 2 processes\nmessages per second"),
    ("drain-threads", "threads, 4\nmessages per second"),
    ("peers", "beside others (prefork, 2)\nmessages per second"),
    ("latency", "latency at low load, p50\nmilliseconds"),
)


def main() -> None:
    report = json.loads(Path(sys.argv[1]).read_text())
    panels = [(name, title) for name, title in PANELS if name in report["summary"]]
    figure, all_axes = plt.subplots(1, len(panels), figsize=(3.4 * len(panels), 2.8))
    for (name, title), axes in zip(panels, all_axes, strict=True):
        draw(axes, report["summary"][name], title)
    machine = report["machine"]
    about = (
        f"{report['at'][:10]}, {machine['cpus']} cores, Python {machine['python']}, "
        f"Celery {report['versions']['celery']}; medians, and the spread of the rounds"
    )
    figure.text(0.5, 0.01, about, ha="center", va="bottom", fontsize=7)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(sys.argv[2], metadata={"Date": None})


def draw(axes: Any, summary: dict[str, Any], title: str) -> None:
    """One benchmark: a bar for each variant's median, a line for its spread."""
    names = list(summary)
    rates = [summary[name]["rate"] for name in names]
    medians = [rate["median"] for rate in rates]
    spread = [
        [rate["median"] - rate["min"] for rate in rates],
        [rate["max"] - rate["median"] for rate in rates],
    ]
    colors = [OURS if name in OUR_VARIANTS else OTHERS for name in names]
    axes.barh(range(len(names)), medians, xerr=spread, color=colors, error_kw={"linewidth": 0.8})
    axes.set_yticks(range(len(names)), [NAMES.get(name, name) for name in names], fontsize=8)
    axes.invert_yaxis()
    axes.set_title(title, fontsize=8)
    axes.tick_params(axis="x", labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    for place, median in enumerate(medians):
        axes.text(
            0,
            place,
            f" {median:,.0f}" if median >= 100 else f" {median:.1f}",
            va="center",
            fontsize=7,
            color="black",
        )


if __name__ == "__main__":
    main()
