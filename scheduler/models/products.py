"""The arithmetic of a model's products, and where the native ones can serve."""

from __future__ import annotations

from typing import Literal

import torch

from scheduler.kernels.native import NativeBuildError, kernels

Mode = Literal["stored", "int4", "int8", "bf16", "f32"]
"""stored: the weights of a GGUF file in their own blocks, activations in 8 bits. int4: weights in groups of 32
with a scale and a minimum each. int8: weights in groups of 64 with a scale each. In all three the activations of
each row are rounded to 8 bits in groups with a scale each, and a group's sum is exact."""

PLAIN_MODES: dict[torch.dtype, Mode] = {torch.float32: "f32", torch.bfloat16: "bf16"}


def obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the native products cannot serve a model of this type here, or None if they can."""
    if device.type != "cpu":
        return f"the native products are for CPU, the model is on {device.type}"
    if dtype not in PLAIN_MODES:
        return f"the native products take float32 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    try:
        kernels()
    except NativeBuildError as error:
        return str(error)
    return None
