"""``celery -A app jetstream …``: the commands. Imports what they need when they run."""

from __future__ import annotations

import copy
import inspect
import json
import os
from typing import Any

import click
from celery.bin.base import (
    LOG_LEVEL,
    CeleryCommand,
    CeleryDaemonCommand,
    CeleryOption,
    handle_preload_options,
)
from celery.bin.worker import worker as celery_worker
from kombu.utils.compat import detect_environment

from .cli_dlq import dlq
from .cli_doctor import doctor
from .cli_inbox import inbox
from .cli_outbox import outbox
from .cli_provision import provision
from .cli_status import status
from .commands import daemon, http_address, jetstream_of, stop_on_signals

__all__ = ("jetstream",)

NO_HANDLER = (
    "no @jetstream_handler is known to this app: import the modules that define them "
    "(include=, imports or autodiscover_tasks)"
)
PULLS = (
    "jetstream_consumer_mode='push': a worker of direct mode takes what it has room for, so it "
    "pulls; use jetstream_consumer_mode='pull', or a bridge"
)


@click.group(name="jetstream")
def jetstream() -> None:
    """Events through NATS JetStream."""


@jetstream.command(cls=CeleryDaemonCommand)
@click.option(
    "--loglevel", "-l", cls=CeleryOption, default="INFO", type=LOG_LEVEL, help="Logging level."
)
@click.option("--once", is_flag=True, help="Stop when the stream has no more messages for us.")
@click.option("--max-messages", type=click.IntRange(min=1), help="Stop after so many messages.")
@click.option("--http-address", "address", **http_address("jetstream_http_address, else none"))
@click.pass_context
@handle_preload_options
def bridge(
    ctx: click.Context,
    loglevel: Any,
    once: bool,
    max_messages: int | None,
    address: tuple[str, int] | None,
    **options: Any,
) -> None:
    """Turns every JetStream message into a task, until SIGTERM or SIGINT.

    A second signal ends it at once. Exit status: 0 after a stop, 1 where it could not start.
    """
    from .bridge import Bridge
    from .http import serving

    app = ctx.obj.app
    with daemon(app, loglevel=loglevel, **options):
        found = jetstream_of(app)
        running = Bridge(found, max_messages=max_messages, once=once)
        stop_on_signals(running)
        with serving(found, address or found.config.http_address):
            running.run()


def _direct_worker(without_broker: bool, address: tuple[str, int] | None, **options: Any) -> Any:
    """Starts a worker that takes its messages from JetStream itself, not from a bridge.

    It takes Celery's own options, and runs every handler of the app. It consumes no queue but those
    of -Q: other tasks (publish_event, beat's) need a worker of their own. Remote control goes
    through the broker, which --without-broker does without.

    Exit status: 1 where no server answers, or the stream and consumer cannot be had.
    """
    from .exceptions import CeleryJetStreamError
    from .http import serving

    app = click.get_current_context().obj.app
    found = jetstream_of(app)
    if without_broker and (options.get("queues") or options.get("task_events")):
        raise click.UsageError("--without-broker: there are no queues (-Q) and no events (-E)")
    if not options.get("detach"):  # that starts this command again
        try:
            app.loader.import_default_modules()
            if not found.check():
                raise click.ClickException(NO_HANDLER)
            if found.config.pushes:
                raise click.ClickException(PULLS)
            found.connect()
            found.check_permissions()
        except CeleryJetStreamError as error:
            raise click.ClickException(str(error)) from error
        finally:
            found.close()  # it connects anew once its children are forked
    if without_broker:
        options.update(_no_broker(app))
    if not options.get("queues"):
        options["exclude_queues"] = list(app.amqp.queues)
    found.dedicated = True
    try:
        with serving(found, None if options.get("detach") else address, "--http-address"):
            return celery_worker.callback(**options)
    except CeleryJetStreamError as error:
        raise click.ClickException(str(error)) from error


def _no_broker(app: Any) -> dict[str, Any]:
    """Has a worker connect to none: the settings, and its options."""
    os.environ.pop("CELERY_BROKER_READ_URL", None)  # it comes before the setting
    app.conf.broker_read_url = "memory://localhost/"
    return {
        "task_events": False,
        "without_gossip": True,
        "without_mingle": True,
        "without_heartbeat": True,
        # else Celery has no event loop for this transport, and prefork another pool, in which a
        # child that is killed can lock out the others
        "use_eventloop": detect_environment() == "default" or None,
    }


worker = copy.copy(celery_worker)
worker.callback = _direct_worker
worker.help = inspect.getdoc(_direct_worker)
worker.params = [
    *celery_worker.params,
    CeleryOption(
        ["--without-broker"],
        is_flag=True,
        help_group="Features",
        help="Take nothing from a broker, also not remote control.",
    ),
    CeleryOption(["--http-address", "address"], help_group="Features", **http_address("none")),
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
        raise click.ClickException(NO_HANDLER)
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


jetstream.add_command(dlq)
jetstream.add_command(doctor)
jetstream.add_command(inbox)
jetstream.add_command(outbox)
jetstream.add_command(provision)
jetstream.add_command(status)
jetstream.add_command(worker)
