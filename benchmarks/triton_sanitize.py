"""Every Triton kernel in Triton's interpreter, at sizes that need its masks, and each access looked
at: `make triton-sanitize`. What is looked for: benchmarks/sanitizer.py.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest.mock import patch

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import InterpreterError

import genkernels
from benchmarks import command
from benchmarks.sanitizer import Finding, Sanitizer, name_of
from benchmarks.workers import Failure
from genkernels.triton import IS_INTERPRETED, MODULES

DTYPES = (torch.float32, torch.float16)  # the interpreter multiplies bfloat16's bit patterns


class Draw:
    """Leaves of an op: each a block of memory that has its elements and no more."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.leaves: list[Tensor] = []
        torch.manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        self.leaves.append((0.4 * torch.randn(shape)).to(self.dtype).requires_grad_())
        return self.leaves[-1]


Case = Callable[[Draw], Any]


def gru(
    T: int, B: int, I: int, H: int, bias: bool = True, resets: bool = False, **settings: Any
) -> Case:
    def run(draw: Draw) -> Any:
        values = [draw(T, B, I), draw(B, H), *_weights(draw, I, H, bias)]
        if resets:
            settings["resets"] = torch.arange(T * B).view(T, B) % 3 == 0
        return genkernels.gru(*values, **settings)

    return run


def packed_gru(sizes: Sequence[int], I: int, H: int, **settings: Any) -> Case:
    def run(draw: Draw) -> Any:
        values = [draw(sum(sizes), I), draw(sizes[0], H), *_weights(draw, I, H)]
        return genkernels.gru(*values, batch_sizes=torch.tensor(sizes), **settings)

    return run


def gru_cell(B: int, I: int, H: int) -> Case:
    return lambda draw: genkernels.gru_cell(draw(B, I), draw(B, H), *_weights(draw, I, H))


def both_directions(T: int, B: int, I: int, H: int) -> Case:
    def run(draw: Draw) -> Any:
        module = genkernels.nn.GRU(I, H, bidirectional=True, dtype=draw.dtype)
        draw.leaves += module.parameters()
        return module(draw(T, B, I))

    return run


def _weights(draw: Draw, I: int, H: int, bias: bool = True) -> list[Tensor]:
    return [draw(3 * H, I), draw(3 * H, H), *([draw(3 * H), draw(3 * H)] if bias else [])]


def attention(
    B: int, H: int, L: int, S: int, D: int, Dv: int = 0, Hk: int = 0,
    mask: Callable[[Draw], Tensor] | None = None, **settings: Any,
) -> Case:  # fmt: skip
    def run(draw: Draw) -> Any:
        torch.manual_seed(0)  # dropout's
        values = [draw(B, H, L, D), draw(B, Hk or H, S, D), draw(B, Hk or H, S, Dv or D)]
        return genkernels.scaled_dot_product_attention(
            *values,
            attn_mask=None if mask is None else mask(draw),
            enable_gqa=Hk > 0,
            return_lse=True,
            **settings,
        )

    return run


def attention_of_one_product(B: int, rows: int, H: int, D: int) -> Case:
    """Whose gradients lie in one tensor, side by side."""

    def run(draw: Draw) -> Any:
        parts = genkernels.ops.attention.unbind_heads(draw(B, rows, 3, H, D))
        return genkernels.scaled_dot_product_attention(*(part.transpose(1, 2) for part in parts))

    return run


def loss(N: int, I: int, V: int, bias: bool = True, **settings: Any) -> Case:
    def run(draw: Draw) -> Any:
        target = torch.arange(N) * 7 % V
        target[::3] = settings.get("ignore_index", -100)
        biases = {"linear_bias": draw(V)} if bias else {}
        return genkernels.linear_cross_entropy(draw(N, I), draw(V, I), target, **biases, **settings)

    return run


def in_chunks(case: Case) -> Case:
    """Of as few classes as a tile has, which otherwise takes a large matrix."""
    from genkernels.triton import linear_cross_entropy

    def run(draw: Draw) -> Any:
        with patch.object(linear_cross_entropy, "SCRATCH", 1):
            result = case(draw)
            torch.autograd.grad(result, draw.leaves, retain_graph=True)
        return result

    return run


def sequences(lengths: Sequence[int], H: int, D: int, **settings: Any) -> Case:
    def run(draw: Draw) -> Any:
        starts = torch.tensor([0, *lengths]).cumsum(0)
        rows, longest = sum(lengths), max(lengths)
        tensors = [draw(rows, H, D) for _ in range(3)]
        return genkernels.varlen_attn(*tensors, starts, starts, longest, longest, **settings)

    return run


