"""The softmax cross-entropy of a linear map in Triton, whose logits are never held.

One kernel multiplies tiles of rows and classes and keeps, of each row, the largest logit, the sum
of exponentials beside it, the target's logit and, where they are asked for, the distances of all
logits from the largest and the most likely class. A program has a range of the classes, so that few
rows occupy a GPU, too, and a second kernel merges the ranges. For gradients a third multiplies
again, for a chunk of the classes and all rows, and stores the gradients of these logits in the
operands' dtype. Those of linear_weight and linear_bias are then a product and a sum of PyTorch's;
input's are added up over the chunks in float32: of bfloat16 and float16 on NVIDIA's GPUs from
cuBLAS's products of that dtype, elsewhere, where PyTorch's round each chunk's result to the
operands' dtype, by a fourth kernel.

With N rows, K features and V classes gradients take four products of 2NKV operations, one more than
with logits in memory; these would be 4NV bytes, written once and read twice. Chunks are of classes,
not of rows, since the statistics of all are known by then: so each linear_weight's gradient is
formed at once, and only input's sums, 4NK bytes, are read and written with each chunk. Chunks of
rows would do so with 4VK bytes, a second copy of what is the largest tensor of most models. Held at
a time are a chunk's gradients, SCRATCH bytes or as many as input has, whichever is more,
input's sums, and with cuBLAS as much again for a chunk's part of them.

Each sum belongs to one program, so there are no atomics, results are the same in each run, and
nothing waits for the device. Products are summed in float32, those of float32 in full ("ieee") and
not in TF32, unless PyTorch's own are told to. Logits are added up for the gradients in the order in
which they were for the statistics. Formulas: genkernels.reference.linear_cross_entropy.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import DTYPES, Config, architecture_of, check_like
from .launch import launch


# A tile of logits, float32 [BLOCK_N, BLOCK_V]; beyond the last class -inf, beyond the last row that
# row again, so that only features need a mask.
@triton.jit
def _logits(
    input, linear_weight, linear_bias, row, first, N, K, V, input_row, weight_row,
    IS_WHOLE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    n, v = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_V)
    k = tl.arange(0, BLOCK_K)
    # Within a tile offsets have 32 bits.
    x_at = tl.minimum(n, N - 1 - row)[:, None] * input_row + k[None, :]
    w_at = tl.minimum(v, V - 1 - first)[None, :] * weight_row + k[:, None]
    input += row.to(tl.int64) * input_row
    linear_weight += first.to(tl.int64) * weight_row
    sums = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for at in range(0, K, BLOCK_K):
        if IS_WHOLE:
            x, w = tl.load(input + x_at), tl.load(linear_weight + w_at)
        else:
            x = tl.load(input + x_at, mask=(k < K - at)[None, :], other=0.0)
            w = tl.load(linear_weight + w_at, mask=(k < K - at)[:, None], other=0.0)
        sums = tl.dot(x, w, sums, input_precision="ieee")
        input += BLOCK_K
        linear_weight += BLOCK_K
    is_class = first + v < V
    if linear_bias is not None:
        bias = tl.load(linear_bias + first + v, mask=is_class, other=0.0)
        sums += bias.to(tl.float32)[None, :]
    return tl.where(is_class[None, :], sums, float("-inf"))


# Rows' targets, ignore_index too, as what is compared with classes: -1 where they are none.
@triton.jit
def _as_class(targets, V):
    return tl.where((targets >= 0) & (targets < V), targets, -1).to(tl.int32)


# What is subtracted from logits whose largest is this, also where all are -inf.
@triton.jit
def _finite(largest):
    return tl.where(largest == float("-inf"), 0.0, largest)


# How much further logits, whose weights add up to `weights`, are from `to` than from `largest`.
@triton.jit
def _further(weights, largest, to):
    return weights * (to - tl.where(largest == float("-inf"), to, largest))


@triton.jit(do_not_specialize=["N", "V", "splits", "tiles"])
def _statistics(
    input,  # [N, K]
    linear_weight,  # [V, K]
    linear_bias,  # [V]
    weight,  # float32 [V]
    target,  # int64 [N]
    most,  # float32 [splits, N]: the largest logit
    total,  # float32 [splits, N]: the sum of exponentials of what lies between it and the others
    of_target,  # float32 [splits, N]: the target's logit
    distance,  # float32 [splits, N]: the weighted sum of what lies between it and the others
    weights,  # float32 [splits]: the classes' weight
    best,  # int32 [splits, N]: the first of the largest
    nan,  # int32 [splits, N]: the first that is no number, V if there is none
    N, K, V, input_row, weight_row,
    splits,
    tiles,  # of classes, that a program has
    SMOOTHS: tl.constexpr,
    PREDICTS: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0)
    split = index % splits  # programs side by side share rows, and each range's classes
    row = index // splits * BLOCK_N
    rows = row + tl.arange(0, BLOCK_N)
    own_class = _as_class(tl.load(target + rows, mask=rows < N, other=-1), V)
    top = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    sums = tl.zeros((BLOCK_N,), tl.float32)
    own = tl.zeros((BLOCK_N,), tl.float32)
    apart = tl.zeros((BLOCK_N,), tl.float32)
    seen = 0.0  # weights so far
    start = split * tiles * BLOCK_V
    first_best = tl.full((BLOCK_N,), 0, tl.int32) + start
    first_nan = tl.full((BLOCK_N,), 0, tl.int32) + V
    first = start
    for _ in range(tl.minimum(tiles, tl.cdiv(V - start, BLOCK_V))):
        x = _logits(
            input, linear_weight, linear_bias, row, first, N, K, V, input_row, weight_row,
            IS_WHOLE, BLOCK_N, BLOCK_V, BLOCK_K,
        )  # fmt: skip
        classes = first + tl.arange(0, BLOCK_V)
        own += tl.sum(tl.where(classes[None, :] == own_class[:, None], x, 0.0), 1)
        if PREDICTS:
            at_nan = tl.min(tl.where(x != x, classes[None, :], V), 1)
            first_nan = tl.minimum(first_nan, at_nan)
            numbers = tl.where(x != x, float("-inf"), x)
            largest = tl.max(numbers, 1)
            at = tl.min(tl.where(numbers == largest[:, None], classes[None, :], V), 1)
            first_best = tl.where(largest > top, at, first_best)
        else:
            largest = tl.max(x, 1)
        now = tl.maximum(top, largest)
        shift = _finite(now)
        sums = sums * tl.exp(top - shift) + tl.sum(tl.exp(x - shift[:, None]), 1)
        if SMOOTHS:
            is_class = classes < V
            if weight is not None:
                w = tl.load(weight + classes, mask=is_class, other=0.0)
            else:
                w = is_class.to(tl.float32)
            away = tl.where(is_class[None, :], w[None, :] * (shift[:, None] - x), 0.0)
            apart += _further(seen, top, shift) + tl.sum(away, 1)
            seen += tl.sum(w, 0)
        top = now
        first += BLOCK_V
    at = split.to(tl.int64) * N + rows
    tl.store(most + at, top, mask=rows < N)
    tl.store(total + at, sums, mask=rows < N)
    tl.store(of_target + at, own, mask=rows < N)
    if SMOOTHS:
        tl.store(distance + at, apart, mask=rows < N)
        tl.store(weights + split, seen, mask=row == 0)
    if PREDICTS:
        tl.store(best + at, first_best, mask=rows < N)
        tl.store(nan + at, first_nan, mask=rows < N)


# Of all ranges of classes together: losses, before a mean, the weights of their targets, and what
# the gradients need. A target that is no class makes its row NaN.
@triton.jit(do_not_specialize=["N", "V", "splits", "ignore_index"])
def _merge(
    weight,  # float32 [V]
    target,  # int64 [N]
    most, total, of_target, distance, weights, best, nan,  # as of _statistics
    losses,  # float32 [N]
    target_weights,  # float32 [N], zero where ignored
    shifts,  # float32 [N]: a class's probability is exp(logit - shift) / the sum of these
    ratios,  # float32 [N]: the factor of that exponential in the logit's gradient
    steps,  # float32 [N]: what the target's logit's gradient has less
    prediction,  # int64 [N]
    N, V, splits,
    ignore_index: tl.int64,
    smoothing: tl.float32,
    SMOOTHS: tl.constexpr,
    PREDICTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row = rows < N
    top = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    sums = tl.zeros((BLOCK_N,), tl.float32)
    own = tl.zeros((BLOCK_N,), tl.float32)
    apart = tl.zeros((BLOCK_N,), tl.float32)
    seen = 0.0
    first_best = tl.full((BLOCK_N,), 0, tl.int32)
    first_nan = tl.full((BLOCK_N,), 0, tl.int32) + V
    at = rows.to(tl.int64)
    for split in range(splits):
        largest = tl.load(most + at, mask=is_row, other=0.0)
        now = tl.maximum(top, largest)
        shift = _finite(now)
        there = tl.load(total + at, mask=is_row, other=1.0) * tl.exp(largest - shift)
        sums = sums * tl.exp(top - shift) + there
        own += tl.load(of_target + at, mask=is_row, other=0.0)
        if SMOOTHS:
            w = tl.load(weights + split)
            away = tl.load(distance + at, mask=is_row, other=0.0)
            apart += _further(seen, top, shift) + away + _further(w, largest, shift)
            seen += w
        if PREDICTS:
            there = tl.load(best + at, mask=is_row, other=0)
            first_best = tl.where(largest > top, there, first_best)
            first_nan = tl.minimum(first_nan, tl.load(nan + at, mask=is_row, other=0))
        top = now
        at += N
    targets = tl.load(target + rows, mask=is_row, other=0)
    is_kept = targets != ignore_index
    is_class = (targets >= 0) & (targets < V)
    if weight is not None:
        w = tl.load(weight + targets, mask=is_row & is_kept & is_class, other=0.0)
    else:
        w = is_kept.to(tl.float32)
    w = tl.where(is_class | (targets == ignore_index), w, float("nan"))
    log_total = tl.log(sums)
    rest = (1.0 - smoothing) * w
    loss = rest * ((top - own) + log_total)
    all_weights = rest
    if SMOOTHS:
        spread = smoothing / V
        loss += spread * (apart + seen * log_total)
        all_weights += spread * seen
    tl.store(losses + rows, tl.where(is_kept, loss, 0.0), mask=is_row)
    tl.store(target_weights + rows, tl.where(is_kept, w, 0.0), mask=is_row)
    tl.store(shifts + rows, top, mask=is_row)
    tl.store(ratios + rows, all_weights / sums, mask=is_row)
    tl.store(steps + rows, rest, mask=is_row)
    if PREDICTS:
        found = tl.where(first_nan < V, first_nan, first_best)
        tl.store(prediction + rows, found.to(tl.int64), mask=is_row)


# Which tile of a matrix a program has: groups of GROUP rows of tiles, down each column of a group,
# so that programs side by side share what they read.
@triton.jit
def _tile(row_tiles, column_tiles, GROUP: tl.constexpr):
    index = tl.program_id(0)
    group = index // (GROUP * column_tiles)
    rows = tl.minimum(row_tiles - group * GROUP, GROUP)
    within = index % (GROUP * column_tiles)
    return group * GROUP + within % rows, within // rows


# The gradients of the logits of classes start to end, along `factor`.
@triton.jit(do_not_specialize=["N", "V", "start", "end", "ignore_index"])
def _gradients(
    input,  # [N, K]
    linear_weight,  # [V, K]
    linear_bias,  # [V]
    weight,  # float32 [V]
    target,  # int64 [N]
    shifts, ratios, steps,  # float32 [N], as of _merge
    factor,  # float32 [N]
    gradient,  # [N, end - start]
    N, K, V, start, end, input_row, weight_row, gradient_row,
    ignore_index: tl.int64,
    spread: tl.float32,
    SMOOTHS: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    row_tile, column_tile = _tile(tl.cdiv(N, BLOCK_N), tl.cdiv(end - start, BLOCK_V), 8)
    row, first = row_tile * BLOCK_N, start + column_tile * BLOCK_V
    x = _logits(
        input, linear_weight, linear_bias, row, first, N, K, V, input_row, weight_row,
        IS_WHOLE, BLOCK_N, BLOCK_V, BLOCK_K,
    )  # fmt: skip
    rows = row + tl.arange(0, BLOCK_N)
    classes = first + tl.arange(0, BLOCK_V)
    is_row = rows < N
    targets = tl.load(target + rows, mask=is_row, other=0)
    shift = tl.load(shifts + rows, mask=is_row, other=float("inf"))
    ratio = tl.load(ratios + rows, mask=is_row, other=0.0)
    step = tl.load(steps + rows, mask=is_row, other=0.0)
    times = tl.load(factor + rows, mask=is_row, other=0.0)
    g = tl.exp(x - shift[:, None]) * ratio[:, None]
    is_target = classes[None, :] == _as_class(targets, V)[:, None]
    g -= tl.where(is_target, step[:, None], 0.0)
    if SMOOTHS:
        if weight is not None:
            w = tl.load(weight + classes, mask=classes < V, other=0.0)
            g -= (spread * w)[None, :]
        else:
            g -= spread
    g = tl.where((targets != ignore_index)[:, None], g * times[:, None], 0.0)
    gradient += row.to(tl.int64) * gradient_row + (first - start)
    at = gradient + tl.arange(0, BLOCK_N)[:, None] * gradient_row + tl.arange(0, BLOCK_V)[None, :]
    tl.store(at, g.to(gradient.dtype.element_ty), mask=is_row[:, None] & (classes < end)[None, :])


# sums += gradient linear_weight, of a chunk's classes.
@triton.jit(do_not_specialize=["N", "classes"])
def _add_to_input(
    gradient,  # [N, classes]
    linear_weight,  # [classes, K]
    sums,  # float32 [N, K]
    N, K, classes, gradient_row, weight_row,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    row_tile, column_tile = _tile(tl.cdiv(N, BLOCK_N), tl.cdiv(K, BLOCK_K), 8)
    row, column = row_tile * BLOCK_N, column_tile * BLOCK_K
    n, k = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    v = tl.arange(0, BLOCK_V)
    is_feature = (column + k < K)[None, :]
    gradient += row.to(tl.int64) * gradient_row
    linear_weight += column
    # Rows of the gradient hold whole tiles, so that its loads are aligned.
    g_at = tl.minimum(n, N - 1 - row)[:, None] * gradient_row + v[None, :]
    w_at = v[:, None] * weight_row + k[None, :]
    product = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for at in range(0, classes, BLOCK_V):
        is_class = v < classes - at
        g = tl.load(gradient + g_at, mask=is_class[None, :], other=0.0)
        w = tl.load(linear_weight + w_at, mask=is_class[:, None] & is_feature, other=0.0)
        product = tl.dot(g, w, product, input_precision="ieee")
        gradient += BLOCK_V
        linear_weight += BLOCK_V * tl.cast(weight_row, tl.int64)
    to = sums + (row.to(tl.int64) * K + column) + (n[:, None] * K + k[None, :])
    is_there = (row + n < N)[:, None] & is_feature
    tl.store(to, tl.load(to, mask=is_there, other=0.0) + product, mask=is_there)


# Bytes of a chunk's gradients, unless input has more.
SCRATCH = 256 << 20
# Programs that occupy every GPU, on whose size no result is to depend; and ranges of classes, of
# many rows as well, so that programs that run at a time share rows, too.
LEAST_PROGRAMS = 512
LEAST_SPLITS = 8


def linear_cross_entropy_pass(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    grad_loss: Tensor | None,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
    predicts: bool,
    needs_input: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As the raw op of that name, but for a target that is no class: its row is NaN."""
    _check(input, linear_weight, target, linear_bias, weight, grad_loss, reduction)
    (N, K), V = input.shape, linear_weight.size(0)
    input, linear_weight = _with_rows(input), _with_rows(linear_weight)
    arguments: dict[str, Any] = {
        **{"input": input, "linear_weight": linear_weight, "target": target.contiguous()},
        "linear_bias": None if linear_bias is None else linear_bias.contiguous(),
        "weight": None if weight is None else weight.contiguous(),
        **{"N": N, "K": K, "V": V, "input_row": input.stride(0)},
        **{"weight_row": linear_weight.stride(0), "ignore_index": ignore_index},
        **{"smoothing": label_smoothing, "spread": label_smoothing / V},
        **{"SMOOTHS": label_smoothing > 0, "PREDICTS": predicts},
    }
    prediction = target.new_empty(N if predicts else 0)
    losses, target_weights, *statistics = input.new_empty((5, N), dtype=torch.float32)
    results = {"prediction": prediction, "losses": losses, "target_weights": target_weights}
    arguments |= results | dict(zip(("shifts", "ratios", "steps"), statistics, strict=True))
    with torch.cuda.device_of(input):
        _add_up(arguments)
        divisor = target_weights.sum() if reduction == _MEAN else 1.0
        loss = losses if reduction == _NONE else losses.sum() / divisor
        if reduction == _MEAN:  # of no weight it is no number, whatever smoothing adds
            loss.masked_fill_(divisor == 0, float("nan"))
        needs = (needs_input, needs_weight, needs_bias)
        if any(needs):
            factor = losses.new_ones(N) if grad_loss is None else grad_loss
            arguments["factor"] = (factor / divisor).expand(N).contiguous()
        return loss, prediction, *_form_gradients(arguments, needs)


