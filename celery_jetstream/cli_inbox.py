"""``celery -A app jetstream inbox …``: the commands over the inbox."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import click
from celery.bin.base import CeleryCommand, handle_preload_options

from .commands import (
    DRY_RUN,
    JSON,
    age_text,
    cut,
    duration,
    echo_json,
    inbox_of,
    progress_of,
)

__all__ = ("inbox",)

#: ``inbox_models.STATUSES``, without importing SQLAlchemy for ``--help``.
STATUSES = ("received", "processing", "processed", "failed")


@click.group(name="inbox")
def inbox() -> None:
    """The inbox: which handler has done with which event."""


@inbox.command(cls=CeleryCommand)
@click.option("--sql", is_flag=True, help="Only print the SQL.")
@click.pass_context
@handle_preload_options
def init(ctx: click.Context, sql: bool, **_: Any) -> None:
    """Creates the table; harmless to repeat.

    Exit status: 0 when it is as it must be, 1 when it cannot be made, or differs.
    """
    with inbox_of(ctx) as box:
        if sql:
            click.echo(box.ddl(), nl=False)
            return
        box.create_tables()
        differences = box.differences()
        for difference in differences:
            click.echo(difference)
        if differences:
            sys.exit(1)
        click.echo(f"the inbox is ready: {box.rows.table.fullname}")


@inbox.command("list", cls=CeleryCommand)
@click.option(
    "--limit", type=click.IntRange(min=1), default=50, show_default=True, help="At the most."
)
@click.option("--status", type=click.Choice(STATUSES), help="What was done.")
@click.option("--type", "event_type", help="An event type, or a pattern: user.*, order.>")
@click.option("--handler", help="The handler's task name, or its inbox_key.")
@click.option("--older-than", type=duration, help="Changed so long ago or longer: 5m, 1h, 2d.")
@click.option("--newer-than", type=duration, help="Changed so long ago or later.")
@JSON
@click.pass_context
@handle_preload_options
def list_(ctx: click.Context, limit: int, as_json: bool, **options: Any) -> None:
    """Lists what the handlers have done, the newest first."""
    from .exceptions import SubjectError
    from .inbox_admin import InboxFilter

    try:
        names = InboxFilter.__dataclass_fields__.keys() & options.keys()
        chosen = InboxFilter(**{name: options[name] for name in names})
    except SubjectError as error:
        raise click.BadParameter(str(error), param_hint="--type") from None
    with inbox_of(ctx, as_json) as box:
        rows = box.find(chosen, limit)
    if as_json:
        echo_json([row.as_dict() for row in rows])
    else:
        _echo_table(rows)


@inbox.command(cls=CeleryCommand)
@click.argument("event_id")
@JSON
@click.pass_context
@handle_preload_options
def show(ctx: click.Context, event_id: str, as_json: bool, **_: Any) -> None:
    """Shows what each handler has done with an event.

    Exit status: 1 when none has seen it.
    """
    with inbox_of(ctx, as_json) as box:
        rows = box.get(event_id)
    if not rows:
        raise click.ClickException(f"no handler has seen an event {event_id}")
    if as_json:
        echo_json([row.as_dict() for row in rows])
        return
    for row in rows:
        for name, value in row.as_dict().items():
            click.echo(f"{name:14} {'-' if value in (None, '') else value}")
        click.echo()


@inbox.command(cls=CeleryCommand)
@click.argument("event_id")
@click.option("--handler", help="Only this one: its task name, or its inbox_key.")
@JSON
@click.pass_context
@handle_preload_options
def reset(ctx: click.Context, event_id: str, handler: str | None, as_json: bool, **_: Any) -> None:
    """Has an event handled once more when its message comes again.

    What the handler did the first time stays done. Exit status: 1 when no handler has done with it.
    """
    with inbox_of(ctx, as_json) as box:
        changed = box.reset(event_id, handler)
    if as_json:
        echo_json({"changed": changed})
    else:
        click.echo(f"{changed} handlers will handle it once more")
    sys.exit(0 if changed else 1)


@inbox.command(cls=CeleryCommand)
@click.option(
    "--older-than", type=duration, help="Changed so long ago; default jetstream_inbox_retention."
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
    """Deletes rows that changed long ago; their events are handled again if they come again."""
    with inbox_of(ctx, as_json) as box, progress_of("prune") as progress:
        deleted = box.prune(older_than, dry_run=dry_run, max_seconds=max_seconds, progress=progress)
    if as_json:
        echo_json({"dry_run": dry_run, "deleted": deleted})
    else:
        click.echo(f"{deleted} rows{' would be' if dry_run else ''} deleted")


@inbox.command(cls=CeleryCommand)
@JSON
@click.pass_context
@handle_preload_options
def status(ctx: click.Context, as_json: bool, **_: Any) -> None:
    """Says how the inbox is.

    Exit status: 0 when it is healthy; 1 when its database is away, or its table is not as it must
    be.
    """
    with inbox_of(ctx, as_json) as box:
        found = box.status()
    found["healthy"] = not found["differences"]
    if as_json:
        echo_json(found)
    else:
        for line in _status_lines(found):
            click.echo(line)
    sys.exit(0 if found["healthy"] else 1)


def _echo_table(rows: Sequence[Any]) -> None:
    """At most 100 columns."""
    if not rows:
        click.echo("no events")
        return
    click.echo(f"{'event_id':36} {'type':18} {'handler':22} {'status':10} try {'age':>5}")
    for row in rows:
        click.echo(
            f"{cut(row.event_id, 36)} {cut(row.event_type, 18)} {cut(row.handler, 22)} "
            f"{row.status:10} {row.attempts:3} {age_text(row.age):>5}"
        )


def _status_lines(found: dict[str, Any]) -> Iterator[str]:
    yield f"{found['database']}: {found['table']}, kept for {age_text(found['retention'])}"
    for difference in found["differences"]:
        yield f"differs: {difference}"
    for warning in found["warnings"]:
        yield f"warning: {warning}"
    if "counts" in found:
        yield ", ".join(f"{count} {status}" for status, count in found["counts"].items())
        yield f"oldest that is being processed: {age_text(found['oldest_processing'])}"
    yield "healthy" if found["healthy"] else "not healthy"