def log_prob(N: int, I: int, V: int) -> Case:
    def run(draw: Draw) -> Any:
        target = torch.arange(N) * 7 % V
        values = draw(N, I), draw(V, I), target
        return genkernels.linear_log_prob(*values, linear_bias=draw(V)).log_prob

    return run


def boolean(*shape: int) -> Callable[[Draw], Tensor]:
    return lambda draw: torch.arange(torch.Size(shape).numel()).view(shape) % 3 < 2


def additive(*shape: int) -> Callable[[Draw], Tensor]:
    return lambda draw: draw(*shape)


# By the module of genkernels.triton. Each kernel of configs() has to be launched, and each mask has
# to keep an access out of something: a size that divides into blocks has no use for it.
CASES: dict[str, list[Case]] = {
    "gru": [
        gru(2, 17, 3, 33),
        gru(3, 2, 5, 7, reverse=True),
        gru(3, 33, 2, 40, bias=False, resets=True),
        gru(2, 5, 3, 65, recompute=True),
        gru(2, 32, 3, 32),
        packed_gru([18, 17, 17, 3, 1], 4, 20),
        packed_gru([18, 17, 17, 3, 1], 4, 20, reverse=True),
        packed_gru([5, 3, 1], 4, 7),
        gru_cell(17, 5, 34),
        both_directions(3, 5, 4, 18),
    ],
    "attention": [
        attention(2, 2, 17, 33, 7),
        attention(1, 2, 70, 130, 20, Dv=40, is_causal=True),
        attention(1, 4, 129, 65, 33, Hk=2, is_causal=True),
        attention(1, 1, 65, 70, 128, Dv=100),
        attention(1, 2, 65, 70, 64, Dv=32),
        attention(1, 1, 64, 128, 64),
        attention(1, 2, 70, 130, 20, scale=-0.3),
        attention(1, 2, 70, 130, 20, window_size=(40, 3)),
        attention(2, 2, 70, 130, 20, key_lengths=torch.tensor([77, 3])),
        attention(2, 2, 70, 130, 20, mask=boolean(2, 1, 70, 130)),
        attention(2, 2, 70, 130, 20, mask=additive(1, 2, 70, 130)),
        attention(1, 2, 70, 130, 20, mask=additive(1, 1, 1, 130)),
        attention(1, 2, 70, 130, 20, alibi_slopes=torch.tensor([0.5, 0.1]), softcap=3.0),
        attention(1, 2, 70, 130, 20, dropout_p=0.3),
        attention(1, 4, 1, 1100, 20, Dv=7, Hk=2),
        attention(2, 2, 3, 1100, 64, is_causal=True, key_lengths=torch.tensor([1099, 3])),
        attention(1, 2, 3, 1100, 64),
        attention_of_one_product(2, 35, 2, 8),
        sequences([17, 0, 70, 1], 2, 20, window_size=(-1, 0)),
    ],
    "linear_cross_entropy": [
        loss(40, 33, 65),
        loss(33, 40, 131, bias=False, label_smoothing=0.1),
        loss(70, 20, 33, reduction="none"),
        loss(5, 130, 300, reduction="sum", ignore_index=7),
        loss(64, 64, 128),
        loss(130, 20, 70, label_smoothing=0.1),
        in_chunks(loss(70, 70, 300)),
        log_prob(33, 20, 70),
    ],
}


# Kernels with a mask that keeps off what is there, but was not written.
UNWRITTEN = ("linear_cross_entropy._add_to_input ",)


def run_case(case: Case, dtype: torch.dtype) -> None:
    draw = Draw(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what a kernel leaves to the reference
        results = case(draw)
        results = (results,) if isinstance(results, Tensor) else tuple(results)
        total = sum(result.float().square().sum() for result in results)
        torch.autograd.grad(total, draw.leaves)


def found(work: Callable[[], object]) -> str | None:
    """What was found in `work`, in one line."""
    try:
        work()
    except (Finding, InterpreterError) as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, Finding):
            cause = cause.__cause__
        if cause is None:
            raise
        return str(cause)
    return None


@triton.jit
def _copy(source, target, count, GAP: tl.constexpr, LOAD: tl.constexpr, STORE: tl.constexpr):
    at = tl.program_id(0) * 16 + tl.arange(0, 16) + GAP
    value = tl.load(source + at) if LOAD else tl.load(source + at, mask=at < count)
    if STORE:
        tl.store(target + at, value)
    else:
        tl.store(target + at, value, mask=at < count)


@triton.jit
def _race(source, target, count):
    at = tl.arange(0, 16)
    tl.store(target + at, tl.load(source + at, mask=at < count), mask=at < count)


@triton.jit
def _reread(source, target, count):
    at = tl.arange(0, 16)
    tl.store(target + at, tl.load(source + at, mask=at < count), mask=at < count)
    tl.store(source + at, tl.load(target + at, mask=at < count), mask=at < count)