_NONE, _MEAN = 0, 1  # reductions


def _check(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    grad_loss: Tensor | None,
    reduction: int,
) -> None:
    if input.dim() != 2 or linear_weight.dim() != 2 or linear_weight.size(0) == 0:
        raise RuntimeError(
            "genkernels.linear_cross_entropy: expected input and linear_weight of 2 dimensions, "
            f"and a class, got {list(input.shape)} and {list(linear_weight.shape)}"
        )
    (N, K), V = input.shape, linear_weight.size(0)
    check = functools.partial(check_like, "linear_cross_entropy")
    check("linear_weight", linear_weight, (V, K), input)
    check("target", target, (N,), input, torch.int64)
    check("linear_bias", linear_bias, (V,), input)
    check("weight", weight, (V,), input, torch.float32)
    check("grad_loss", grad_loss, (N,) if reduction == _NONE else (), input, torch.float32)


def _with_rows(tensor: Tensor) -> Tensor:
    """With contiguous rows, so near each other that offsets within a tile have 32 bits."""
    is_fit = tensor.stride(1) == 1 and tensor.stride(0) < 2**23
    return tensor if is_fit else tensor.contiguous()


def _add_up(arguments: dict[str, Any]) -> None:
    """The statistics of all rows, in the results that the arguments name."""
    input, N, V = (arguments[name] for name in ("input", "N", "V"))
    if N == 0:
        return
    blocks = _blocks(_statistics, arguments)
    row_tiles, class_tiles = triton.cdiv(N, blocks["BLOCK_N"]), triton.cdiv(V, blocks["BLOCK_V"])
    splits = min(class_tiles, max(LEAST_SPLITS, triton.cdiv(LEAST_PROGRAMS, row_tiles)))
    tiles = triton.cdiv(class_tiles, splits)
    splits = triton.cdiv(class_tiles, tiles)
    most, total, of_target, distance = input.new_empty((4, splits, N), dtype=torch.float32)
    best, nan = input.new_empty((2, splits, N), dtype=torch.int32)
    parts = {"most": most, "total": total, "of_target": of_target, "distance": distance}
    parts |= {"best": best, "nan": nan, "weights": most.new_empty(splits)}
    given = arguments | parts | {"splits": splits, "tiles": tiles}
    _launch(_statistics, row_tiles * splits, given)
    _launch(_merge, triton.cdiv(N, _blocks(_merge, arguments)["BLOCK_N"]), given)


