"""That what attention's kernels are compared with is attention, in Triton's interpreter."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from genkernels import triton

pytestmark = pytest.mark.skipif(
    not triton.IS_INTERPRETED, reason="TRITON_INTERPRET=1: not set (make triton-check sets it)"
)
if triton.IS_INTERPRETED:
    from benchmarks import triton_textbook as textbook


@pytest.mark.parametrize("is_causal", [False, True])
def test_textbook(is_causal: bool) -> None:
    H, L, D, block = 2, 70, 16, 32
    torch.manual_seed(0)
    query, key, value, grad = torch.randn(4, H, L, D)
    leaves = [t.double().requires_grad_() for t in (query, key, value)]
    expected = scaled_dot_product_attention(*leaves, is_causal=is_causal)
    grads = torch.autograd.grad(expected, leaves, grad.double())
    output, *found = (torch.full((H, L, D), math.nan) for _ in range(4))
    logsumexp = torch.full((H, L), math.nan)
    scale, log2_e = D**-0.5, math.log2(math.e)
    grid = (math.ceil(L / block), H)
    sizes = {"HEAD_SIZE": D, "HAS_RIGHT": is_causal, "BLOCK_L": block, "BLOCK_S": block}
    strides = (L * D, D, L, L)
    forward, backward_keys, backward_queries = textbook.KERNELS
    forward[grid](query, key, value, output, logsumexp, *strides, scale * log2_e, **sizes)
    torch.testing.assert_close(output.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    tensors = (query, key, value, grad, logsumexp, (grad * output).sum(-1))
    factors = (scale, scale * log2_e)
    backward_keys[grid](*tensors, *found[1:], *strides, *factors, **sizes)
    backward_queries[grid](*tensors, found[0], *strides, *factors, **sizes)
    for a, b in zip(found, grads, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
