"""torch.nn.MultiheadAttention on the fused ops."""

from __future__ import annotations

import functools
from typing import NoReturn

import torch
from torch import Tensor
from torch.nn.functional import dropout, pad

from ..ops import linear, scaled_dot_product_attention
from ..ops.attention import unbind_heads
from ..reference.attention import sum_dtype


class MultiheadAttention(torch.nn.MultiheadAttention):
    """Attention of several heads, each of its own projections of query, key and value, joined by
    one more projection.

    Equivalent to: ``torch.nn.MultiheadAttention(embed_dim, num_heads, ...)``, with the same
    arguments, the same parameters and, for the same seed, the same initial values. A state_dict of
    one loads into the other.

    It runs :func:`genkernels.linear`, once for query, key and value where they are the same tensor
    and twice where key and value are, and :func:`genkernels.scaled_dot_product_attention`, which
    reads the heads where they lie. What differs from PyTorch's: a query whose keys are all hidden
    attends to zeros also where the weights are returned, of which PyTorch's are NaN; dropout draws
    other numbers, unless the weights are returned; nested tensors raise.

    Args:
        embed_dim: features of query and output (E).
        num_heads: heads (H) of E // H features each; E is a multiple of it.
        dropout: the probability with which a weight is dropped, in training. Default 0.
        bias: whether the projections have one. Default True.
        add_bias_kv: one more key and value that are parameters, ``bias_k`` and ``bias_v``; no mask
            hides it. Default False.
        add_zero_attn: one more key and value of zeros; no mask hides it. Default False.
        kdim, vdim: features of key and value. Default None: E.
        batch_first: query, key, value and output are [B, .., E] instead of [.., B, E]. Default
            False.
        device, dtype: of the parameters. Default: PyTorch's.

    Args of ``forward(query, key, value, ...)``:
        query: [L, B, E], [B, L, E] with batch_first, or [L, E] unbatched.
        key, value: of kdim and vdim features; S rows instead of L.
        key_padding_mask: [B, S], unbatched [S]: bool (a key is hidden where **true**), or added to
            the scores. Default None.
        need_weights: return the weights, too. Attention is then plain PyTorch, with memory for
            them all: pass False where they are not used. Default True, as in PyTorch.
        attn_mask: [L, S] or [B * H, L, S] (unbatched [H, L, S]): bool, **true** where a key is
            hidden, or added to the scores. Default None.
        average_attn_weights: the weights' mean over the heads. Default True.
        is_causal: a hint that attn_mask hides the keys after each query. The mask is then not read,
            which spares half of the work, unless the weights are returned, or there is a
            key_padding_mask beside add_bias_kv or add_zero_attn. Default False.

    Returns:
        output: as query; under autocast in autocast's dtype.
        weights: [B, L, S], with average_attn_weights=False [B, H, L, S], unbatched without B; None
            with need_weights=False. In training with dropout, as they were used: partly dropped.

    Raises:
        AssertionError: another number of dimensions or of features, a mask that is neither bool
            nor floating-point, or a nested tensor.
        RuntimeError: another shape or dtype that does not fit; is_causal without attn_mask.
        The message names the argument, and what was expected.

    Source: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, section 3.2.2.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        sizes = self._sizes(query, key, value)
        if is_causal and attn_mask is None:
            raise RuntimeError("MultiheadAttention: is_causal: expected attn_mask beside it")
        is_batched = query.dim() == 3
        more = (self.bias_k is not None) + self.add_zero_attn  # keys that no mask hides
        # PyTorch reads attn_mask beside every key_padding_mask, too; where no keys are added a
        # right hint says the same as the mask, with half of the work.
        if need_weights or (more and key_padding_mask is not None):
            is_causal = False
        given = (None if is_causal else attn_mask, key_padding_mask)
        masks = self._masks(*given, sizes, is_batched)
        if more:
            masks = [pad(mask, (0, more)) for mask in masks]
        mask = _joined(masks)

        q, k, v = map(self._of_heads, self._projected(query, key, value))  # [B, H, L or S, D]
        if more:
            k, v = self._with_more(k, self.bias_k), self._with_more(v, self.bias_v)
        dropout_p = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            # They take the scores' product and softmax; the rest costs less than the fused op, and
            # rounds as PyTorch does.
            weights = dropout(_weights(q, k, mask), dropout_p)
            output = weights @ v
            if average_attn_weights:
                weights = weights.mean(1)
            if not is_batched:
                weights = weights.squeeze(0)
        else:
            output = scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal)
        if not is_batched:
            output = output.squeeze(0).transpose(0, 1)
        else:
            output = output.transpose(1, 2) if self.batch_first else output.permute(2, 0, 1, 3)
        return linear(output.flatten(-2), self.out_proj.weight, self.out_proj.bias), weights

    def _sizes(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[int, int, int]:
        """B, L and S, of inputs that fit."""
        inputs = {"query": query, "key": key, "value": value}
        for name, tensor, features in zip(
            inputs, inputs.values(), (self.embed_dim, self.kdim, self.vdim), strict=True
        ):
            if tensor.is_nested:
                _reject(AssertionError, name, "a padded tensor", "a nested one")
            if tensor.dim() != query.dim() or tensor.dim() not in (2, 3):
                expected = "2 or 3 dimensions" if tensor is query else f"{query.dim()} dimensions"
                _reject(AssertionError, name, expected, f"shape {list(tensor.shape)}")
            if tensor.size(-1) != features:
                expected = f"shape {[*tensor.shape[:-1], features]}"
                # Of PyTorch's own it is the product that says so.
                is_of_product = self.in_proj_weight is not None and key.shape == value.shape
                error = RuntimeError if is_of_product and name != "query" else AssertionError
                _reject(error, name, expected, list(tensor.shape))
        if value.shape[:-1] != key.shape[:-1]:
            expected = f"shape {[*key.shape[:-1], self.vdim]}, of as many rows as key"
            _reject(AssertionError, "value", expected, list(value.shape))
        if query.dim() == 2:
            return 1, query.size(0), key.size(0)
        batch_dim = 0 if self.batch_first else 1
        if key.size(batch_dim) != query.size(batch_dim):
            expected = f"a batch of {query.size(batch_dim)} as query has it"
            _reject(RuntimeError, "key", expected, f"shape {list(key.shape)}")
        return query.size(batch_dim), query.size(1 - batch_dim), key.size(1 - batch_dim)

    def _masks(
        self,
        attn_mask: Tensor | None,
        key_padding_mask: Tensor | None,
        sizes: tuple[int, int, int],
        is_batched: bool,
    ) -> list[Tensor]:
        """Those that there are, as [B or 1, H or 1, L or 1, S]."""
        (B, L, S), H, masks = sizes, self.num_heads, []
        if attn_mask is not None:
            dims = attn_mask.dim()
            shape = [L, S] if dims == 2 else [B * H, L, S]
            error = RuntimeError if dims == 2 or (dims == 3 and is_batched) else AssertionError
            _check_mask("attn_mask", attn_mask, shape, error)
            masks.append(attn_mask.unflatten(0, (B, H)) if dims == 3 else attn_mask[None, None])
        if key_padding_mask is not None:
            shape = [B, S] if is_batched else [S]
            _check_mask("key_padding_mask", key_padding_mask, shape, AssertionError)
            masks.append(key_padding_mask.view(B, 1, 1, S))
        return masks

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Query, key and value as [.., H, D]: views of as few products as there are tensors."""
        E, bias = self.embed_dim, self.in_proj_bias
        inputs, sizes = [query, key, value], [E, E, E]
        if self.in_proj_weight is None:
            weights = [self.q_proj_weight, self.k_proj_weight, self.v_proj_weight]
        elif query is key is value:
            inputs, sizes, weights = [query], [3 * E], [self.in_proj_weight]
        else:
            if key is value:
                inputs, sizes = [query, key], [E, 2 * E]
            weights = self.in_proj_weight.split(sizes)
        biases = [bias] * len(sizes) if bias is None or len(sizes) == 1 else bias.split(sizes)
        parts: list[Tensor] = []
        for product in map(linear, inputs, weights, biases):
            parts += unbind_heads(product.unflatten(-1, (-1, self.num_heads, self.head_dim)))
        return parts

    def _of_heads(self, part: Tensor) -> Tensor:
        """[.., H, D] as [B, H, L, D]."""
        if part.dim() == 3:
            return part.transpose(0, 1).unsqueeze(0)
        return part.transpose(1, 2) if self.batch_first else part.permute(1, 2, 0, 3)

    def _with_more(self, part: Tensor, bias: Tensor | None) -> Tensor:
        B, H, _, D = part.shape
        rows = [part]
        if bias is not None:
            rows.append(bias.view(1, H, 1, D).expand(B, -1, -1, -1))
        if self.add_zero_attn:
            rows.append(part.new_zeros(B, H, 1, D))
        return torch.cat(rows, 2)  # [B, H, S + 1 or 2, D]


