"""An order-n Markov model of bytes: the baseline that a neural model has to beat."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class _Order(NamedTuple):
    """What is known of the contexts of one length; the keys are sorted."""

    ngrams: Tensor  # [G] context and next byte
    discounted: Tensor  # [G] count less discount
    contexts: Tensor  # [C]
    totals: Tensor  # [C] counts of all next bytes
    backoff: Tensor  # [C] what the discounts took away


class MarkovModel:
    """P(next byte | the `order` bytes before it), interpolated modified Kneser-Ney.

    The count of each n-gram is lowered by a discount (one for counts of 1, one for 2, one for 3
    and more, from the counts of counts), and what that frees is spread by the model of the next
    shorter context, where an n-gram counts once for each different byte in front of it; the
    shortest rests on the uniform distribution over 256 bytes. Every distribution sums to one.

    Source: S. F. Chen and J. Goodman, "An empirical study of smoothing techniques for language
    modeling", 1999, equations 26 to 28.

    Args:
        order: length of the context in bytes, 0 to 6 (an n-gram is kept in one int64).
    """

    def __init__(self, order: int = 3) -> None:
        if not 0 <= order <= 6:
            raise ValueError(f"order must be from 0 to 6, got {order}")
        self.order = order
        self._orders: list[_Order] = []

    def fit(self, data: Tensor) -> MarkovModel:
        """Count the n-grams of data, bytes as int64 [N]."""
        self._orders = []
        for length in range(self.order + 1):
            if length == self.order:
                grams = _ngrams(data, length + 1)
            else:
                longer = torch.unique(_ngrams(data, length + 2))
                grams = longer & ((1 << 8 * (length + 1)) - 1)  # without the byte in front
            keys, counts = torch.unique(grams, return_counts=True)
            discounts = _discounts(counts)[counts.clamp_max(3)]
            contexts, index = torch.unique(keys >> 8, return_inverse=True)
            zeros = torch.zeros(len(contexts), dtype=torch.float64)
            totals = zeros.index_add(0, index, counts.double())
            backoff = zeros.index_add(0, index, discounts)
            self._orders.append(_Order(keys, counts - discounts, contexts, totals, backoff))
        return self

    def probabilities(self, data: Tensor) -> Tensor:
        """Return P of each byte of data, int64 [N], given those before it; float64 [N].

        The first bytes are given fewer than `order` bytes, the very first one none.
        """
        p = torch.full(data.shape, 1 / 256, dtype=torch.float64)
        for length, known in enumerate(self._orders[: len(data)]):
            grams = _ngrams(data, length + 1)
            total = _lookup(known.contexts, known.totals, grams >> 8)
            backoff = _lookup(known.contexts, known.backoff, grams >> 8)
            count = _lookup(known.ngrams, known.discounted, grams)
            shorter = p[length:]
            p[length:] = torch.where(total > 0, (count + backoff * shorter) / total, shorter)
        return p

    def bits_per_byte(self, data: Tensor) -> float:
        """Return the mean of -log2 P over data, int64 [N], but for its first byte.

        The first is left out because a language model, too, starts from a given token.
        """
        return -self.probabilities(data)[1:].log2().mean().item()


def _ngrams(data: Tensor, n: int) -> Tensor:
    """Return every run of n bytes as one number, the first byte highest; [N - n + 1]."""
    length = max(len(data) - n + 1, 0)
    grams = torch.zeros(length, dtype=torch.int64)
    for offset in range(n):
        grams = (grams << 8) + data[offset : offset + length]
    return grams


def _discounts(counts: Tensor) -> Tensor:
    """Return the discounts for counts of 0, 1, 2 and >= 3 (equation 26), float64 [4]."""
    n1, n2, n3, n4 = torch.bincount(counts, minlength=5)[1:5].tolist()
    if not n1 or not n2 or not n3:
        # Too little text for the estimate; any discount in (0, count) is proper.
        return torch.tensor([0.0, 0.5, 0.5, 0.5], dtype=torch.float64)
    y = n1 / (n1 + 2 * n2)
    estimates = [0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3]
    # The estimate can fall below zero on odd texts; nothing would be left for unseen bytes.
    return torch.tensor(estimates, dtype=torch.float64).clamp_min(0.1)


def _lookup(keys: Tensor, values: Tensor, wanted: Tensor) -> Tensor:
    """Return the value of each wanted key, 0 where it is not among the sorted keys."""
    if not len(keys):
        return torch.zeros(wanted.shape, dtype=torch.float64)
    index = torch.searchsorted(keys, wanted).clamp_max(len(keys) - 1)
    return torch.where(keys[index] == wanted, values[index], 0.0)
