"""What the pages show, run: their Python, and the quickstart as a newcomer types it."""

from __future__ import annotations

import json
import os
import re
import shlex
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from celery_jetstream.testing import NatsServer, wait_until
from tests.markdown import ROOT, blocks
from tests.servers import need
from tests.stack import CeleryProcess

pytestmark = pytest.mark.timeout(120)

QUICKSTART = ROOT / "docs/quickstart.md"
FOUND = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")]
PAGES = [
    str(page.relative_to(ROOT))
    for page in sorted(FOUND)
    if page != QUICKSTART and any(not block.excerpt for block in blocks(page, "python"))
]


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    need("nats")
    others = ("CELERY_", "NATS_", "JETSTREAM_")
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(others)}
    return {**inherited, "PYTHONPATH": str(ROOT)}


# -- the Python of each page -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def faults(
    tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]
) -> dict[str, str | None]:
    """What was wrong with each page: one process runs all of them, and forks for each."""
    folder = tmp_path_factory.mktemp("docs")
    ended = subprocess.run(
        [sys.executable, "-m", "tests.run_docs", str(folder), *PAGES],
        env=environment, cwd=ROOT, capture_output=True, text=True, timeout=110,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found: dict[str, str | None] = json.loads(ended.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("page", PAGES)
def test_the_python_of_a_page_runs(faults: dict[str, str | None], page: str) -> None:
    assert faults[page] is None, faults[page]


# -- the quickstart --------------------------------------------------------------------------------


class Newcomer:
    """Types what the quickstart says, in an empty folder."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        self.environment = environment
        self.text = QUICKSTART.read_text("utf-8")
        self.running: list[CeleryProcess] = []
        files = re.findall(r"^`(\w+\.py)`.*?^```python\n(.*?)^```$", self.text, re.M | re.S)
        self.files = [code for _, code in files]

    def save(self, number: int, name: str) -> None:
        (self.folder / name).write_text(self.files[number])

    def command(self, line: str) -> list[str]:
        """As the page has it, or it is not what a newcomer types."""
        assert re.search(rf"^{re.escape(line)}(\s|$)", self.text, re.MULTILINE), line
        program, *words = shlex.split(line)
        return [sys.executable, *(["-m", "celery"] if program == "celery" else []), *words]

    def run(self, line: str, *more: str) -> str:
        ended = subprocess.run(
            [*self.command(line), *more],
            env=self.environment, cwd=self.folder, capture_output=True, text=True, timeout=30,
        )  # fmt: skip
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout

    def leave_running(self, line: str) -> CeleryProcess:
        log = self.folder / f"{len(self.running)}.log"
        command = [*self.command(line), "-c", "1"]
        command[3:3] = ["--workdir", str(self.folder)]
        self.running.append(CeleryProcess(log, command, self.environment))
        return self.running[-1]


@pytest.fixture
def newcomer(tmp_path: Path, environment: dict[str, str]) -> Iterator[Newcomer]:
    with NatsServer() as server:
        newcomer = Newcomer(tmp_path, {**environment, "NATS_URL": server.url})
        yield newcomer
        for process in newcomer.running:
            process.end()


def test_the_quickstart_does_what_it_says(newcomer: Newcomer) -> None:
    newcomer.save(0, "mailer.py")
    newcomer.save(1, "shop.py")
    worker = newcomer.leave_running("celery -A mailer jetstream worker --without-broker")
    assert newcomer.run("python shop.py") == "stored as number 1\n"
    worker.wait_for("to ann@example.com: thank you for order 7")
    worker.end()

    newcomer.save(2, "shop.py")
    newcomer.run("celery -A shop jetstream outbox init")
    newcomer.run("python shop.py")
    newcomer.run("celery -A shop jetstream outbox relay", "--once")

    newcomer.save(3, "mailer.py")
    newcomer.run("celery -A mailer jetstream inbox init")
    newcomer.leave_running("celery -A mailer jetstream worker --without-broker")

    def thanks() -> list[tuple[str]]:
        try:
            with sqlite3.connect(newcomer.folder / "mailer.sqlite3") as database:
                return database.execute("SELECT * FROM thanks").fetchall()
        except sqlite3.OperationalError:  # no such table yet
            return []

    wait_until(lambda: ("ben@example.com",) in thanks(), 30, "the second handler")