def _reject(error: type[Exception], name: str, expected: str, got: object) -> NoReturn:
    raise error(f"MultiheadAttention: {name}: expected {expected}, got {got}")


def _check_mask(name: str, mask: Tensor, shape: list[int], error: type[Exception]) -> None:
    if mask.dtype != torch.bool and not mask.is_floating_point():
        _reject(AssertionError, name, "a bool or floating-point dtype", mask.dtype)
    if list(mask.shape) != shape:
        _reject(error, name, f"shape {shape}", list(mask.shape))


def _joined(masks: list[Tensor]) -> Tensor | None:
    """The attn_mask of the op, where a bool one is true where a key takes part."""
    if not masks:
        return None
    if all(mask.dtype == torch.bool for mask in masks):
        return ~functools.reduce(torch.logical_or, masks)
    return functools.reduce(
        torch.add,
        (torch.where(m, -torch.inf, 0.0) if m.dtype == torch.bool else m for m in masks),
    )


def _weights(query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
    """The softmax of the scores, [B, H, L, S]; zeros of a query without keys. Not of the op's
    logsumexp: subtracted from large scores, one number leaves probabilities no digits."""
    dtype = sum_dtype(query)
    scores = query.size(-1) ** -0.5 * query.to(dtype) @ key.to(dtype).mT
    if mask is None:
        return scores.softmax(-1).to(query.dtype)
    added = mask if mask.is_floating_point() else torch.where(mask, 0.0, -torch.inf)
    is_empty = (added == -torch.inf).all(-1, keepdim=True)
    scores = (scores + added).masked_fill(is_empty, 0)
    return scores.softmax(-1).masked_fill(is_empty, 0).to(query.dtype)
