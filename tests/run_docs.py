"""Runs the Python of Markdown pages: ``python -m tests.run_docs FOLDER PAGE…``, for tests.

A page's blocks run in order and in one namespace, in a process and with a nats-server of their own,
and with SQLite in place of the databases that they name. Then the settings and the handlers that
the page has made are checked, as a worker does when it starts. Prints, for each page, what was
wrong, as JSON: null where nothing was.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import re
import signal
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

import sqlalchemy.ext.asyncio  # noqa: F401 - once, before the forks

import celery_jetstream.models  # noqa: F401
from celery_jetstream.config import Config
from celery_jetstream.handlers import Handlers
from celery_jetstream.testing import NatsServer
from tests.markdown import ROOT, Block, blocks

#: Seconds that a page may take.
LIMIT = 20
HERE = "sqlite:///docs.sqlite3"
INSTEAD = (
    (re.compile(r"postgresql\+asyncpg://localhost/\w+"), "sqlite+aiosqlite:///docs.sqlite3"),
    (re.compile(r"postgresql(\+psycopg)?://localhost/\w+"), HERE),
    (re.compile(r"redis://localhost:6379/0"), "memory://"),
)
#: What a page may take for granted: a project with an app, a database and a table in it.
PRELUDE = """
from dataclasses import dataclass
from datetime import date
from celery import Celery
from sqlalchemy import create_engine, event, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, sessionmaker
from celery_jetstream import *

class Base(DeclarativeBase): ...

class Order(Base):
    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)
    total: Mapped[int] = mapped_column(default=0)

app = Celery("shop", broker="memory://")
app.conf.update(
    jetstream_app_name="shop", jetstream_destination_app="billing", jetstream_database_url=HERE
)
jetstream = JetStream(app)
engine = create_engine(HERE)
Base.metadata.create_all(engine)
jetstream.outbox.create_tables()
jetstream.inbox.create_tables()
Session = sessionmaker(engine)
order = Order(id=6, total=1)
"""
CURE = (
    "Make the block run as it stands, or add what pages may take for granted to PRELUDE in "
    "tests/run_docs.py, or, where it is an excerpt, put `<!-- not run: why -->` on a line before it"
)


def main(folder: Path, *pages: Path) -> dict[str, str | None]:
    return {
        str(page): _in_a_child(folder / str(number), ROOT / page)
        for number, page in enumerate(pages)
    }


def _in_a_child(folder: Path, page: Path) -> str | None:
    folder.mkdir()
    told = folder / "told"
    pid = os.fork()
    if pid == 0:
        signal.alarm(LIMIT)
        os.chdir(folder)
        try:
            with NatsServer() as server:
                os.environ["NATS_URL"] = server.url
                told.write_text(run(page) or "", "utf-8")
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    if status:
        return f"{page} did not end in {LIMIT} s, or ended its process ({status}): see stderr"
    return told.read_text("utf-8") or None


def run(page: Path) -> str | None:
    """Runs a page's blocks; what was wrong, or None."""
    code = [block for block in blocks(page, "python") if not block.excerpt]
    if not code:
        return None
    module = ModuleType(f"page_{page.stem.replace('-', '_')}")
    sys.modules[module.__name__] = module  # where annotations are looked up
    namespace = vars(module)
    namespace["HERE"] = HERE
    exec(compile(PRELUDE, "PRELUDE", "exec", dont_inherit=True), namespace)
    for block in code:
        try:
            _run(block, namespace)
        except BaseException as error:
            lines = "".join(traceback.format_exception(error)[-4:])
            return f"the block at {block.where} does not run:\n{lines}\n{CURE}"
    try:
        _check(namespace["app"])
    except Exception as error:
        return f"{page}: what it has made does not start: {error!r}\n{CURE}"
    return None


def _run(block: Block, namespace: dict[str, Any]) -> None:
    code = block.code
    for pattern, ours in INSTEAD:
        code = pattern.sub(ours, code)
    result = eval(Block(block.page, block.line, block.kind, code).compile(), namespace)
    if inspect.iscoroutine(result):
        asyncio.run(result)


def _check(app: Any) -> None:
    app.finalize()
    Config.from_app(app)
    Handlers(app.tasks.values())


if __name__ == "__main__":
    print(json.dumps(main(*map(Path, sys.argv[1:]))))
