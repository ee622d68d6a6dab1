"""``celery -A app jetstream outbox …``: the commands over the outbox."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import click
from celery.bin.base import (
    LOG_LEVEL,
    CeleryCommand,
    CeleryDaemonCommand,
    CeleryOption,
    handle_preload_options,
)

from .commands import (
    ALL,
    DRY_RUN,
    JSON,
    Stopping,
    age_text,
    cut,
    daemon,
    duration,
    echo_json,
    filter_of,
    filter_options,
    http_address,
    jetstream_of,
    moment,
    outbox_of,
    progress_of,
    stop_on_signals,
)

__all__ = ("outbox",)


@click.group(name="outbox")
def outbox() -> None:
    """The transactional outbox: its tables, and the events in it."""


# -- commands ----------------------------------------------------------------------------------


@outbox.command(cls=CeleryCommand)
@click.option("--sql", is_flag=True, help="Only print the SQL.")
@click.pass_context
@handle_preload_options
def init(ctx: click.Context, sql: bool, **_: Any) -> None:
    """Creates the tables; harmless to repeat.

    Exit status: 0 when they are as they must be, 1 when they cannot be made, or differ.
    """
    with outbox_of(ctx) as box:
        if sql:
            click.echo(box.ddl(), nl=False)
            return
        box.create_tables()
        differences = box.differences()
        for difference in differences:
            click.echo(difference)
        if differences:
            sys.exit(1)
        names = ", ".join(table.fullname for table in box.database.tables)
        click.echo(f"the outbox is ready: {names}")


@outbox.command(cls=CeleryDaemonCommand)
@click.option(
    "--loglevel", "-l", cls=CeleryOption, default="INFO", type=LOG_LEVEL, help="Logging level."
)
@click.option(
    "--interval",
    type=duration,
    default=0.2,
    show_default=True,
    help="Between two looks, when idle.",
)
@click.option("--once", is_flag=True, help="Stop when nothing is due.")
@click.option("--http-address", "address", **http_address("none"))
@click.pass_context
@handle_preload_options
def relay(
    ctx: click.Context,
    loglevel: Any,
    interval: float,
    once: bool,
    address: tuple[str, int] | None,
    **options: Any,
) -> None:
    """Publishes what is in the outbox, until SIGTERM or SIGINT.

    For those who want it published without beat, or sooner than a beat comes. Any number of relays,
    workers and beats at once is correct. Outages are waited for. A second signal ends it at once.

    Exit status: 0 after a stop, 1 where it could not start.
    """
    from .http import serving
    from .relay import Relay

    app = ctx.obj.app
    with daemon(app, loglevel=loglevel, **options):
        jetstream = jetstream_of(app)
        running = Relay(jetstream.outbox.drain, interval=interval, once=once)
        stop_on_signals(running)
        jetstream.running["relay"] = running
        jetstream.connection.start()
        try:
            with serving(jetstream, address, "--http-address"):
                running.run()
        finally:
            jetstream.close()


@outbox.command("list", cls=CeleryCommand)
@click.option(
    "--limit", type=click.IntRange(min=1), default=50, show_default=True, help="At the most."
)
@click.option("--after", type=int, help="Go on after the row with this number.")
@JSON
@filter_options
@click.pass_context
@handle_preload_options
def list_(ctx: click.Context, limit: int, after: int | None, as_json: bool, **options: Any) -> None:
    """Lists events, in the order in which they were written."""
    chosen = filter_of(options)
    with outbox_of(ctx, as_json) as box:
        rows = box.find(chosen, limit, after)
    if as_json:
        echo_json([row.as_dict() for row in rows])
        return
    _echo_table(rows)
    if len(rows) == limit:
        click.echo(f"there may be more: --after {rows[-1].id}", err=True)


@outbox.command(cls=CeleryCommand)
@click.argument("event_id")
@JSON
@click.pass_context
@handle_preload_options
def show(ctx: click.Context, event_id: str, as_json: bool, **_: Any) -> None:
    """Shows an event with its body; of its headers only the names, as they may be secret.

    Exit status: 1 when there is no such event.
    """
    with outbox_of(ctx, as_json) as box:
        row = box.get(event_id)
    if row is None:
        raise click.ClickException(f"there is no event {event_id} in the outbox")
    values = row.as_dict()
    if as_json:
        echo_json(values)
        return
    body, error = values.pop("body"), values.pop("last_error")
    for name, value in values.items():
        text = ", ".join(value) if isinstance(value, list) else value
        click.echo(f"{name:14} {'-' if text in (None, '') else text}")
    if error:
        click.echo(f"\nlast_error\n{error}")
    click.echo(f"\nbody\n{json.dumps(body, indent=2, ensure_ascii=False)}")


@outbox.command(cls=CeleryCommand)
@ALL
@DRY_RUN
@JSON
@filter_options
@click.pass_context
@handle_preload_options
def retry(ctx: click.Context, **options: Any) -> None:
    """Has events published that were given up, or wait for their next try.

    Those that wait for them follow, in order. Exit status: 1 when some are being published now.
    """
    _change(ctx, "retry", **options)


@outbox.command(cls=CeleryCommand)
@ALL
@DRY_RUN
@JSON
@filter_options
@click.pass_context
@handle_preload_options
def cancel(ctx: click.Context, **options: Any) -> None:
    """Takes events back that are not sent.

    What waits for them goes on. Exit status: 1 when some are being published now.
    """
    _change(ctx, "cancel", **options)


def _change(
    ctx: click.Context,
    name: str,
    everything: bool,
    dry_run: bool,
    as_json: bool,
    **options: Any,
) -> None:
    chosen = filter_of(options)
    if chosen.is_empty != everything:
        raise click.UsageError("give a filter, or --all for every event", ctx)
    with outbox_of(ctx, as_json) as box, progress_of(name) as progress:
        outcome = getattr(box, name)(chosen, dry_run=dry_run, progress=progress)
    if as_json:
        echo_json({"dry_run": dry_run, **vars(outcome)})
    else:
        done = {"retry": "to be published again", "cancel": "cancelled"}[name]
        would = " would be" if dry_run else ""
        click.echo(f"{outcome.changed} events{would} {done}")
        if outcome.in_flight:
            click.echo(f"{outcome.in_flight} events are in flight: try again")
    sys.exit(1 if outcome.in_flight else 0)


@outbox.command(cls=CeleryCommand)
@click.option(
    "--older-than", type=duration, help="Sent so long ago; default jetstream_outbox_retention."
)
@click.option("--max-seconds", type=duration, help="How long at the most.")
@DRY_RUN
@JSON
@click.pass_context
@handle_preload_options
def prune(
    ctx: click.Context,
    older_than: float | None,
    max_seconds: float | None,
    dry_run: bool,
    as_json: bool,
    **_: Any,
) -> None:
    """Deletes events that were sent long ago; never one that was not sent."""
    with outbox_of(ctx, as_json) as box, progress_of("prune") as progress:
        deleted = box.prune(older_than, dry_run=dry_run, max_seconds=max_seconds, progress=progress)
    if as_json:
        echo_json({"dry_run": dry_run, "deleted": deleted})
    else:
        click.echo(f"{deleted} sent events{' would be' if dry_run else ''} deleted")


@outbox.command(cls=CeleryCommand)
@click.option("--since", type=moment, required=True, help="Sent since then: 1h, 2026-01-31T12:00Z.")
@click.option("--until", type=moment, help="And until then.")
@click.option("--after", type=int, default=0, help="Go on after the row with this number.")
@click.option("--rate", type=click.FloatRange(min=0, min_open=True), help="Events a second.")
@DRY_RUN
@JSON
@filter_options
@click.pass_context
@handle_preload_options
def replay(ctx: click.Context, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Publishes events again that were sent and are kept.

    For a JetStream that has lost them. Consumers with an inbox pass over what they have handled;
    others handle it twice. Exit status: 1 when an outage ended it, or some could not be sent.
    """
    chosen = filter_of(options)
    how = {name: options[name] for name in ("since", "until", "after", "rate")}
    stopping = Stopping()
    with outbox_of(ctx, as_json) as box, progress_of("replay") as progress:
        stop_on_signals(stopping)
        result = box.replay(**how, chosen=chosen, dry_run=dry_run, stop=stopping, progress=progress)
    if as_json:
        echo_json({"dry_run": dry_run, **result.as_dict()})
    else:
        click.echo(f"{result.sent} events{' would be' if dry_run else ''} published again")
        if result.refused:
            click.echo(f"{result.refused} events could not be published; the log says why")
        if result.error:
            click.echo(f"ended early ({result.error}); go on with --after {result.last_id}")
    sys.exit(1 if result.error or result.refused else 0)


