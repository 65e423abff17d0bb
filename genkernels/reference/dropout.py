"""Dropout, and the random numbers that decide what it drops, also of attention's weights."""

import torch
from torch import Tensor

# Columns whose 64-bit counters have one number in their upper half.
COLUMNS = 2**34


def dropout(input: Tensor, seed: Tensor, p: float, residual: Tensor | None = None) -> Tensor:
    """input times the factors of one head, whose rows of `COLUMNS` are input's elements in order;
    and residual, of the same shape and dtype, added. Of 16-bit tensors it is computed in float32.

    The gradient of input is the same of grad_output, without a residual, and that of residual is
    grad_output.
    """
    size, dtype = input.numel(), torch.promote_types(input.dtype, torch.float32)
    rows, columns = (0, (size + COLUMNS - 1) // COLUMNS), min(size, COLUMNS)
    factors = dropout_factors(seed, p, dtype, (0, 1), rows, columns)
    output = input * factors.flatten()[:size].view(input.shape)
    if residual is not None:
        output = residual + output
    return output.to(input.dtype)


def dropout_factors(
    seed: Tensor,
    dropout_p: float,
    dtype: torch.dtype,
    heads: tuple[int, int],
    rows: tuple[int, int],
    columns: int,
) -> Tensor:
    """What dropout multiplies the first columns of these rows of these heads with (b H + h of
    batch b and head h, each the first and the one after the last): 0, or 1 / (1 - dropout_p).

    Of the four numbers that Philox makes of the counter (j // 64 * 16 + j % 16, i, b H + h, 0),
    element (b, h, i, j) takes that of index j // 16 % 4, and stays where it is at least
    dropout_p 2^32. So the factors depend on where an element stands alone, and are made anew
    wherever they are needed.
    """
    device = seed.device
    groups = (columns + 63) // 64
    c0 = torch.arange(groups * 16, device=device).view(1, 1, groups, 16)
    c1 = torch.arange(*rows, device=device).view(1, -1, 1, 1)
    c2 = torch.arange(*heads, device=device).view(-1, 1, 1, 1)
    numbers = torch.stack(philox(seed, (c0, c1, c2, torch.zeros_like(c0))), -2)
    is_kept = numbers.flatten(-3)[..., :columns] >= int(dropout_p * 2**32)
    return is_kept.to(dtype) * (0.0 if dropout_p == 1 else 1 / (1 - dropout_p))


def philox(seed: Tensor, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10: four uniform 32-bit numbers of a 64-bit key and a counter of 32-bit numbers,
    all in int64.

    Source: Salmon et al. 2011, https://doi.org/10.1145/2063384.2063405.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    for _ in range(10):
        high0, low0 = _multiplied(c0, 0xD2511F53)
        high2, low2 = _multiplied(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + 0x9E3779B9 & 0xFFFFFFFF, k1 + 0xBB67AE85 & 0xFFFFFFFF
    return c0, c1, c2, c3


def _multiplied(x: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """The upper and the lower 32 bits of a product, whose 64 int64 does not hold."""
    low = x * (factor & 0xFFFF)
    high = x * (factor >> 16) + (low >> 16)
    return high >> 16, (high & 0xFFFF) << 16 | low & 0xFFFF
