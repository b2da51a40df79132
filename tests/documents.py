"""The pages of the documentation as data: blocks, and the commands that stand in them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))

SHELLS = ("sh", "bash", "console")

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_COMMENT = re.compile(r"<!-- (?:(before|not run): (.*?)|(output)) -->\n\s*\Z")
_EXIT = re.compile(r"\s+# exit code (\d+)$")
_INLINE = re.compile(r"`([^`\n]+)`")


@dataclass(frozen=True)
class Command:
    """One line of a shell block: its words, and the exit code that it says it has."""

    words: tuple[str, ...]
    code: int
    text: str


@dataclass(frozen=True)
class Block:
    """A fenced block; `before` are hidden lines that prepare it, `excuse` why it is not run.

    `output` says that it is what the shell block before it prints.
    """

    page: Path
    line: int
    language: str
    text: str
    before: tuple[str, ...]
    excuse: str | None
    output: bool

    @property
    def where(self) -> str:
        return f"{self.page.name}, line {self.line}"

    @property
    def commands(self) -> list[Command]:
        """The lines of a shell block, those that go on with a backslash joined."""
        joined = self.text.replace("\\\n", " ")
        return [command(line) for line in joined.splitlines() if line.split("#")[0].strip()]


def command(line: str) -> Command:
    """One line of a shell block; what follows a `#` is no word."""
    code = _EXIT.search(line)
    return Command(tuple(shlex.split(line, comments=True)), int(code[1]) if code else 0, line)


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order, each with the comments that stand right above it."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        head, comments = text[: match.start()], []
        while said := _COMMENT.search(head):
            comments.append((said[1] or said[3], said[2]))
            head = head[: said.start()]
        found.append(
            Block(
                page=page,
                line=text.count("\n", 0, match.start()) + 1,
                language=match[1],
                text=match[2],
                before=tuple(rest for kind, rest in reversed(comments) if kind == "before"),
                excuse=next((rest for kind, rest in comments if kind == "not run"), None),
                output=any(kind == "output" for kind, _ in comments),
            )
        )
    return found


def prose(page: Path) -> str:
    """The text of a page without its fenced blocks."""
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def code_spans(page: Path) -> list[str]:
    """What stands between single backticks."""
    return _INLINE.findall(prose(page))


def excuses(page: Path) -> list[str]:
    """Every comment of a page that says `not run`, whether a block follows it or not."""
    return re.findall(r"<!-- not run: (.*?) -->", page.read_text(encoding="utf-8"))
