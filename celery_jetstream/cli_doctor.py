"""``celery -A app jetstream doctor``: what will cost somebody days, and what to do about it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import click
from celery.bin.base import CeleryCommand, handle_preload_options

from .commands import JSON, denials_said_once, echo_json, jetstream_of
from .permissions import ROLES

__all__ = ("doctor",)

#: In this order they are shown.
SEVERITIES = ("ok", "skipped", "warning", "error")
COUNTED = {"ok": "ok", "skipped": "skipped", "warning": "warning(s)", "error": "error(s)"}
COLOURS = {"ok": "green", "skipped": None, "warning": "yellow", "error": "red"}


@click.command(cls=CeleryCommand)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0.1),
    default=10.0,
    show_default=True,
    help="Seconds for all of it.",
)
@click.option(
    "--monitor",
    metavar="URLS",
    default="",
    help="Monitoring ports of the nats-servers: http://nats:8222 (several: with commas).",
)
@click.option(
    "--role",
    type=click.Choice(ROLES),
    default="run",
    show_default=True,
    help="What its NATS user must be allowed: as the app's processes, an operator or an admin.",
)
@click.option("--strict", is_flag=True, help="Warnings are errors, too.")
@JSON
@click.pass_context
@handle_preload_options
def doctor(
    ctx: click.Context,
    timeout: float,
    monitor: str,
    role: str,
    strict: bool,
    as_json: bool,
    **_: Any,
) -> None:
    """Looks for what works today and costs days later, and says what to do.

    It changes nothing. What it could not see is skipped, and it says why.

    Exit status: 0 where there is no error; 1 where there is one, or with --strict a warning.
    """
    app = ctx.obj.app
    jetstream = jetstream_of(app)
    app.loader.import_default_modules()
    try:
        with denials_said_once():
            report = jetstream.doctor(timeout=timeout, monitor=monitor, role=role)
    finally:
        jetstream.close(timeout=1.0)
    if as_json:
        echo_json(report.as_dict())
    else:
        for line in _lines(report):
            click.echo(line)
    sys.exit(1 if report.errors or (strict and report.warnings) else 0)


def _lines(report: Any) -> Iterator[str]:
    said: set[tuple[str, str]] = set()
    for severity in SEVERITIES:
        for codes, finding in _together(report.of(severity)):
            sign = click.style(f"{severity:8}", fg=COLOURS[severity])
            yield f"{sign} {codes:18} {finding.found}"
            for word, text in (("why", finding.why), ("do", finding.remedy)):
                if text and (finding.code, text) not in said:  # once, for several of a kind
                    said.add((finding.code, text))
                    yield f"{'':27} {word + ':':4} {text}"
    yield ", ".join(f"{len(report.of(s))} {COUNTED[s]}" for s in reversed(SEVERITIES))


def _together(findings: list[Any]) -> Iterator[tuple[str, Any]]:
    """Each finding and its code; those skipped for one reason in one line."""
    alike: dict[str, list[Any]] = {}
    for finding in findings:
        key = finding.found if finding.severity == "skipped" else f"{len(alike)}"
        alike.setdefault(key, []).append(finding)
    for group in alike.values():
        yield ", ".join(dict.fromkeys(finding.code for finding in group)), group[0]