def broken() -> dict[str, tuple[str, Callable[[], object]]]:
    """Kernels broken on purpose: what is said of each, and its launch."""
    memory = torch.zeros(64)
    source, target, gaps = memory[16:29], torch.zeros(13), memory[:26:2]
    good = {"GAP": 0, "LOAD": False, "STORE": False}

    def copy(a: Tensor, b: Tensor, **flags: Any) -> Callable[[], object]:
        return lambda: _copy[(1,)](a, b, 13, **good | flags)

    return {
        "a load with no mask": ("load of source outside", copy(source, target, LOAD=True)),
        "a store with no mask": ("store to target outside", copy(target, source, STORE=True)),
        "a load before the first": ("load of source outside", copy(source, target, GAP=-3)),
        "a load from a gap": ("load of source outside", copy(gaps, target)),
        "two programs": ("another program", lambda: _race[(2,)](source, target, 13)),
        "no barrier": ("no tl.debug_barrier", lambda: _reread[(1,)](source, target, 13)),
    }


def missed() -> Iterator[str]:
    """Of what is broken on purpose, what was not found; the whole must be found in none."""
    source, target = torch.zeros(20), torch.zeros(20)
    whole = found(lambda: _copy[(2,)](source, target, 20, 0, False, False))
    if whole is not None:
        yield f"a kernel with nothing wrong: {whole}"
    for name, (said, launch) in broken().items():
        line = found(launch)
        if line is None or said not in line:
            yield f"{name}: {line or 'nothing found'}"


def unexercised(modules: Sequence[str], sanitizer: Sanitizer) -> Iterator[str]:
    """What the cases have not run, so that nothing was found does not mean much."""
    for module in modules:
        configs = importlib.import_module(f"genkernels.triton.{module}").configs
        for name in sorted({name_of(config.kernel.fn) for config in configs("sm_80")}):
            if name not in sanitizer.launches:
                yield f"{name}: launched by no case"
    for where, has_kept in sanitizer.masks.items():
        if not has_kept and not where.startswith(UNWRITTEN):
            yield f"{where}: its mask keeps no access of any case out of bounds"


def table(sanitizer: Sanitizer) -> Iterator[str]:
    yield "| kernel | launches | loads and stores | elements |"
    yield "|---|---|---|---|"
    for name, launches in sorted(sanitizer.launches.items()):
        yield f"| {name} | {launches} | {sanitizer.accesses[name]} | {sanitizer.lanes[name]} |"


def run(options: argparse.Namespace) -> int:
    if not IS_INTERPRETED:
        raise Failure("TRITON_INTERPRET=1: not set when Python started (make triton-sanitize does)")
    with Sanitizer():
        unseen = list(missed())
    if unseen:
        raise Failure(f"the sanitizer does not find what is broken on purpose: {unseen[0]}")
    modules = [name for name in MODULES if options.only in name]
    if not modules:
        raise Failure(f"--only {options.only}: none of {', '.join(MODULES)}")
    lines: dict[str, str] = {}  # by where it is
    with Sanitizer() as sanitizer, genkernels.use_backend("triton"):
        for module in modules:
            cases = CASES.get(module, [])
            for case, dtype in itertools.product(cases, DTYPES):
                line = found(functools.partial(run_case, case, dtype))
                where = (line or "").partition(": ")[0]
                if line is not None and where not in lines:
                    lines[where] = line
                    print(line, flush=True)
            print(f"{module}: {len(cases)} cases of {len(DTYPES)} dtypes", file=sys.stderr)
    if not lines:
        lines = {line: line for line in unexercised(modules, sanitizer)}
        print("".join(f"{line}\n" for line in lines), end="")
    print("\n".join(table(sanitizer)))
    print(f"\n{len(lines)} found in {len(modules)} of {len(MODULES)} modules")
    return bool(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.triton_sanitize",
        description="Run every Triton kernel in Triton's interpreter at sizes that need its masks, "
        "and look at each access: whether it lies within the tensor that it goes to, and whether "
        "programs race. Kernels broken on purpose are run first and have to be found. Takes half a "
        "minute; TRITON_INTERPRET=1 has to be set.",
        epilog="Exit code: 0 when nothing was found; 1 when an access was wrong, a kernel was not "
        "launched or a mask was not needed; 2 when it could not run. "
        "Example: TRITON_INTERPRET=1 python -m benchmarks.triton_sanitize --only gru",
    )
    parser.add_argument(
        "--only", metavar="TEXT", default="", help="modules whose name contains this (default: all)"
    )
    return command.run("triton_sanitize", lambda: run(parser.parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
