"""Reads pickles of NumPy arrays without unpickling: AlphaFold 2's ``features.pkl``.

A pickle is a program. This module does not run it with Python's pickle machine: it steps through the opcodes
itself and knows nothing but numbers, strings, plain containers and the few names that NumPy writes around an
array. Those names stand for constants in here; nothing is ever imported, looked up or called, whatever the
file asks for, and arrays are built from checked dtype, shape and bytes, not by NumPy's own unpickling. Any
other opcode or name is refused before anything after it is read.

Owns opcodes. Does not own arrays (`foldfeed.feature_store.parsers.pickled_arrays`) or what they mean. Memory
is bounded by the size of the data and by `MAX_OPERATIONS`: an opcode makes at most one small object, and no
opcode copies contents.

Source: CPython ``Lib/pickletools.py``.
"""

from __future__ import annotations

import pickletools
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from foldfeed.feature_store.exchange_errors import UnsafePickleError
from foldfeed.feature_store.parsers.pickled_arrays import (
    NAMES,
    REDUCERS,
    SCALARS,
    Name,
    PickledArray,
    PickledDType,
    set_array,
    set_dtype,
)

# A feature file of 100,000 rows with species takes 200,000 opcodes; an object takes up to about 250 bytes.
MAX_OPERATIONS = 4_000_000
MAX_NESTING = 16


class _Mark:
    pass


def load_pickled_arrays(data: bytes, where: str) -> dict[str, Any]:
    """Returns the dictionary that a pickle holds, without executing anything in it.

    Args:
      data: the pickle, protocol 0 to 5.
      where: the file, for messages.
    Returns: str keys; values are arrays (read-only views of ``data`` where they can be), numbers, strings,
      bytes or lists, tuples and dictionaries of those.
    Raises:
      UnsafePickleError: it holds anything else, it is damaged, or it is no dictionary.
    """
    machine = _Machine(where)
    try:
        for number, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if number >= MAX_OPERATIONS:
                raise UnsafePickleError(where, f"it has more than {MAX_OPERATIONS} opcodes")
            machine.step(opcode.name, argument)
        result = _resolve(machine.result(), 0, {})
    except UnsafePickleError:
        raise
    except (
        ValueError,
        TypeError,
        IndexError,
        KeyError,
        AttributeError,
        OverflowError,
        struct.error,
        # Python's own for an escape that no pickler writes, where warnings are errors.
        DeprecationWarning,
    ) as error:
        raise UnsafePickleError(where, f"the pickle is damaged or unusual ({_short(error)})") from error
    if not isinstance(result, dict) or not all(isinstance(key, str) for key in result):
        raise UnsafePickleError(where, f"it holds a {type(result).__name__}, not a dictionary of features")
    return result


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:200]


