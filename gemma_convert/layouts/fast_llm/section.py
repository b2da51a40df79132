"""metadata.yaml read key by key: nothing that is missing or not known is let pass."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NoReturn, Self

from gemma_convert.errors import SourceError

_MAX_INTEGER = 2**31 - 1
_REPR = reprlib.Repr()
_REPR.maxlevel = 2
_MISSING = object()


class Section:
    """One mapping of the metadata, read key by key; on leaving, keys never asked for are errors."""

    def __init__(self, values: Any, file: Path, path: str, others: bool = False) -> None:
        self._file = file
        self._path = path
        self._others = others or not path
        if not isinstance(values, Mapping):
            self.refuse(None, "a mapping", values)
        self._left = dict(values)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None and self._left and not self._others:
            raise SourceError(
                "The metadata holds keys that the forward pass does not know.",
                where=self._at(None),
                found=", ".join(_shown(key) for key in list(self._left)[:8]),
                do="this is not Gemma 4 as Fast-LLM 0.4.0 writes it; convert it again",
            )

    def take(self, key: str, default: Any = _MISSING) -> Any:
        """The value of `key`, which may be missing only where there is a default."""
        value = self._left.pop(key, default)
        if value is _MISSING:
            inside = self._path.startswith("config.base_model")
            silence = "; Fast-LLM would take another default in silence" if inside else ""
            raise SourceError(
                f"The metadata lacks `{self._name(key)}`{silence}.",
                where=self._file,
                do="convert it again",
            )
        return value

    def section(self, key: str, others: bool = False, default: Any = _MISSING) -> Section:
        """The mapping below `key`; with `others` its unknown keys are let pass."""
        return Section(self.take(key, default), self._file, self._name(key), others)

    def must_be(self, key: str, wanted: str | bool | float, default: Any = _MISSING) -> None:
        """Refuses another value, or one of another type."""
        value = self.take(key, default)
        if isinstance(value, bool) != isinstance(wanted, bool) or value != wanted:
            self.refuse(key, wanted, value)

    def text(self, key: str) -> str:
        """Text that is not empty."""
        value = self.take(key)
        if not isinstance(value, str) or not value:
            self.refuse(key, "text", value)
        return value

    def flag(self, key: str, default: Any = _MISSING) -> bool:
        """True or false."""
        value = self.take(key, default)
        if not isinstance(value, bool):
            self.refuse(key, "true or false", value)
        return value

    def integer(self, key: str) -> int:
        """A whole number above zero and below 2³¹."""
        value = self.take(key)
        if not isinstance(value, int) or isinstance(value, bool):
            self.refuse(key, "a whole number", value)
        if not 0 < value <= _MAX_INTEGER:
            self.refuse(key, f"a whole number from 1 to {_MAX_INTEGER}", value)
        return value

    def number(self, key: str) -> float:
        """A finite number above zero."""
        value = self.take(key)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            try:
                number = float(value)
            except OverflowError:
                number = math.inf
            if 0 < number < math.inf:
                return number
        self.refuse(key, "a finite number above zero", value)

    def is_none(self, key: str, default: Any = _MISSING) -> bool:
        """Whether `key` holds null, which is then taken; another value stays to be read."""
        value = self.take(key, default)
        if value is not None:
            self._left[key] = value
        return value is None

    def norm(self, key: str, kind: Literal["rms_norm", "fixed_rms_norm"] = "rms_norm") -> float:
        """Epsilon of the norm below `key`, which is of this kind; `fixed` ones have no weight."""
        with self.section(key) as norm:
            norm.must_be("type", kind)
            if kind == "rms_norm":
                norm.must_be("zero_centered", False, default=False)
            epsilon = norm.number("epsilon")
        return epsilon

    def refuse(self, key: str | None, expected: object, found: Any) -> NoReturn:
        """Raises SourceError about the value of `key`, or about the mapping itself."""
        raise SourceError(
            "The metadata is not that of a Gemma 4 that can be run.",
            where=self._at(key),
            expected=expected,
            found=_shown(found),
            do="convert it again",
        )

    def _name(self, key: str) -> str:
        return f"{self._path}.{key}" if self._path else key

    def _at(self, key: str | None) -> str:
        name = self._path if key is None else self._name(key)
        return f"{self._file}, {name}" if name else str(self._file)


def _shown(value: Any) -> str:
    """A short repr; whole numbers of thousands of digits have none."""
    try:
        return _REPR.repr(value)
    except ValueError:
        return f"a value of type {type(value).__name__} that is too long to show"
