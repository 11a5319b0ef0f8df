"""What packed numbers of other programs' checkpoints stand for, worked out a second time (see second_reader.py).

Each format is described in files/quantized_checkpoint.py; here the numbers are put where they belong one bit field
at a time, in the order in which a format fills its words.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from scheduler.models.files.checkpoint import CheckpointError

Parts = Mapping[str, Tensor]
"""The tensors of one weight, by the ends of their names."""


def dequantized(name: str, parts: Parts, settings: Mapping[str, Any]) -> Tensor:
    """A weight in float32. Raises `CheckpointError` where nothing says what its numbers are."""
    for end, make in _BY_PART.items():
        if end in parts:
            return make(parts, settings)
    raise CheckpointError(f"{name} is stored in a form that is not read a second time")


def _spread(words: Tensor, bits: int, dim: int, order: Sequence[int] | None = None) -> Tensor:
    """The numbers of `bits` in 32-bit words along `dim`: the lowest bits of a word are the number at order[0]."""
    count = 32 // bits
    shape = list(words.shape)
    shape[dim] *= count
    numbers = torch.empty(shape, dtype=torch.float32)
    for field, place in enumerate(order or range(count)):
        found = torch.bitwise_and(torch.bitwise_right_shift(words.long(), bits * field), 2**bits - 1).float()
        if dim == 0:
            numbers[place::count] = found
        else:
            numbers[:, place::count] = found
    return numbers


def _by_columns(parts: Parts, settings: Mapping[str, Any]) -> Tensor:
    """GPTQ and AWQ: numbers [K, N] with zeros and scales for groups of rows."""
    bits = int(settings.get("bits", 4))
    if settings["quant_method"] == "awq":
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        numbers, zeros = (_spread(parts[part], bits, 1, order) for part in ("qweight", "qzeros"))
    else:
        numbers, zeros = _spread(parts["qweight"], bits, 0), _spread(parts["qzeros"], bits, 1)
        if settings.get("checkpoint_format") != "gptq_v2":
            zeros = zeros + 1
    scales = parts["scales"].float()
    rows, size = len(numbers), int(settings.get("group_size", 128))
    group = [row // (size if size > 0 else rows) for row in range(rows)]
    group = parts["g_idx"].tolist() if "g_idx" in parts else group
    weight = torch.stack([(numbers[row] - zeros[at]) * scales[at] for row, at in enumerate(group)])
    return weight.t().contiguous()


def _weights_settings(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What compressed-tensors says of each group of layers."""
    return [group["weights"] for group in settings.get("config_groups", {}).values() if group.get("weights")]


