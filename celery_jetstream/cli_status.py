"""``celery -A app jetstream status``: how the NATS side is."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import click
from celery.bin.base import CeleryCommand, handle_preload_options

from .commands import JSON, echo_json, jetstream_of

__all__ = ("status",)


@click.command(cls=CeleryCommand)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0.1),
    default=5.0,
    show_default=True,
    help="Seconds to wait for answers, all together.",
)
@JSON
@click.pass_context
@handle_preload_options
def status(ctx: click.Context, timeout: float, as_json: bool, **_: Any) -> None:
    """Says how the connection, the server, the stream and the consumers are.

    It changes nothing. What the server lacks is named, and what happens instead.

    Exit status: 0 when all is well; 1 when no server answers in --timeout, the stream or a consumer
    is not there or not as it must be, messages are stuck, or a setting asks for what there is not.
    """
    from .exceptions import CeleryJetStreamError

    jetstream = jetstream_of(ctx.obj.app)
    try:
        found = jetstream.status(timeout=timeout)
    except CeleryJetStreamError as error:  # the settings
        if as_json:
            echo_json({"healthy": False, "problems": [str(error)]})
            sys.exit(1)
        raise click.ClickException(str(error)) from error
    finally:
        jetstream.close(timeout=1.0)
    if as_json:
        echo_json(found)
    else:
        for line in _lines(found):
            click.echo(line)
    sys.exit(0 if found["healthy"] else 1)


def _lines(found: dict[str, Any]) -> Iterator[str]:
    connection, server, stream = found["connection"], found["server"], found["stream"]
    if connection["connected"]:
        yield f"connection  {connection['url']}{_text(', answers in {} ms', connection['rtt_ms'])}"
    else:
        yield f"connection  none: {', '.join(connection['urls'])}"
    if server["version"]:
        level = server["api_level"] or "none, so older than 2.11"
        yield f"server      {server['name']}, nats-server {server['version']}, API level {level}"
        for lack in server["lacks"]:
            yield f"            no {lack['feature']} (from {lack['since']} on): {lack['instead']}"
    if stream["exists"]:
        yield (
            f"stream      {stream['name']}: {stream['messages']} messages, "
            f"{stream['bytes']} bytes, {stream['replicas']} replicas"
        )
        yield f"            {', '.join(stream['subjects'])}"
    for consumer in found["consumers"]:
        if consumer["exists"]:
            yield (
                f"consumer    {consumer['name']}: {consumer['pending']} pending, "
                f"{consumer['ack_pending']} delivered and not settled, "
                f"{consumer['redelivered']} redelivered, {_text('{} stuck', consumer['stuck'])}"
            )
    yield from (f"warning: {warning}" for warning in found["warnings"])
    yield from (f"problem: {problem}" for problem in found["problems"])
    yield "healthy" if found["healthy"] else "not healthy"


def _text(form: str, value: Any) -> str:
    return "" if value is None else form.format(value)
