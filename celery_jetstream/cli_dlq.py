"""``celery -A app jetstream dlq …``: the commands over the dead letters."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Sequence
from typing import IO, Any

import click
from celery.bin.base import CeleryCommand, handle_preload_options

from .commands import (
    AS_OPERATOR,
    DRY_RUN,
    JSON,
    Stopping,
    age_text,
    cut,
    dead_letters_of,
    duration,
    echo_json,
    plain,
    progress_of,
    stop_on_signals,
)

__all__ = ("dlq",)

OF = click.option("--of", "app_name", help="Another app's, by its name; default: this app's.")
EVERY = click.option(
    "--all", "everything", is_flag=True, help="Every dead letter; else give ids or a filter."
)
LIMIT = click.option("--limit", type=click.IntRange(min=1), help="How many at the most.")
LOGFILE = click.option("--logfile", help="Where to log what is done, and by whom.")
_FILTERS = (
    click.option("--reason", help="Why: unrecoverable_error, max_deliveries_exceeded, …"),
    click.option("--type", "event_type", help="An event type, or a pattern: user.*, order.>"),
    click.option("--source", help="The app that published the event."),
    click.option("--handler", help="The task that failed."),
    click.option("--error", help="A part of the error's class and text, in any case."),
    click.option("--id", "ids", multiple=True, help="Its event_id, or its number; repeatable."),
    click.option("--older-than", type=duration, help="Given up so long ago or longer: 5m, 2d."),
    click.option("--newer-than", type=duration, help="Given up so long ago or later."),
    OF,
)


def rate(value: Any) -> float:
    """The type of an option: 200, 200/s, 50/m."""
    from celery.utils.time import rate as per_second

    try:
        found = float(per_second(value))
    except (ValueError, KeyError, TypeError):
        found = 0.0
    if found <= 0:
        raise click.BadParameter(f"{value!r} must be a rate: 200/s, 50/m, or a number a second")
    return found


def _filtered(command: Any) -> Any:
    for option in reversed(_FILTERS):
        command = option(command)
    return command


def _chosen(options: dict[str, Any]) -> Any:
    from .deadletter_filter import DeadLetterFilter
    from .exceptions import SubjectError

    given = {name: options[name] for name in DeadLetterFilter.__dataclass_fields__}
    try:
        return DeadLetterFilter(**{**given, "ids": (*given["ids"], *options.get("named", ()))})
    except SubjectError as error:
        raise click.BadParameter(str(error), param_hint="--type") from None


def _whose(letters: Any, app_name: str | None) -> Any:
    return letters if app_name is None else letters.of(app_name)


@click.group(name="dlq")
def dlq() -> None:
    """The dead letters: messages that were given up, and why."""


# -- looking -----------------------------------------------------------------------------------


@dlq.command("list", cls=CeleryCommand)
@click.option(
    "--limit", type=click.IntRange(min=1), default=50, show_default=True, help="At the most."
)
@click.option("--after", type=int, default=0, help="Go on after the one with this number.")
@JSON
@_filtered
@click.pass_context
@handle_preload_options
def list_(ctx: click.Context, limit: int, after: int, as_json: bool, **options: Any) -> None:
    """Lists dead letters, those first that were given up first.

    Takes them from nobody. Exit status: 0; 1 where NATS is away, or a permission is missing.
    """
    chosen = _chosen(options)
    with dead_letters_of(ctx, as_json) as letters:
        found = _whose(letters, options["app_name"]).list(chosen, limit, after)
    if as_json:
        echo_json([letter.as_dict() for letter in found])
        return
    _echo_table(found)
    if len(found) == limit:
        click.echo(f"there may be more: --after {found[-1].sequence}", err=True)


@dlq.command(cls=CeleryCommand)
@click.argument("id")
@JSON
@OF
@click.pass_context
@handle_preload_options
def show(ctx: click.Context, id: str, as_json: bool, app_name: str | None, **_: Any) -> None:  # noqa: A002
    """Shows a dead letter with its error and its event, by its event_id or its number.

    Of its headers only the names, as they may be secret. Exit status: 1 when there is none.
    """
    with dead_letters_of(ctx, as_json) as letters:
        letter = _whose(letters, app_name).get(id)
    if letter is None:
        if as_json:
            echo_json({"error": f"there is no dead letter {id}"})
            sys.exit(1)
        raise click.ClickException(f"there is no dead letter {id}")
    values = {**letter.as_dict(), "headers": sorted(letter.headers), "body": _shown(letter.body)}
    if as_json:
        echo_json(values)
        return
    body, error = values.pop("body"), values.pop("error_message")
    for name, value in values.items():
        text = ", ".join(value) if isinstance(value, list) else value
        click.echo(plain(f"{name:18} {'-' if text in (None, '') else text}"))
    click.echo(plain(f"\nerror_message\n{error or '-'}"))
    click.echo(plain(f"\nbody\n{json.dumps(body, indent=2, ensure_ascii=False)}"))


@dlq.command(cls=CeleryCommand)
@JSON
@_filtered
@click.pass_context
@handle_preload_options
def count(ctx: click.Context, as_json: bool, **options: Any) -> None:
    """Counts dead letters, by reason, type, handler, source and error.

    Exit status: 0; 1 where NATS is away, or a permission is missing.
    """
    chosen = _chosen(options)
    with dead_letters_of(ctx, as_json) as letters:
        counts = _whose(letters, options["app_name"]).count(chosen)
    if as_json:
        echo_json(counts.as_dict())
        return
    ages = f", {age_text(counts.oldest)} to {age_text(counts.newest)} old" if counts.total else ""
    click.echo(f"{counts.total} dead letters{ages}")
    for name in ("reason", "event_type", "handler", "source", "error"):
        if found := getattr(counts, f"by_{name}"):
            click.echo(name)
            for word, number in found.items():
                click.echo(f"{number:8}  {plain(word) or '-'}")


@dlq.command(cls=CeleryCommand)
@click.option("--output", help="A file that is not there yet, for you alone; default: stdout.")
@click.option("--after", type=int, default=0, help="Go on after the one with this number.")
@click.option("--all", "everything", is_flag=True, help="Every dead letter, as without a filter.")
@_filtered
@click.pass_context
@handle_preload_options
def export(ctx: click.Context, output: str | None, after: int, **options: Any) -> None:
    """Writes dead letters as lines of JSON, with all headers and bodies; deletes none.

    Exit status: 0 when all are written; 1 when NATS went away, or the file is there already.
    """
    chosen = _chosen(options)
    if options["everything"] and not chosen.is_empty:
        raise click.UsageError("give a filter, or --all for every dead letter", ctx)
    with dead_letters_of(ctx) as letters:
        whose = _whose(letters, options["app_name"])
        if output is None:
            whose.export(sys.stdout, chosen, after=after)
            return
        with _new_file(output) as file, progress_of("export") as progress:
            done = whose.export(file, chosen, after=after, progress=progress)
    click.echo(f"{done} dead letters written to {output}")


def _new_file(path: str) -> IO[str]:
    try:
        return open(
            os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8"
        )
    except OSError as error:
        raise click.ClickException(f"cannot write {path}: {error.strerror}") from None


# -- changing ----------------------------------------------------------------------------------


@dlq.command(cls=CeleryCommand)
@click.argument("named", metavar="[IDS]...", nargs=-1)
@EVERY
@click.option("--rate", type=rate, help="At the most: 200/s, 50/m.")
@LIMIT
@click.option("--force", is_flag=True, help="Also beyond the cap, and what is processed already.")
@click.option("--max-redrives", type=click.IntRange(min=0), help="Default: the setting.")
@click.option("--subject", help="Where to; default: where it came from.")
@click.option("--edit", is_flag=True, help="Edit the event of one id in $EDITOR first.")
@click.option("--payload", type=click.File("rb"), help="A JSON file: another payload, for one id.")
@click.option("--envelope", type=click.File("rb"), help="The same, of all of the event.")
@click.option("--by", default="", help="Who; default: user and host.")
@LOGFILE
@DRY_RUN
@JSON
@_filtered
@click.pass_context
@handle_preload_options
def redrive(ctx: click.Context, **options: Any) -> None:
    """Sends dead letters again to where they came from, then deletes them here.

    IDS are event_ids or numbers. Killed or stopped, it is safe to repeat: the stream drops what it
    got before. A handler with an inbox passes over what it has processed, unless --force is given.

    Exit status: 0 when all are sent; 1 when some are skipped, or it ended early.
    """
    dry_run, as_json = options["dry_run"], options["as_json"]
    chosen = _needed(ctx, options)
    how = {name: options[name] for name in ("force", "dry_run", "subject", "by")}
    stopping = Stopping()
    _log_to(ctx, options["logfile"])
    with dead_letters_of(ctx, as_json) as every:
        letters = _whose(every, options["app_name"])
        if options["edit"] or options["payload"] or options["envelope"]:
            result = letters.redrive_edited(_edited(ctx, letters, chosen, options), **how)
        else:
            more = {name: options[name] for name in ("rate", "limit", "max_redrives")}
            with progress_of("redrive") as progress:
                stop_on_signals(stopping)
                result = letters.redrive(chosen, **how, **more, stop=stopping, progress=progress)
    if as_json:
        echo_json({"dry_run": dry_run, **result.as_dict()})
    else:
        _echo_redriven(result, dry_run)
    sys.exit(1 if result.error or result.skipped else 0)


@dlq.command(cls=CeleryCommand)
@click.argument("named", metavar="[IDS]...", nargs=-1)
@EVERY
@LIMIT
@click.option("--yes", is_flag=True, help="Do not ask.")
@LOGFILE
@DRY_RUN
@JSON
@_filtered
@click.pass_context
@handle_preload_options
def purge(ctx: click.Context, yes: bool, limit: int | None, **options: Any) -> None:
    """Deletes dead letters for ever; their events are not handled. `export` keeps them.

    IDS are event_ids or numbers. Asks first, unless --yes is given.

    Exit status: 0 when all are deleted; 1 when it ended early, or the answer is no.
    """
    dry_run, as_json = options["dry_run"], options["as_json"]
    chosen = _needed(ctx, options)
    stopping = Stopping()
    _log_to(ctx, options["logfile"])
    with dead_letters_of(ctx, as_json) as every:
        letters = _whose(every, options["app_name"])
        if not (yes or dry_run):
            found = letters.purge(chosen, limit=limit, dry_run=True)
            click.confirm(f"delete {found.purged} dead letters for ever?", abort=True, err=True)
        with progress_of("purge") as progress:
            stop_on_signals(stopping)
            result = letters.purge(
                chosen, limit=limit, dry_run=dry_run, stop=stopping, progress=progress
            )
    if as_json:
        echo_json({"dry_run": dry_run, **result.as_dict()})
    else:
        click.echo(f"{result.purged} dead letters{' would be' if dry_run else ''} deleted")
        _echo_ended(result)
    sys.exit(1 if result.error else 0)


def _needed(ctx: click.Context, options: dict[str, Any]) -> Any:
    """The filter of a command that changes something: given, or all of them asked for."""
    chosen = _chosen(options)
    if chosen.is_empty != options["everything"]:
        raise click.UsageError("give ids or a filter, or --all for every dead letter", ctx)
    return chosen


def _log_to(ctx: click.Context, logfile: str | None) -> None:
    if logfile:
        ctx.obj.app.log.setup(loglevel="INFO", logfile=logfile, redirect_stdouts=False)


# -- another event -----------------------------------------------------------------------------


def _edited(ctx: click.Context, letters: Any, chosen: Any, options: dict[str, Any]) -> Any:
    """The one dead letter with what is in the file, or comes out of the editor."""
    if len(chosen.ids) != 1:
        raise click.UsageError("--edit, --payload and --envelope are for one id", ctx)
    if sum(bool(options[name]) for name in ("edit", "payload", "envelope")) > 1:
        raise click.UsageError("give one of --edit, --payload and --envelope", ctx)
    ctx.obj.app.loader.import_default_modules()  # its handlers say whether they can read it
    (one,) = chosen.ids
    if options["edit"]:
        return _from_editor(letters, one)
    if options["envelope"]:
        return letters.edited(one, envelope=options["envelope"].read())
    try:
        payload = json.loads(options["payload"].read())
    except ValueError as error:
        raise click.ClickException(f"--payload is not JSON: {error}") from None
    return letters.edited(one, payload=payload)


def _from_editor(letters: Any, one: str) -> Any:
    from .exceptions import EventError

    letter = letters.get(one)
    if letter is None:
        raise click.ClickException(f"there is no dead letter {one}")
    before = text = _editable(letter.body)
    while True:
        found = click.edit(text, extension=".json")
        if found is None or found == before:
            raise click.ClickException("nothing was changed: nothing is sent")
        text = found
        try:
            return letters.edited(letter.sequence, envelope=text.encode())
        except EventError as error:
            click.echo(f"not sent: {error}", err=True)
            click.confirm("edit again?", default=True, abort=True, err=True)


def _editable(body: bytes) -> str:
    try:
        return json.dumps(json.loads(body), indent=2, ensure_ascii=False) + "\n"
    except ValueError:
        return body.decode(errors="replace")


# -- output ------------------------------------------------------------------------------------


def _echo_redriven(result: Any, dry_run: bool) -> None:
    click.echo(f"{result.redriven} events{' would be' if dry_run else ''} sent again")
    if result.duplicates:
        click.echo(f"{result.duplicates} of them an earlier redrive had sent already")
    if result.skipped:
        click.echo(f"{result.skipped} dead letters skipped, and kept:")
    for problem in result.problems:
        click.echo(f"  {plain(problem)}")
    _echo_ended(result)


def _echo_ended(result: Any) -> None:
    if result.denied:
        click.echo(f"ended early: {result.error}{AS_OPERATOR}")
    elif result.error:
        click.echo(f"ended early ({result.error}); give the command again to go on")


def _echo_table(letters: Sequence[Any]) -> None:
    """At most 100 columns; on a wider terminal, more of the error."""
    if not letters:
        click.echo("no dead letters")
        return
    click.echo(f"{'number':>8} {'age':>5} {'type':18} {'handler':18} {'reason':19} error")
    wide = shutil.get_terminal_size((100, 24)).columns if sys.stdout.isatty() else 100
    room = max(wide, 100) - 73
    for letter in letters:
        error = ": ".join(filter(None, (letter.error_class, letter.error_message)))
        error = " ".join((error or ", ".join(letter.problems)).split())
        click.echo(
            f"{letter.sequence:8} {age_text(letter.age):>5} {cut(letter.event_type or '-', 18)} "
            f"{cut(letter.handler or '-', 18)} {cut(letter.reason or '-', 19)} "
            f"{cut(error, room).rstrip()}"
        )


def _shown(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return body.decode(errors="replace")
