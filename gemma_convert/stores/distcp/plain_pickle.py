"""Reads a pickle as plain data: nothing in it is imported, called or made.

Opcodes: `pickletools` of Python. A name such as `torch.Size` becomes a `Named`, and what a pickle
would make by it becomes a `Made` with its arguments and its state; only names that the caller lists
may stand there. All else is refused.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_convert.errors import SourceError, short

MOST_STEPS = 16_000_000
"""Each may make a value of some hundred bytes. One chunk of a tensor takes about 70."""


@dataclass(frozen=True)
class Named:
    """A module's name and a name in it, as text."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False)
class Made:
    """What a pickle would make by calling `kind` with `arguments`, and then give `state`."""

    kind: Named
    arguments: tuple[Any, ...]
    state: Any = None

    def __repr__(self) -> str:
        return f"a {self.kind}"


@dataclass(eq=False)
class Persistent:
    """What lies outside of the pickle, under this key."""

    key: Any

    def __repr__(self) -> str:
        return "what lies outside of the pickle"


class _Mark:
    """Where the items of a collection begin on the stack."""


def read_plain(data: bytes, allowed: Collection[str], where: Path | str) -> Any:
    """The value of a pickle, of plain data, `Named`, `Made` and `Persistent` alone.

    `allowed` are the names, `module.name`, that may stand in it. Raises SourceError, which names
    `where`, for any other name, for opcodes that plain data do not need, and for broken pickles.
    """
    machine = _Machine(frozenset(allowed))
    try:
        for step, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if step == MOST_STEPS:
                raise _RefusedError(f"more than {MOST_STEPS} opcodes")
            machine.run(opcode.name, argument)
        return machine.result()
    except _RefusedError as error:
        raise SourceError(
            "A pickle holds more than the data of a checkpoint; it is never unpickled.",
            where=where,
            found=short(str(error)),
            do="save the checkpoint again, or export it to safetensors",
        ) from None
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, AssertionError) as error:
        raise SourceError(
            "A pickle of the checkpoint is broken.", where=where, found=short(str(error))
        ) from None


class _RefusedError(Exception):
    """Something that plain data do not need."""


class _Machine:
    """The stack and the memo of a pickle machine that knows data and nothing else."""

    def __init__(self, allowed: frozenset[str]) -> None:
        self._allowed = allowed
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self, opcode: str, argument: Any) -> None:
        """One step."""
        if opcode in _IGNORED:
            return
        if opcode in _PUSHED:
            self._stack.append(argument)
        elif opcode in _FIXED:
            self._stack.append(_FIXED[opcode]())
        elif opcode in _STEPS:
            _STEPS[opcode](self, argument)
        else:
            raise _RefusedError(f"the opcode {opcode}")

    def result(self) -> Any:
        """What is left when the pickle has ended."""
        (value,) = self._stack
        if isinstance(value, _Mark):
            raise ValueError("a mark is left")
        return value

    def mark(self, _: Any) -> None:
        self._stack.append(_Mark())

    def get(self, key: int) -> None:
        self._stack.append(self._memo[key])

    def put(self, key: int) -> None:
        self._memo[key] = self._top()

    def memoize(self, _: Any) -> None:
        self._memo[len(self._memo)] = self._top()

    def name(self, text: str) -> None:
        module, _, name = text.partition(" ")
        self._name(module, name)

    def stack_name(self, _: Any) -> None:
        module, name = self._last(2)
        self._name(module, name)

    def make(self, _: Any) -> None:
        kind, arguments = self._last(2)
        if not isinstance(kind, Named) or not isinstance(arguments, tuple):
            raise ValueError("something is made by no name")
        self._stack.append(Made(kind, arguments))

    def build(self, _: Any) -> None:
        (state,) = self._last(1)
        made = self._top()
        if not isinstance(made, Made) or made.state is not None:
            raise ValueError("a state is given to what has none")
        made.state = state

    def persistent(self, _: Any) -> None:
        (key,) = self._last(1)
        self._stack.append(Persistent(key))

    def tuple_of(self, count: int) -> None:
        self._stack.append(tuple(self._last(count)))

    def tuple_from_mark(self, _: Any) -> None:
        self._stack.append(tuple(self._since_mark()))

    def append(self, _: Any) -> None:
        (value,) = self._last(1)
        self._list().append(value)

    def appends(self, _: Any) -> None:
        values = self._since_mark()
        self._list().extend(values)

    def set_item(self, _: Any) -> None:
        self._set(self._last(2))

    def set_items(self, _: Any) -> None:
        self._set(self._since_mark())

    def _name(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("a name is no text")
        if f"{module}.{name}" not in self._allowed:
            raise _RefusedError(f"the name {module}.{name}")
        self._stack.append(Named(module, name))

    def _top(self) -> Any:
        return self._stack[-1]

    def _last(self, count: int) -> list[Any]:
        if len(self._stack) < count:
            raise ValueError("the stack is empty")
        values = self._stack[len(self._stack) - count :]
        del self._stack[len(self._stack) - count :]
        if any(isinstance(value, _Mark) for value in values):
            raise ValueError("a mark stands in the place of a value")
        return values

    def _since_mark(self) -> list[Any]:
        values: list[Any] = []
        while not isinstance(value := self._stack.pop(), _Mark):
            values.append(value)
        return values[::-1]

    def _list(self) -> list[Any]:
        found = self._top()
        if not isinstance(found, list):
            raise ValueError("values are added to no list")
        return found

    def _set(self, pairs: list[Any]) -> None:
        """Keys are texts, numbers and what was made: a nested tuple could be hashed without end."""
        found = self._top()
        if not isinstance(found, dict) or len(pairs) % 2:
            raise ValueError("entries are set in no dict")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if not isinstance(key, str | int | Made):
                raise ValueError("a key is neither text nor number")
            if key in found:
                raise ValueError("a key stands twice")
            found[key] = value


_IGNORED = frozenset(("PROTO", "FRAME", "STOP"))
_PUSHED = frozenset(("SHORT_BINUNICODE", "BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1"))
_FIXED: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
}
_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    "MARK": _Machine.mark,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "MEMOIZE": _Machine.memoize,
    "GLOBAL": _Machine.name,
    "STACK_GLOBAL": _Machine.stack_name,
    "REDUCE": _Machine.make,
    "NEWOBJ": _Machine.make,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.persistent,
    "TUPLE": _Machine.tuple_from_mark,
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
}
