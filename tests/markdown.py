"""The blocks of code in a Markdown page."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType

ROOT = Path(__file__).parent.parent
#: A fence at the left margin, and what was said of it.
BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<excerpt>.+?) -->\n+)?```(?P<kind>[^\n`]*)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        page: its file.
        line: of its first line of code, in that file.
        kind: what stands behind the fence.
        code: the text.
        excerpt: why it is not run: the comment before it, ``<!-- not run: why -->``.
    """

    page: Path
    line: int
    kind: str
    code: str
    excerpt: str = ""

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}, line {self.line}"

    def compile(self) -> CodeType:
        """Python's code, with ``await`` allowed; errors name the page and its lines."""
        code = "\n" * (self.line - 1) + self.code
        name, awaits = str(self.page.relative_to(ROOT)), ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        return compile(code, name, "exec", flags=awaits, dont_inherit=True)

    def lines(self) -> list[str]:
        """A shell's commands: without prompts, continued lines as one."""
        joined = re.sub(r"\\\n\s*", "", self.code)
        return [line.removeprefix("$ ") for line in joined.splitlines()]


def blocks(page: Path, *kinds: str) -> Iterator[Block]:
    """The page's blocks of these kinds, in order."""
    text = page.read_text("utf-8")
    for found in BLOCK.finditer(text):
        if found["kind"].strip() in kinds:
            line = text.count("\n", 0, found.start("code")) + 1
            yield Block(page, line, found["kind"].strip(), found["code"], found["excerpt"] or "")


def excerpts(page: Path) -> Iterator[Block]:
    """The page's Python that is not run."""
    yield from (block for block in blocks(page, "python") if block.excerpt)