class _Machine:
    """A stack, a memo, and one method per kind of opcode."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._stopped = False

    def step(self, name: str, argument: Any) -> None:
        """Applies one opcode.

        Raises:
          UnsafePickleError: an opcode that no array needs.
        """
        if name in _PUSH:
            self._stack.append(argument)
        elif name in _CONSTANTS:
            self._stack.append(_CONSTANTS[name])
        elif name in _ACTIONS:
            _ACTIONS[name](self, argument)
        elif name not in ("PROTO", "FRAME"):
            raise UnsafePickleError(
                self._where,
                f"opcode {name} makes objects that are no arrays; nothing of the file was executed",
            )

    def result(self) -> Any:
        """Returns what the pickle left on the stack."""
        if not self._stopped or len(self._stack) != 1:
            raise ValueError("it does not end with one object")
        return self._stack[0]

    def stop(self, _: Any) -> None:
        self._stopped = True

    def mark(self, _: Any) -> None:
        self._stack.append(_Mark)

    def pop(self, _: Any) -> None:
        self._stack.pop()

    def duplicate(self, _: Any) -> None:
        self._stack.append(self._stack[-1])

    def pop_mark(self, _: Any = None) -> list[Any]:
        """Removes and returns everything above the last mark, and the mark."""
        at = len(self._stack) - 1
        while self._stack[at] is not _Mark:
            at -= 1
            if at < 0:
                raise ValueError("no mark on the stack")
        items = self._stack[at + 1 :]
        del self._stack[at:]
        return items

    def take(self, count: int) -> tuple[Any, ...]:
        """Removes and returns the last ``count`` objects."""
        if len(self._stack) < count:
            raise ValueError("the stack is empty")
        items = tuple(self._stack[len(self._stack) - count :])
        if _Mark in items:
            raise ValueError("a mark where an object should be")
        del self._stack[len(self._stack) - count :]
        return items

    def put(self, key: Any) -> None:
        self._memo[int(key)] = self._stack[-1]

    def memoize(self, _: Any) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def get(self, key: Any) -> None:
        self._stack.append(self._memo[int(key)])

    def empty_list(self, _: Any) -> None:
        self._stack.append([])

    def empty_dict(self, _: Any) -> None:
        self._stack.append({})

    def make_list(self, _: Any) -> None:
        self._stack.append(self.pop_mark())

    def make_tuple(self, _: Any) -> None:
        self._stack.append(tuple(self.pop_mark()))

    def make_tuple_of(self, count: int) -> None:
        self._stack.append(self.take(count))

    def make_dict(self, _: Any) -> None:
        items = self.pop_mark()
        self._stack.append({})
        self._set_items(items)

    def append(self, _: Any) -> None:
        self._extend(list(self.take(1)))

    def appends(self, _: Any) -> None:
        self._extend(self.pop_mark())

    def set_item(self, _: Any) -> None:
        self._set_items(list(self.take(2)))

    def set_items(self, _: Any) -> None:
        self._set_items(self.pop_mark())

    def global_name(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self._push_name(module, name)

    def stack_global(self, _: Any) -> None:
        module, name = self.take(2)
        self._push_name(module, name)

    def reduce(self, _: Any) -> None:
        name, arguments = self.take(2)
        if not isinstance(name, Name) or not isinstance(arguments, tuple):
            raise UnsafePickleError(self._where, f"it calls a {type(name).__name__}; nothing was called")
        self._stack.append(REDUCERS[name](*arguments))

    def build(self, _: Any) -> None:
        target, state = self.take(2)
        if isinstance(target, PickledDType):
            set_dtype(target, *state)
        elif isinstance(target, PickledArray):
            set_array(target, *state)
        else:
            raise UnsafePickleError(self._where, f"it sets the state of a {type(target).__name__}")
        self._stack.append(target)

    def _push_name(self, module: object, name: object) -> None:
        known = NAMES.get((module, name)) if isinstance(module, str) and isinstance(name, str) else None
        if known is None:
            raise UnsafePickleError(
                self._where,
                f"it asks for {str(module)[:60]}.{str(name)[:60]}, which is no part of an array; nothing of "
                "the file "
                "was executed",
            )
        self._stack.append(known)

    def _extend(self, items: list[Any]) -> None:
        if type(self._stack[-1]) is not list:
            raise ValueError("an item for something that is no list")
        self._stack[-1].extend(items)

    def _set_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        # Only plain keys: hashing a tuple of tuples that share their parts can take for ever.
        if type(target) is not dict or len(items) % 2 or not all(type(key) in SCALARS for key in items[::2]):
            raise ValueError("an item for something that is no dictionary, or a key that is no plain value")
        target.update(zip(items[::2], items[1::2], strict=True))


def _resolve(value: Any, depth: int, known: dict[int, Any]) -> Any:
    """Returns a value with its finished arrays in place; each shared container is visited once."""
    if isinstance(value, PickledArray):
        if value.value is None:
            raise ValueError("an array without content")
        return value.value
    if isinstance(value, (*SCALARS, np.generic)):
        return value
    if depth > MAX_NESTING or not isinstance(value, list | tuple | dict):
        raise ValueError(f"a {type(value).__name__}, or containers nested deeper than {MAX_NESTING}")
    if id(value) not in known:
        if isinstance(value, dict):
            known[id(value)] = {key: _resolve(item, depth + 1, known) for key, item in value.items()}
        else:
            known[id(value)] = type(value)(_resolve(item, depth + 1, known) for item in value)
    return known[id(value)]


_PUSH = frozenset(
    [
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *(
            "STRING",
            "BINSTRING",
            "SHORT_BINSTRING",
            "UNICODE",
            "BINUNICODE",
            "SHORT_BINUNICODE",
            "BINUNICODE8",
        ),
        *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    ]
)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_ACTIONS: dict[str, Callable[[_Machine, Any], Any]] = {
    "STOP": _Machine.stop,
    "MARK": _Machine.mark,
    "POP": _Machine.pop,
    "POP_MARK": _Machine.pop_mark,
    "DUP": _Machine.duplicate,
    "PUT": _Machine.put,
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "MEMOIZE": _Machine.memoize,
    "GET": _Machine.get,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "EMPTY_LIST": _Machine.empty_list,
    "EMPTY_DICT": _Machine.empty_dict,
    "LIST": _Machine.make_list,
    "TUPLE": _Machine.make_tuple,
    "TUPLE1": lambda machine, _: machine.make_tuple_of(1),
    "TUPLE2": lambda machine, _: machine.make_tuple_of(2),
    "TUPLE3": lambda machine, _: machine.make_tuple_of(3),
    "DICT": _Machine.make_dict,
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
    "GLOBAL": _Machine.global_name,
    "STACK_GLOBAL": _Machine.stack_global,
    "REDUCE": _Machine.reduce,
    "BUILD": _Machine.build,
}
