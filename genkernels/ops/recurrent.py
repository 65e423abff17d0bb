"""What the ops of every recurrent cell share."""

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

# In the schema of a raw op.
INPUTS = (
    "Tensor input, Tensor hx, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh"
)
GRADIENTS = (
    "Tensor grad_input, Tensor grad_hx, Tensor grad_weight_ih, Tensor grad_weight_hh, "
    "Tensor grad_bias_ih, Tensor grad_bias_hh"
)


def check_layer(
    gates: int,
    op: str,
    input: Tensor,
    hx: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    *,
    batch_sizes: Tensor | None = None,
    resets: Tensor | None = None,
) -> None:
    """Raises where the arguments of a layer of a cell of so many gates do not fit together."""

    def reject(name: str, expected: str, got: object) -> NoReturn:
        raise RuntimeError(f"genkernels.{op}: {name}: expected {expected}, got {got}")

    is_sequence = not op.endswith("_cell") and batch_sizes is None
    if input.dim() != (3 if is_sequence else 2):
        reject("input", f"{3 if is_sequence else 2} dimensions", f"shape {list(input.shape)}")
    if hx.dim() != 2:
        reject("hx", "2 dimensions", f"shape {list(hx.shape)}")
    (B, H), I = hx.shape, input.size(-1)
    if is_sequence and input.size(0) == 0:
        reject("input", "a sequence length larger than 0", f"shape {list(input.shape)}")
    if (bias_ih is None) != (bias_hh is None):
        reject("bias_ih and bias_hh", "both or none", "one")
    shapes: tuple[tuple[str, Tensor | None, tuple[int, ...]], ...] = (
        ("input", None if batch_sizes is not None else input, (*input.shape[:-2], B, I)),
        ("hx", hx, (B, H)),
        ("weight_ih", weight_ih, (gates * H, I)),
        ("weight_hh", weight_hh, (gates * H, H)),
        ("bias_ih", bias_ih, (gates * H,)),
        ("bias_hh", bias_hh, (gates * H,)),
    )
    for name, tensor, shape in shapes:
        if tensor is None:
            continue
        if tensor.shape != shape:
            reject(name, f"shape {list(shape)}", f"{list(tensor.shape)}")
        if tensor.dtype != input.dtype:
            reject(name, f"input's dtype {input.dtype}", tensor.dtype)
        if tensor.device != input.device:
            reject(name, f"input's device {input.device}", tensor.device)
    if batch_sizes is not None:
        is_cpu_int64 = batch_sizes.dtype == torch.int64 and batch_sizes.device.type == "cpu"
        if not is_cpu_int64 or batch_sizes.dim() != 1:
            got = f"{batch_sizes.dtype} on {batch_sizes.device}, shape {list(batch_sizes.shape)}"
            reject("batch_sizes", "an int64 CPU tensor of 1 dimension", got)
        if batch_sizes.size(0) == 0:
            reject("batch_sizes", "a sequence length larger than 0", "shape [0]")
        if resets is not None:
            reject("resets", "None beside batch_sizes", f"shape {list(resets.shape)}")
    if resets is not None:
        if resets.dtype != torch.bool:
            reject("resets", "dtype torch.bool", resets.dtype)
        if resets.shape != input.shape[:2]:
            reject("resets", f"shape {list(input.shape[:2])}", f"{list(resets.shape)}")
        if resets.device != input.device:
            reject("resets", f"input's device {input.device}", resets.device)


def new_rows(input: Tensor, columns: int) -> Tensor:
    return input.new_empty((*input.shape[:-1], columns))


def fake_gradients(
    input: Tensor,
    hx: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    input_grad: bool,
    weight_grad: bool,
) -> tuple[Tensor, ...]:
    def gradient(of: Tensor | None, needed: bool) -> Tensor:
        return input.new_empty(of.shape if of is not None and needed else 0)

    weights = (weight_ih, weight_hh, bias_ih, bias_hh)
    return (
        gradient(input, input_grad),
        gradient(hx, True),
        *(gradient(w, weight_grad) for w in weights),
    )


def or_none(
    gradients: Sequence[Tensor], of: tuple[Tensor | None, ...], needed: list[bool]
) -> list[Tensor | None]:
    return [
        gradient if tensor is not None and need else None
        for gradient, tensor, need in zip(gradients, of, needed, strict=True)
    ]
