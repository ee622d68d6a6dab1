"""Writes docs/reference/cli.md from the commands themselves: ``python docs/cli.py``.

A test says when that page is not what this writes.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import click
from celery.bin.base import CeleryDaemonCommand
from celery.bin.worker import worker as celery_worker

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from celery_jetstream.cli import jetstream  # noqa: E402

PAGE = ROOT / "docs/reference/cli.md"
HEAD = """\
# Commands

<!-- Written by `python docs/cli.py` from the commands themselves; do not edit. -->

`celery -A app jetstream …`, where `app` is the module (or `module:attribute`) of your Celery app.
Each command has `--help`, and its text says what its exit status means. Celery's own options
(`-A`, `--workdir` …) stand before `jetstream`. Durations are `30s`, `5m`, `1h`, `2d`, or seconds.

"""
#: Options that Celery gives to each daemon.
DAEMON = {option.name for option in CeleryDaemonCommand("any").params}


def page() -> str:
    found = list(_commands(jetstream, "jetstream"))
    index = "".join(
        f"| [`{path}`](#{path.replace(' ', '-')}) | {_summary(command)} |\n"
        for path, command in found
    )
    return f"{HEAD}| | |\n|---|---|\n{index}\n" + "\n".join(_section(*each) for each in found)


def _commands(group: click.Group, path: str) -> Iterator[tuple[str, click.Command]]:
    for name in sorted(group.commands):
        command = group.commands[name]
        if isinstance(command, click.Group):
            yield from _commands(command, f"{path} {name}")
        elif not command.hidden:
            yield f"{path} {name}", command


def _section(path: str, command: click.Command) -> str:
    usage = " ".join(
        [path, *(_argument(p) for p in command.params if isinstance(p, click.Argument))]
    )
    lines = [f"## {path}", "", f"```\ncelery -A app {usage} [OPTIONS]\n```", "", _text(command), ""]
    return "\n".join(lines + list(_options(command)))


def _argument(argument: click.Argument) -> str:
    name = argument.metavar or str(argument.name).upper()
    name = name if argument.required else f"[{name}]"
    return name if argument.nargs == 1 else f"{name}..."


def _options(command: click.Command) -> Iterator[str]:
    celerys = {param.name for param in celery_worker.params} if command.name == "worker" else DAEMON
    options = [param for param in command.params if isinstance(param, click.Option)]
    own = [option for option in options if option.name not in celerys and not option.hidden]
    if own:
        yield from ("| Option | |", "|---|---|")
        yield from (f"| {_names(option)} | {_meaning(option)} |" for option in own)
        yield ""
    if command.name == "worker":
        yield "And every option of `celery worker`.\n"
    elif isinstance(command, CeleryDaemonCommand):
        names = ", ".join(f"`{option.opts[-1]}`" for option in options if option.name in DAEMON)
        yield f"And Celery's for daemons: {names}.\n"


def _names(option: click.Option) -> str:
    names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
    if option.is_flag or option.count:
        return names
    if isinstance(option.type, click.Choice):
        values = "\\|".join(str(choice) for choice in option.type.choices)
    else:
        kind = option.type.name
        values = option.metavar or ("N" if kind.startswith(("int", "float")) else kind.upper())
    return f"{names} `{values}`"


def _meaning(option: click.Option) -> str:
    words = [*(option.help or "").replace("|", "\\|").split(), *(["Required."] * option.required)]
    if option.show_default and option.default not in (None, False):
        words += ["Default", f"`{option.default}`."]
    return " ".join(words)


def _text(command: click.Command) -> str:
    text = re.sub(r"(?<![`\w])(--?[A-Za-z][\w-]*)", r"`\1`", inspect.cleandoc(command.help or ""))
    return text.replace("*", r"\*")


def _summary(command: click.Command) -> str:
    first = re.split(r"[.:;](?: |$)|\n\n", " ".join(_text(command).split()))[0]
    return f"{first}."


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