def _by_rows(parts: Parts, settings: Mapping[str, Any]) -> Tensor:
    """compressed-tensors: numbers [N, K] that have half their range added, or pairs of 4-bit floats."""
    packed = parts["weight_packed"]
    if packed.dtype == torch.uint8:
        return _pairs_of_floats(parts)
    rows, columns = (int(size) for size in parts["weight_shape"])
    stated = [int(each["num_bits"]) for each in _weights_settings(settings) if "num_bits" in each] or [4, 8]
    bits = next(bits for bits in stated if packed.shape[1] == math.ceil(columns / (32 // bits)))
    half = 2 ** (bits - 1)
    numbers = _spread(packed, bits, 1)[:, :columns] - half
    scales = parts["weight_scale"].float().reshape(rows, -1)
    width = columns // scales.shape[1]
    group = [column // width for column in range(columns)]
    group = parts["weight_g_idx"].tolist() if "weight_g_idx" in parts else group
    if "weight_zero_point" in parts:
        zeros = _spread(parts["weight_zero_point"], bits, 0)[:rows] - half
        numbers -= zeros[:, group]
    weight: Tensor = numbers * scales[:, group]
    return weight


def _four_bit_float(code: int) -> float:
    """E2M1: a sign, two bits of an exponent and one of a fraction."""
    exponent, fraction = (code >> 1) & 3, code & 1
    size = fraction / 2 if exponent == 0 else (1 + fraction / 2) * 2 ** (exponent - 1)
    return -size if code & 8 else size


def _halves(data: Tensor) -> Tensor:
    """Of bytes [..., n], the 4-bit floats [..., 2 n], the low bits first."""
    table = torch.tensor([[_four_bit_float(byte & 15), _four_bit_float(byte >> 4)] for byte in range(256)])
    values: Tensor = table[data.long()]
    return values.reshape(*data.shape[:-1], -1)


def _pairs_of_floats(parts: Parts) -> Tensor:
    """NVFP4: a float8 factor for 16 numbers, all divided by one."""
    numbers = _halves(parts["weight_packed"])
    factors = parts["weight_scale"].float() / parts["weight_global_scale"].float().reshape(())
    return (numbers.reshape(*factors.shape, -1) * factors[..., None]).reshape(numbers.shape)


def _scaled(parts: Parts, settings: Mapping[str, Any]) -> Tensor:
    """One factor for all, for a row, or for a block of the size that is stated."""
    weight = parts["weight"].float()
    if "weight_zero_point" in parts:
        weight = weight - parts["weight_zero_point"].float().reshape(-1, 1)
    scale = parts["weight_scale_inv"] if "weight_scale_inv" in parts else parts["weight_scale"]
    scale = scale.float()
    if scale.numel() == 1 or (scale.numel() == len(weight) and scale.shape[0] == len(weight)):
        return weight * scale.reshape(-1, 1)
    stated = [
        settings.get("weight_block_size"),
        *(each.get("block_structure") for each in _weights_settings(settings)),
    ]
    for height, width in filter(None, stated):
        if scale.shape == (math.ceil(weight.shape[0] / height), math.ceil(weight.shape[1] / width)):
            row = torch.arange(weight.shape[0]) // height
            column = torch.arange(weight.shape[1]) // width
            return weight * scale[row][:, column]
    raise CheckpointError(f"nothing says which block each of the factors {tuple(scale.shape)} is for")


def _microscaled(parts: Parts, settings: Mapping[str, Any]) -> Tensor:
    """MXFP4: a power of 2 for 32 numbers."""
    numbers = _halves(parts["_blocks"])
    factors = torch.pow(2.0, parts["_scales"].double() - 127)
    return (numbers * factors[..., None]).flatten(-2).mT.float().contiguous()


def _bitsandbytes(parts: Parts, settings: Mapping[str, Any]) -> Tensor:
    """Indices into a table, the high bits first, times the factor of their block."""
    kind = next(end for end in parts if ".bitsandbytes__" in end)
    state = json.loads(bytes(parts[kind].tolist()))
    absmax = parts["weight.absmax"]
    if "weight.nested_absmax" in parts:
        block = torch.arange(absmax.numel()) // state["nested_blocksize"]
        absmax = (
            parts["weight.nested_quant_map"].float()[absmax.long()] * parts["weight.nested_absmax"].float()[block]
        )
        absmax = absmax + state["nested_offset"]
    codes = parts["weight"].reshape(-1, 1).long()
    numbers = parts["weight.quant_map"].float()[torch.cat((codes // 16, codes % 16), dim=1).reshape(-1)]
    count = math.prod(state["shape"])
    block = torch.arange(count) // state["blocksize"]
    return (numbers[:count] * absmax.float()[block]).reshape(state["shape"])


def _rows_of_bytes(parts: Parts, settings: Mapping[str, Any]) -> Tensor:
    """LLM.int8(): a row's numbers as parts of 127 of its largest."""
    weight: Tensor = parts["weight"].double() * (parts["SCB"].double() / 127).reshape(-1, 1)
    return weight.float()


_BY_PART: dict[str, Callable[[Parts, Mapping[str, Any]], Tensor]] = {
    "qweight": _by_columns,
    "weight_packed": _by_rows,
    "_blocks": _microscaled,
    "weight.absmax": _bitsandbytes,
    "SCB": _rows_of_bytes,
    "weight_scale_inv": _scaled,
    "weight_scale": _scaled,
}
"""By a part that only this form has."""
