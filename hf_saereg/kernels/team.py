"""Compiled loops on the very threads that torch's own operations run on, where these can be had.

Notable:
- torch's threads (GNU OpenMP) stay awake for some milliseconds after each operation, so that a
  second set of threads would have to share the cores with them: beside one, a loop of a millisecond
  took longer on two threads than on one
- a loop is therefore started as a compiler would start it: `GOMP_parallel` of the library that
  torch has loaded calls a C function in each thread of its team, which reads its arguments from a
  table
- where there is no such library, and in a forked process, whose team is gone, Python's threads do
  the same
"""

import ctypes
import functools
import itertools
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numba import carray, cfunc, njit, types
from numba.extending import intrinsic
from numpy import ndarray

Part = tuple[int, int]

_PROCESS = os.getpid()  # whose team there is


def even_parts(size: int) -> list[Part]:
    """As many equal ranges as there are threads, that cover `range(size)`."""
    threads = torch.get_num_threads()
    bounds = [size * i // threads for i in range(threads + 1)]
    return list(itertools.pairwise(bounds))


def in_parts(loop: Callable, parts: list[Part], *arguments: Any) -> list:
    """Results of `loop(start, stop, *arguments)`, one thread a part.

    Args:
        loop: compiled by numba; returns an integer or nothing.
        parts: first index and the one after the last, of each.
        *arguments: contiguous arrays of at most two dimensions, or integers.
    """
    if len(parts) == 1:
        return [loop(*parts[0], *arguments)]
    start = _gomp_parallel() if os.getpid() == _PROCESS else None
    if start is None:
        return _in_python_threads(loop, parts, *arguments)
    # start, stop and result of each part, then the arguments
    words = [word for part in parts for word in (*part, 0)]
    words += [word for argument in arguments for word in _words(argument)]
    table = np.array(words, np.int64)
    callback = _callback(loop, len(parts), tuple(map(_kind, arguments)))
    start(callback.address, table.ctypes.data, len(parts), 0)
    return table[2 : 3 * len(parts) : 3].tolist()


def _in_python_threads(loop: Callable, parts: list[Part], *arguments: Any) -> list:
    others = [_pool(os.getpid(), len(parts)).submit(loop, *part, *arguments) for part in parts[1:]]
    return [loop(*parts[0], *arguments), *(other.result() for other in others)]


@functools.cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Threads of this process: those of its parent did not survive the fork."""
    return ThreadPoolExecutor(max(1, threads - 1), thread_name_prefix=f"saereg-{process}")


@functools.cache
def _library() -> str | None:
    """Path of the GNU OpenMP library that torch has loaded; None where it cannot be told."""
    maps = Path("/proc/self/maps")
    found = set(re.findall(r"/\S*/libgomp[^/\s]*", maps.read_text())) if maps.is_file() else set()
    of_torch = {path for path in found if re.search(r"/torch(\.libs)?/", path)}
    candidates = of_torch or found
    return candidates.pop() if len(candidates) == 1 else None


@functools.cache
def _gomp_parallel() -> Callable | None:
    """What starts a team: GOMP_parallel(function, data, threads, flags)."""
    path = _library()
    if path is None:
        return None
    start = ctypes.CDLL(path).GOMP_parallel
    start.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    start.restype = None
    return start


def _words(argument: ndarray | int) -> list[int]:
    """What a table holds of an argument: address and shape, or the value."""
    if not isinstance(argument, ndarray):
        return [argument]
    if not argument.flags.c_contiguous:
        raise ValueError("An array of a loop is not contiguous.")
    return [argument.ctypes.data, *argument.shape]


def _kind(argument: ndarray | int) -> tuple[str, int] | None:
    return (argument.dtype.str, argument.ndim) if isinstance(argument, ndarray) else None


@intrinsic
def _as_pointer(typing: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.inttoptr(values[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), generate


def _reader(kind: tuple[str, int] | None, place: int) -> Callable:
    """Reads one argument from a table."""
    if kind is None:
        return njit(lambda table: table[place])
    dtype, dimensions = np.dtype(kind[0]), kind[1]
    if dimensions == 1:
        return njit(lambda table: carray(_as_pointer(table[place]), (table[place + 1],), dtype))
    return njit(
        lambda table: carray(_as_pointer(table[place]), (table[place + 1], table[place + 2]), dtype)
    )


def _tuple_of(readers: list[Callable]) -> Callable:
    """Reads several arguments as one tuple."""
    first = readers[0]
    if len(readers) == 1:
        return njit(lambda table: (first(table),))
    rest = _tuple_of(readers[1:])
    return njit(lambda table: (first(table), *rest(table)))


@functools.cache
def _callback(loop: Callable, parts: int, kinds: tuple[tuple[str, int] | None, ...]) -> Any:
    """A C function that does a thread's share of the parts of a table."""
    widths = [1 if kind is None else 1 + kind[1] for kind in kinds]
    places = [3 * parts + sum(widths[:i]) for i in range(len(widths))]
    size = 3 * parts + sum(widths)
    arguments = _tuple_of([_reader(*own) for own in zip(kinds, places, strict=True)])
    number, threads = _thread_number()

    def with_results(data: Any) -> None:
        table = carray(data, (size,), np.int64)
        for part in range(number(), parts, threads()):
            own = table[3 * part : 3 * part + 3]
            own[2] = loop(own[0], own[1], *arguments(table))

    def without(data: Any) -> None:
        table = carray(data, (size,), np.int64)
        for part in range(number(), parts, threads()):
            loop(table[3 * part], table[3 * part + 1], *arguments(table))

    returns = loop.py_func.__annotations__["return"] is int
    return cfunc(types.void(types.voidptr))(with_results if returns else without)


def _thread_number() -> tuple[Any, Any]:
    """Of the library's: which thread of a team calls, and how many it has."""
    library = ctypes.CDLL(_library())
    found = library.omp_get_thread_num, library.omp_get_num_threads
    for function in found:
        function.argtypes, function.restype = [], ctypes.c_int
    return found
