"""What Triton kernels read and write, looked at access by access in Triton's interpreter.

Each tensor that a kernel is given lies in an address space of its own, so an access that leaves it
is seen wherever it ends: beyond its last element, before its first, and between those of a tensor
with gaps. Programs, which run one after another here, run in any order on a GPU, so what two of
them do to one element is a race if one of them writes; and what a program has stored itself its
other threads see after a barrier alone.

triton-viz 3.0 was tried first and sees less. To its sanitizer all ranges of one length are one
symbol, so where the rows of a tile are masked its columns are, too: it passed weights read beyond
their end. It cannot run attention's kernels: what `tl.trans` returns has no shape there, and no
loop ends at a quotient. This one runs what the interpreter runs.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import triton
from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

from benchmarks.workers import ROOT

SPACE = 48  # bits of an argument's addresses; it begins in the middle
NOBODY, SEVERAL = 0, -1  # beside programs, which are counted from 1
CONVERT, LAUNCH = interpreter._implicit_cvt, GridExecutor.__call__
LOAD, PLAIN_LOAD = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_load
STORE, PLAIN_STORE = InterpreterBuilder.create_masked_store, InterpreterBuilder.create_store
TRITON = str(Path(triton.__file__).parent)


class Finding(Exception):
    """An access that a kernel must not make, in one line."""


class History(NamedTuple):
    """Which program did what to each element of a storage, in one launch. Zeros, so that of a
    storage with gaps no memory is taken but for what is touched."""

    wrote: np.ndarray
    read: np.ndarray
    holds: np.ndarray  # wrote it, with no barrier since


class Argument(NamedTuple):
    name: str
    address: int
    itemsize: int
    is_element: np.ndarray  # of what lies between the first element and the last
    start: int  # of the first, in the storage
    history: History


class Sanitizer:
    """Raises a Finding, within a ``with`` block, at the first wrong access of a kernel."""

    def __init__(self) -> None:
        self.launches: Counter[str] = Counter()
        self.accesses: Counter[str] = Counter()
        self.lanes: Counter[str] = Counter()
        self.masks: dict[str, bool] = {}  # where, and whether it has kept a wrong access off
        self._arguments: list[Argument] = []
        self._histories: dict[tuple[int, int], History] = {}
        self._names: Iterator[str] = iter(())
        self._kernel = ""
        self._has_mask = True

    def __enter__(self) -> Sanitizer:
        def on_launch(executor: Any, *args: Any, **kwargs: Any) -> Any:
            self._begin(executor, args, kwargs)
            return LAUNCH(executor, *args, **kwargs)

        def on_argument(value: Any) -> Any:
            result = CONVERT(value)
            if hasattr(value, "data_ptr"):
                result.handle.data = np.array([self._place(value)], dtype=np.uint64)
            return result

        def on_load(builder: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
            return LOAD(builder, self._look(builder, ptrs, mask, False), mask, *rest)

        def on_store(builder: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
            return STORE(builder, self._look(builder, ptrs, mask, True), value, mask, *rest)

        def without_mask(access: Any) -> Any:
            def on_access(*args: Any) -> Any:
                self._has_mask = False
                try:
                    return access(*args)
                finally:
                    self._has_mask = True

            return on_access

        def on_barrier(builder: Any) -> None:
            for history in self._histories.values():
                history.holds.fill(NOBODY)

        def refuse(*args: Any, **kwargs: Any) -> Any:
            raise Finding(f"{self._kernel}: an atomic, whose order is another in each run")

        self._patches = ExitStack()
        for owner, name, new in (
            (interpreter, "_implicit_cvt", on_argument),
            (GridExecutor, "__call__", on_launch),
            (InterpreterBuilder, "create_masked_load", on_load),
            (InterpreterBuilder, "create_masked_store", on_store),
            (InterpreterBuilder, "create_load", without_mask(PLAIN_LOAD)),
            (InterpreterBuilder, "create_store", without_mask(PLAIN_STORE)),
            (InterpreterBuilder, "create_barrier", on_barrier),
            (InterpreterBuilder, "create_atomic_rmw", refuse),
            (InterpreterBuilder, "create_atomic_cas", refuse),
        ):
            self._patches.enter_context(patch.object(owner, name, new))
        return self

    def __exit__(self, *exc: object) -> None:
        self._patches.close()

    def _begin(self, executor: Any, args: Any, kwargs: dict[str, Any]) -> None:
        function = executor.fn
        self._kernel = name_of(function)
        self.launches[self._kernel] += 1
        self._arguments, self._histories = [], {}
        given = {name: value for name, value in kwargs.items() if name in executor.arg_names}
        bound = inspect.getcallargs(function, *args, **given)
        # Tensors are converted in this order, after they were copied: names are lost on the way.
        self._names = iter([name for name, value in bound.items() if hasattr(value, "data_ptr")])

    def _place(self, tensor: Tensor) -> int:
        """The address that the kernel is given for a tensor."""
        offsets = np.zeros((), np.int64)
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
            offsets = np.add.outer(offsets, np.arange(size) * stride)
        is_element = np.zeros(int(offsets.max(initial=-1)) + 1, bool)
        is_element[offsets] = True
        storage, itemsize = tensor.untyped_storage(), tensor.element_size()
        key = storage.data_ptr(), itemsize
        if key not in self._histories:
            count = storage.nbytes() // itemsize
            self._histories[key] = History(*(np.zeros(count, np.int32) for _ in History._fields))
        place = next(self._names), tensor.data_ptr(), itemsize
        start = tensor.storage_offset()
        self._arguments.append(Argument(*place, is_element, start, self._histories[key]))
        return _base(len(self._arguments) - 1)

    def _look(self, builder: Any, ptrs: Any, mask: Any, is_store: bool) -> TensorHandle:
        """The same pointers as they are in memory, where all is well."""
        given = ptrs.data
        is_on = np.broadcast_to(mask.data, given.shape).astype(bool)
        of = (given >> np.uint64(SPACE)).astype(np.int64) - 1  # whose
        self.accesses[self._kernel] += 1
        self.lanes[self._kernel] += int(is_on.sum())
        where = self._where()
        addresses = np.zeros_like(given)  # of lanes that are off, which nobody reads
        is_kept = False
        for index in np.unique(of):
            if not 0 <= index < len(self._arguments):
                is_kept = True
                if is_on[of == index].any():
                    raise Finding(f"{where}: an access of no tensor")
                continue
            argument, lanes = self._arguments[index], of == index
            offsets = (given[lanes] - np.uint64(_base(index))).view(np.int64)
            at = offsets // argument.itemsize
            is_in = (at >= 0) & (at < len(argument.is_element))
            is_in[is_in] = argument.is_element[at[is_in]]
            wrong = at[is_on[lanes] & ~is_in]
            if len(wrong):
                way = "store to" if is_store else "load of"
                raise Finding(
                    f"{where}: a {way} {argument.name} outside of it: {len(wrong)} elements from "
                    f"{wrong.min()} to {wrong.max()}, and it has {argument.is_element.sum()} "
                    f"within {len(argument.is_element)}"
                )
            off = at[is_in & ~is_on[lanes]] + argument.start
            is_raced = is_store and (argument.history.wrote[off] != NOBODY).any()
            is_kept = is_kept or not is_in.all() or bool(is_raced)
            self._note(builder, argument, at[is_on[lanes]], is_store, where)
            addresses[lanes] = offsets.astype(np.uint64) + np.uint64(argument.address)
        if self._has_mask:
            self.masks[where] = self.masks.get(where, False) or is_kept
        return TensorHandle(addresses, ptrs.dtype)

    def _note(
        self, builder: Any, argument: Argument, at: np.ndarray, is_store: bool, where: str
    ) -> None:
        wrote, read, holds = argument.history
        at = at + argument.start
        program = 1 + int(np.ravel_multi_index(builder.grid_idx, builder.grid_dim))
        is_raced = (wrote[at] != NOBODY) & (wrote[at] != program)
        if is_store:
            is_raced |= (read[at] != NOBODY) & (read[at] != program)
        if is_raced.any():
            way = "stores to" if is_store else "loads"
            raise Finding(
                f"{where}: program {program - 1} {way} {is_raced.sum()} elements of "
                f"{argument.name} that another program of the launch stores to or loads"
            )
        if not is_store:
            if (holds[at] == program).any():
                raise Finding(
                    f"{where}: loads what the program has stored to {argument.name}, with no "
                    "tl.debug_barrier between"
                )
            read[at] = np.where((read[at] == NOBODY) | (read[at] == program), program, SEVERAL)
            return
        if len(np.unique(at)) < len(at):
            raise Finding(f"{where}: stores twice to one element of {argument.name} at once")
        wrote[at] = holds[at] = program

    def _where(self) -> str:
        """The kernel, and the lines that led to the access, the innermost first."""
        lines: list[str] = []
        frame, previous = sys._getframe(1), ""
        while frame is not None and frame.f_code is not LAUNCH.__code__:
            file = frame.f_code.co_filename
            if file != __file__ and not file.startswith(TRITON):
                shown = "" if file == previous else os.path.relpath(file, ROOT)
                lines.append(f"{shown}:{frame.f_lineno}")
                previous = file
            frame = frame.f_back  # type: ignore[assignment]
        return f"{self._kernel} ({' <- '.join(lines)})"


def name_of(function: Any) -> str:
    return f"{function.__module__.rpartition('.')[2]}.{function.__name__}"


def _base(index: int) -> int:
    return ((index + 1) << SPACE) + (1 << (SPACE - 1))