@outbox.command(cls=CeleryCommand)
@click.option("--max-age", type=duration, help="Unhealthy where an event is due for longer.")
@JSON
@click.pass_context
@handle_preload_options
def status(ctx: click.Context, max_age: float | None, as_json: bool, **_: Any) -> None:
    """Says how the outbox is.

    Exit status: 0 when it is healthy; 1 when its database is away, its tables are not as they must
    be, or an event is due for longer than --max-age.
    """
    with outbox_of(ctx, as_json) as box:
        found = box.status()
    late = max_age is not None and (found.get("oldest_due") or 0) > max_age
    found["healthy"] = not (found["differences"] or late)
    if as_json:
        echo_json(found)
    else:
        for line in _status_lines(found):
            click.echo(line)
    sys.exit(0 if found["healthy"] else 1)


# -- output ------------------------------------------------------------------------------------


def _echo_table(rows: Sequence[Any]) -> None:
    """At most 100 columns."""
    if not rows:
        click.echo("no events")
        return
    click.echo(f"{'number':>8} {'event_id':36} {'type':20} {'key':12} {'state':10} try {'age':>5}")
    for row in rows:
        click.echo(
            f"{row.id:8} {cut(row.event_id, 36)} {cut(row.event_type, 20)} "
            f"{cut(row.ordering_key or '-', 12)} {row.state:10} {row.attempts:3} "
            f"{age_text(row.age):>5}"
        )


def _status_lines(found: dict[str, Any]) -> Iterator[str]:
    yield f"{found['database']}: {', '.join(found['tables'])}"
    for difference in found["differences"]:
        yield f"differs: {difference}"
    if "counts" in found:
        yield ", ".join(f"{count} {status}" for status, count in found["counts"].items())
        yield (
            f"oldest due {age_text(found['oldest_due'])}, oldest pending "
            f"{age_text(found['oldest_pending'])}, keys parked: {found['parked_keys']}"
        )
        for owner, count in found["leases"].items():
            yield f"{count} buckets leased by {owner}"
    for name, error in found["breaker"]["subjects"].items():
        yield f"{name} is left alone: {error}"
    yield "healthy" if found["healthy"] else "not healthy"
