"""An order-n Markov model of bytes: the baseline that a neural model has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from .bayesian_network import BayesianNetwork, BayesianNetworkConfig
from .sampling import CausalModel


@dataclass(frozen=True)
class MarkovConfig:
    """Sizes of a `MarkovModel`: how many n-grams and contexts of each length it knows.

    `MarkovModel.fit` sets the numbers, by which a checkpoint's tensors are made.

    Raises:
        ValueError: an order outside 0 to 6, or other than order + 1 numbers.
    """

    vocab_size: ClassVar = 256

    order: int = 3
    ngrams: tuple[int, ...] = ()
    contexts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if type(self.order) is not int or not 0 <= self.order <= 6:
            raise ValueError(f"order must be from 0 to 6, got {self.order!r}")
        for name in ("ngrams", "contexts"):
            sizes = tuple(getattr(self, name))  # JSON has lists
            if not any(sizes):  # those of no text, perhaps for another order
                sizes = (0,) * (self.order + 1)
            if len(sizes) != self.order + 1 or not all(
                type(size) is int and size >= 0 for size in sizes
            ):
                raise ValueError(f"{name} must be {self.order + 1} ints >= 0, got {sizes}")
            object.__setattr__(self, name, sizes)


class _Order(nn.Module):
    """What is known of the contexts of one length; the keys are sorted."""

    ngrams: Tensor  # [G] context and next byte
    discounted: Tensor  # [G] count less discount
    contexts: Tensor  # [C]
    totals: Tensor  # [C] counts of all next bytes
    backoff: Tensor  # [C] what the discounts took away

    def __init__(self, **tensors: Tensor) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    @classmethod
    def empty(cls, ngrams: int, contexts: int) -> _Order:
        return cls(
            ngrams=torch.zeros(ngrams, dtype=torch.int64),
            discounted=torch.zeros(ngrams, dtype=torch.float64),
            contexts=torch.zeros(contexts, dtype=torch.int64),
            totals=torch.zeros(contexts, dtype=torch.float64),
            backoff=torch.zeros(contexts, dtype=torch.float64),
        )

    def forward(self, contexts: Tensor, ngrams: Tensor, shorter: Tensor) -> Tensor:
        """P of the last byte of each n-gram, given what shorter contexts say; contexts are those
        of the n-grams, or broadcast with them."""
        total = _lookup(self.contexts, self.totals, contexts)
        backoff = _lookup(self.contexts, self.backoff, contexts)
        count = _lookup(self.ngrams, self.discounted, ngrams)
        return torch.where(total > 0, (count + backoff * shorter) / total, shorter)


class MarkovModel(CausalModel):
    """P(next byte | the `order` bytes before it), interpolated modified Kneser-Ney.

    The count of each n-gram is lowered by a discount (one for counts of 1, one for 2, one for 3
    and more, from the counts of counts), and what that frees is spread by the model of the next
    shorter context, where an n-gram counts once for each different byte in front of it; the
    shortest rests on the uniform distribution over 256 bytes. Every distribution sums to one.

    It is a Bayesian network of bytes, each of which depends on the `order` before it by one and the
    same table, of which only the n-grams that were seen are kept. Until `fit` it is uniform.

    Source: S. F. Chen and J. Goodman, "An empirical study of smoothing techniques for language
    modeling", 1999, equations 26 to 28.

    Args:
        order: length of the context in bytes, 0 to 6 (an n-gram is kept in one int64); or the
            config of a model whose tensors are loaded then.
    """

    name = "markov"

    def __init__(self, order: int | MarkovConfig = 3) -> None:
        super().__init__()
        self.config = order if isinstance(order, MarkovConfig) else MarkovConfig(order)
        sizes = zip(self.config.ngrams, self.config.contexts, strict=True)
        self.orders = nn.ModuleList(_Order.empty(*size) for size in sizes)

    @property
    def order(self) -> int:
        return self.config.order

    def fit(self, data: Tensor) -> MarkovModel:
        """Count the n-grams of data, bytes as int64 [N]."""
        orders = []
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
            orders.append(
                _Order(
                    ngrams=keys,
                    discounted=counts - discounts,
                    contexts=contexts,
                    totals=zeros.index_add(0, index, counts.double()),
                    backoff=zeros.index_add(0, index, discounts),
                )
            )
        self.orders = nn.ModuleList(orders)
        self.config = MarkovConfig(
            self.order,
            tuple(len(known.ngrams) for known in orders),
            tuple(len(known.contexts) for known in orders),
        )
        return self

    def probabilities(self, data: Tensor) -> Tensor:
        """Return P of each byte of data, int64 [.., N], given those before it; float64 [.., N].

        The first bytes are given fewer than `order` bytes, the very first one none.
        """
        p = torch.full(data.shape, 1 / 256, dtype=torch.float64)
        for length, known in enumerate(self.orders[: data.shape[-1]]):
            grams = _ngrams(data, length + 1)
            p[..., length:] = known(grams >> 8, grams, p[..., length:])
        return p

    def bits_per_byte(self, data: Tensor) -> float:
        """Return the mean of -log2 P over data, int64 [N], but for its first byte.

        The first is left out because a language model, too, starts from a given token.
        """
        return -self.probabilities(data)[1:].log2().mean().item()

    def forward(self, input: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map bytes, int64 [B, T], to ln P of each next one, [B, T, 256], and the state behind
        them: the last bytes, of which `state` holds those before the first."""
        bytes = _joined(state, input)
        return self._next(bytes, input.shape[1]).log(), self._last(bytes)

    def log_prob(
        self, input: Tensor, target: Tensor, state: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """ln P(target) and the most likely bytes, both [B * T], and the state behind input.

        `target`, int64 [B, T], are the bytes that follow those of input.
        """
        logits, state = self(input, state)
        log_prob = logits.gather(-1, target[..., None])
        return log_prob.flatten(), logits.argmax(-1).flatten(), state

    def predict(self, tokens: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        state = self._last(_joined(state, tokens))
        return self._next(state, 1)[:, 0].log(), state

    def network(self, length: int) -> BayesianNetwork:
        """Return the model of the first `length` bytes, whose variables are "0", "1" and so on.

        Its tables are written out, 256^(order + 1) numbers for each variable: that is for an order
        of at most 2, and takes 134 MB for each with that. It can tell what no chain can, such as
        a byte from those on both of its sides.

        Raises:
            ValueError: length < 1, or a table that would be too large.
        """
        names = [str(place) for place in range(length)]
        config = BayesianNetworkConfig(
            dict.fromkeys(names, 256),
            {name: tuple(names[max(i - self.order, 0) : i]) for i, name in enumerate(names)},
        )
        network = BayesianNetwork(config)
        for place, table in enumerate(network.tables):
            count = min(place, self.order)
            keys = torch.arange(256**count)[:, None]
            contexts = (keys >> 8 * torch.arange(count).flip(0)) & 255  # [256^count, count]
            table.copy_(self._next(contexts, 1).view_as(table))
        return network

    def _next(self, bytes: Tensor, count: int) -> Tensor:
        """P of each byte that may follow each of the last `count` of bytes, int64 [B, N]; also of
        that which may be the first, where there are as many; float64 [B, count, 256]."""
        p = torch.full((len(bytes), count, 256), 1 / 256, dtype=torch.float64)
        for length, known in enumerate(self.orders[: bytes.shape[1] + 1]):
            contexts = _ngrams(bytes, length)[:, -count:, None]  # [B, up to count, 1]
            after = p[:, count - contexts.shape[1] :]
            after.copy_(known(contexts, (contexts << 8) + torch.arange(256), after))
        return p

    def _last(self, bytes: Tensor) -> Tensor:
        """As many of the last bytes as are looked at, [B, up to order]."""
        return bytes[:, max(bytes.shape[1] - self.order, 0) :]


def _joined(state: Tensor | None, input: Tensor) -> Tensor:
    return input if state is None else torch.cat([state, input], 1)


def _ngrams(data: Tensor, n: int) -> Tensor:
    """Return every run of n bytes of data, [.., N], as one number, the first byte highest;
    [.., N - n + 1]."""
    length = max(data.shape[-1] - n + 1, 0)
    grams = torch.zeros((*data.shape[:-1], length), dtype=torch.int64)
    for offset in range(n):
        grams = (grams << 8) + data[..., offset : offset + length]
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
    index = torch.searchsorted(keys, wanted.contiguous()).clamp_max(len(keys) - 1)
    return torch.where(keys[index] == wanted, values[index], 0.0)
