"""``celery -A app jetstream …``: the commands. Imports what they need when they run."""

from __future__ import annotations

import json
import sys
from typing import Any

import click
from celery.bin.base import (
    LOG_LEVEL,
    CeleryCommand,
    CeleryDaemonCommand,
    CeleryOption,
    handle_preload_options,
)

from .cli_inbox import inbox
from .cli_outbox import outbox
from .commands import daemon, jetstream_of, stop_on_signals

__all__ = ("jetstream",)


@click.group(name="jetstream")
def jetstream() -> None:
    """Events through NATS JetStream."""


@jetstream.command(cls=CeleryDaemonCommand)
@click.option(
    "--loglevel", "-l", cls=CeleryOption, default="INFO", type=LOG_LEVEL, help="Logging level."
)
@click.option("--once", is_flag=True, help="Stop when the stream has no more messages for us.")
@click.option("--max-messages", type=click.IntRange(min=1), help="Stop after so many messages.")
@click.pass_context
@handle_preload_options
def bridge(
    ctx: click.Context,
    loglevel: Any,
    once: bool,
    max_messages: int | None,
    **options: Any,
) -> None:
    """Turns every JetStream message into a task, until SIGTERM or SIGINT.

    A second signal ends it at once. Exit status: 0 after a stop, 1 where it could not start.
    """
    from .bridge import Bridge

    app = ctx.obj.app
    with daemon(app, loglevel=loglevel, **options):
        running = Bridge(jetstream_of(app), max_messages=max_messages, once=once)
        stop_on_signals(running)
        running.run()


@jetstream.command(cls=CeleryCommand)
@click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")
@click.option("--json", "as_json", is_flag=True, help="For machines.")
@click.pass_context
@handle_preload_options
def provision(ctx: click.Context, dry_run: bool, as_json: bool, **_: Any) -> None:
    """Creates or updates the stream and the consumer; harmless to repeat.

    Exit status: 0 when all is as it must be, 1 when that cannot be.
    """
    from .exceptions import CeleryJetStreamError

    app = ctx.obj.app
    try:
        plan = jetstream_of(app).provision(dry_run=dry_run)
    except CeleryJetStreamError as error:
        if as_json:
            click.echo(json.dumps({"error": str(error)}))
            sys.exit(1)
        raise click.ClickException(str(error)) from error
    finally:
        jetstream_of(app).close()
    if as_json:
        click.echo(json.dumps({"dry_run": dry_run, "changes": _as_dicts(plan)}))
    else:
        click.echo(str(plan))


def _as_dicts(plan: Any) -> list[dict[str, Any]]:
    return [
        {
            "kind": change.kind,
            "name": change.name,
            "action": change.action,
            "differences": [d._asdict() for d in change.differences],
        }
        for change in plan.changes
    ]


@jetstream.command(cls=CeleryCommand)
@click.option("--json", "as_json", is_flag=True, help="For machines; with the payloads' schemas.")
@click.pass_context
@handle_preload_options
def handlers(ctx: click.Context, as_json: bool, **_: Any) -> None:
    """Lists the handlers: which events they take, from which queue. Needs no server.

    Exit status: 0; 1 where there is none, or two for one pattern.
    """
    from .exceptions import CeleryJetStreamError

    app = ctx.obj.app
    try:
        app.loader.import_default_modules()
        found = [_handler(app, task) for task in jetstream_of(app).check().tasks]
    except CeleryJetStreamError as error:
        raise click.ClickException(str(error)) from error
    if not found:
        raise click.ClickException(
            "no @jetstream_handler is known to this app: import the modules that define them "
            "(include=, imports or autodiscover_tasks)"
        )
    if as_json:
        click.echo(json.dumps(found))
        return
    for row in found:
        click.echo(row["task"])
        click.echo(f"  events    {', '.join(row['patterns'])}")
        click.echo(f"  queue     {row['queue'] or 'by its route'}")
        click.echo(f"  inbox     {row['inbox'] or 'no'}")
        if row["payload"]:
            click.echo(f"  payload   {row['payload']}")
        for step in row["upcasts"]:
            click.echo(f"  upcast    {step['from_version']} to {step['to_version']}: {step['by']}")


def _handler(app: Any, task: Any) -> dict[str, Any]:
    from .dispatcher import queue_of
    from .upcasts import upcasters_of

    steps = {step for pattern in task.event_types for step in upcasters_of(pattern)}
    inbox = None
    if task.has_inbox:
        inbox = "in one transaction" if task.wants_session else "around the call"
    return {
        "task": task.name,
        "patterns": list(task.event_types),
        "queue": queue_of(app, task),
        "inbox": inbox,
        "payload": task.payload_type.name if task.payload_type else None,
        "schema": task.payload_type.schema() if task.payload_type else None,
        "upcasts": [
            {
                "event_type": step.pattern,
                "from_version": step.from_version,
                "to_version": step.to_version,
                "by": step.name,
            }
            for step in sorted(steps, key=lambda step: (step.pattern, step.from_version))
        ],
    }


jetstream.add_command(inbox)
jetstream.add_command(outbox)
