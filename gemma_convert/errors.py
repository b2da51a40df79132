"""The errors that end in one clear message, and the exit code of each.

Exit codes of the command line: 0 done, 1 a check failed, 2 usage, 3 bad source, 4 target problem,
70 a fault of our own, 74 the output cannot be printed, 130 interrupted.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Mapping, Sequence

from gemma_convert.output import printable, shown

INTERNAL, INTERRUPTED = 70, 130
MOST_CHARACTERS = 4000
"""Of each part of a message; a name in a broken file may be as long as the file."""


_RENAMED = {"format": "layout"}
"""An option → the parameter of the Python API, where more than the spelling differs."""

_OPTION = re.compile(
    r"--(no-)?([a-z]+(?:-[a-z]+)*)(?: ([A-Z]+\b|(?:(?<=-damage )|(?<=-fact ))[^\s,;]+))?"
)


class GemmaConvertError(Exception):
    """An error with a message for the user: what, where, expected, found, and what to do.

    `do` may be several ways out, of which those with an option that the asked function does not
    have (`takes`, its parameters) are left out.
    """

    exit_code = INTERNAL
    takes: Mapping[str, object] | None = None
    """The parameters of the function that was asked, with their defaults."""

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        expected: object = None,
        found: object = None,
        do: str | Sequence[str] | None = None,
    ) -> None:
        self.what = printable(shown(what))
        self.where = None if where is None else _plain(shown(where))
        self.expected = None if expected is None else _plain(shown(expected))
        self.found = None if found is None else _plain(shown(found))
        self.ways = (do,) if isinstance(do, str) else tuple(do or ())
        super().__init__(self.in_shell)

    def __str__(self) -> str:
        return self.message

    @property
    def do(self) -> str | None:
        """What the user may do, options as the shell has them."""
        ways = self.ways if len(self.ways) < 2 else filter(self._can, self.ways)
        return ", or ".join(ways) or None

    @property
    def in_shell(self) -> str:
        """The whole message, one line for each part that is known, with `--text-only`."""
        return self._worded(str)

    @property
    def message(self) -> str:
        """The same, with `text_only=True` where a function of the Python API was asked."""
        return self._worded(self._in_python)

    def _worded(self, words: Callable[[str], str]) -> str:
        parts = (
            ("where", self.where),
            ("expected", self.expected),
            ("found", self.found),
            ("what to do", self.do and words(self.do)),
        )
        told = (f"  {name}: {value}" for name, value in parts if value)
        return "\n".join([words(self.what), *told])

    def _can(self, way: str) -> bool:
        return self.takes is None or all(
            self._parameter(option[2]) is not None for option in _OPTION.finditer(way)
        )

    def _parameter(self, option: str) -> str | None:
        """The parameter that an option gives, if the asked function takes it."""
        name = option.replace("-", "_")
        names = (name, f"{name}s", _RENAMED.get(name))
        return next((one for one in names if one in (self.takes or ())), None)

    def _in_python(self, text: str) -> str:
        def given(option: re.Match[str]) -> str:
            name = self._parameter(option[2])
            if name is None or self.takes is None:
                return option[0]
            default = self.takes[name]
            if isinstance(default, bool):
                return f"{name}={not option[1]}"
            if option[3] is None:
                return f"`{name}`"
            return f"{name}=[{option[3]!r}]" if default == () else f"{name}={option[3]}"

        return _OPTION.sub(given, text)


def some(names: Sequence[str], most: int = 8, between: str = ", ") -> str:
    """The first few of many names, and how many more there are."""
    more = f"{between}and {len(names) - most} more" if len(names) > most else ""
    return between.join(names[:most]) + more


def short(value: object) -> str:
    """A value from a file for a message; one that is nested without end stays short."""
    return (value if isinstance(value, str) else reprlib.repr(value))[:200]


def _plain(text: str) -> str:
    """Text that does nothing to a terminal, and whose other lines cannot be taken for ours."""
    text = text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]} …"
    return "\n    ".join(map(printable, text.split("\n")))


class CheckFailedError(GemmaConvertError):
    """A check was completed and did not pass."""

    exit_code = 1


class UsageError(GemmaConvertError):
    """The options contradict each other, or ask for something that the layout does not have."""

    exit_code = 2


class SourceError(GemmaConvertError):
    """The source is missing, broken, or not a Gemma 4 checkpoint that can be converted."""

    exit_code = 3


class TargetError(GemmaConvertError):
    """The target exists, is full, or cannot be written."""

    exit_code = 4


class OutputError(GemmaConvertError):
    """What was printed did not reach the standard output."""

    exit_code = 74


class MappingError(GemmaConvertError):
    """A mapping table contradicts itself: a fault of ours, not of the user's checkpoint."""


def exit_code(error: BaseException) -> int:
    """The exit code of a command that ends by `error`."""
    if isinstance(error, GemmaConvertError):
        return error.exit_code
    codes = {
        KeyboardInterrupt: INTERRUPTED,
        ImportError: UsageError.exit_code,
        OSError: SourceError.exit_code,
    }
    return next((code for kind, code in codes.items() if isinstance(error, kind)), INTERNAL)