def _form_gradients(
    arguments: dict[str, Any], needs: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    input, linear_weight, N, K, V = (
        arguments[name] for name in ("input", "linear_weight", "N", "K", "V")
    )
    needs_input, needs_weight, needs_bias = needs
    grad_input = input.new_empty((N if needs_input else 0, K))
    grad_weight = input.new_empty((V if needs_weight else 0, K))
    grad_bias = input.new_empty(V if needs_bias else 0)
    if N == 0:
        return grad_input, grad_weight.zero_(), grad_bias.zero_()
    if not any(needs):
        return grad_input, grad_weight, grad_bias
    blocks = _blocks(_gradients, arguments)
    row_tiles, block = triton.cdiv(N, blocks["BLOCK_N"]), blocks["BLOCK_V"]
    columns = block * triton.cdiv(min(V, max(SCRATCH // (N * input.element_size()), K, 1)), block)
    gradient = input.new_empty((N, columns))
    sums = None
    if needs_input and columns < V:
        sums = input.new_zeros((N, K), dtype=torch.float32)
    for start in range(0, V, columns):
        end = min(start + columns, V)
        of_chunk = {"gradient": gradient, "start": start, "end": end, "gradient_row": columns}
        programs = row_tiles * triton.cdiv(end - start, block)
        _launch(_gradients, programs, arguments | of_chunk)
        chunk, rows = gradient[:, : end - start], linear_weight[start:end]
        if needs_weight:
            torch.mm(chunk.mT, input, out=grad_weight[start:end])
        if needs_bias:
            torch.sum(chunk, 0, out=grad_bias[start:end])
        if sums is None:
            if needs_input:
                torch.mm(chunk, rows, out=grad_input)
        elif input.dtype == torch.float32:
            sums.addmm_(chunk, rows)
        elif input.is_cuda and torch.version.hip is None:
            # cuBLAS takes a quarter of the time of the kernel that serves the others.
            sums += torch.mm(chunk, rows, out_dtype=torch.float32)
        else:
            given = arguments | of_chunk
            given |= {"linear_weight": rows, "sums": sums, "classes": end - start}
            blocks = _blocks(_add_to_input, arguments)
            programs = triton.cdiv(N, blocks["BLOCK_N"]) * triton.cdiv(K, blocks["BLOCK_K"])
            _launch(_add_to_input, programs, given)
    if sums is not None:
        grad_input.copy_(sums)
    return grad_input, grad_weight, grad_bias


def _launch(kernel: Any, programs: int, arguments: dict[str, Any]) -> None:
    """Runs a kernel with those of the arguments that it names."""
    if programs > 0:
        given = arguments | _blocks(kernel, arguments)
        options = {name: given[name] for name in _OPTIONS}
        launch(kernel, (programs,), [given[name] for name in kernel.arg_names], options)


def _blocks(kernel: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """`config` for these arguments."""
    input, strides = arguments["input"], (arguments["input_row"], arguments["weight_row"])
    is_whole = arguments["K"] % 64 == 0 and all(stride % 16 == 0 for stride in strides)
    is_plain = not (arguments["SMOOTHS"] or arguments["PREDICTS"])
    blocks = config(kernel, architecture_of(input.device), input.dtype, is_whole, is_plain)
    return blocks | {"IS_WHOLE": is_whole}


_OPTIONS = ("num_warps", "num_stages")


def config(
    kernel: Any, architecture: str, dtype: torch.dtype, is_whole: bool, is_plain: bool
) -> dict[str, int]:
    """Blocks and the compiler's options, for every N, K and V.

    They are what keeps sums, and all that goes with a tile's rows and classes, in registers. Unless
    K is a multiple of 64 and strides of 16, a load may have an address for each number; smoothing
    and predictions take registers, too. What a tile reads, of L2, is least beside its operations
    where it is widest. All kernels add up a logit's products in the same blocks.
    """
    if kernel is _merge:
        return _config(128, 0, 0, 4, 1)
    if dtype == torch.float32:  # without tensor cores
        return _config(64, 64, 16, 8, 1 if architecture.startswith("gfx") else 2)
    is_new = architecture in ("sm_90", "sm_100")
    block_k = 64 if is_whole and architecture != "sm_80" else 32
    stages = 2 if architecture.startswith("gfx") else 3
    if kernel is _add_to_input:
        return _config(128, 64 if is_new else 32, 128 if is_whole else 64, 8, stages)
    if kernel is _gradients:
        return _config(128, 256 if is_new and is_whole else 128, block_k, 8, stages)
    is_wide = is_whole and is_plain
    block_v = 256 if is_wide and architecture == "sm_90" else 128 if is_wide else 64
    return _config(128, block_v, block_k, 8, stages)


def _config(*values: int) -> dict[str, int]:
    return dict(zip(("BLOCK_N", "BLOCK_V", "BLOCK_K", *_OPTIONS), values, strict=True))


def configs(architecture: str) -> Iterator[Config]:
    """Every kernel as the launchers run it there, for compiling ahead of time."""
    for dtype, (kernel, name), features in itertools.product(DTYPES, _NAMES.items(), _FEATURES):
        for is_whole in (True, False):
            is_left = {
                _merge: not is_whole or dtype != torch.float32,
                _gradients: features == "predictions",
                _add_to_input: features != "" or dtype == torch.float32,
            }
            if is_left.get(kernel):
                continue
            given = _FEATURES[features] | {"IS_WHOLE": is_whole}
            given |= config(kernel, architecture, dtype, is_whole, features == "")
            constants = {n: given[n] for n in kernel.arg_names if n in given}
            types = _TYPES | dict.fromkeys(_OPERANDS, dtype)
            names = [n for n in kernel.arg_names if n in types and n not in constants]
            strides = ("input_row", "weight_row") if is_whole else ()
            divisible = (*strides, *(("K",) if is_whole else ()), "gradient_row")
            yield Config(
                ", ".join(filter(None, ("loss " + name, features, "" if is_whole else "any K"))),
                dtype,
                kernel,
                {n: types[n] for n in names},
                constants,
                {option: given[option] for option in _OPTIONS},
                tuple(n for n in divisible if n in kernel.arg_names),
                has_products=kernel is not _merge,
            )


_NAMES = {
    _statistics: "statistics",
    _merge: "merge",
    _gradients: "gradients",
    _add_to_input: "input's sums",
}
_OPERANDS = ("input", "linear_weight", "linear_bias", "gradient")
_SUMS = ("weight", "most", "total", "of_target", "distance", "weights", "losses", "target_weights")
_TYPES = {
    **dict.fromkeys((*_SUMS, "shifts", "ratios", "steps", "factor", "sums"), torch.float32),
    **dict.fromkeys(("target", "prediction"), torch.int64),
    **dict.fromkeys(("best", "nan"), torch.int32),
}
_FEATURES: dict[str, dict[str, Any]] = {
    "": {"weight": None, "SMOOTHS": False, "PREDICTS": False},
    "smoothing": {"SMOOTHS": True, "PREDICTS": False},
    "predictions": {"weight": None, "SMOOTHS": False, "PREDICTS": True},
}


KERNELS: dict[str, Callable[..., Any]] = {"linear_cross_entropy_pass": linear_cross_entropy_pass}
