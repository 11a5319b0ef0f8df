"""Checkpoints whose weights other programs have quantized: each is made floats again when it is read.

What a format stores for a matrix `X.weight` of N rows and K columns, W:

- `gptq` (Frantar et al., arXiv 2210.17323): X.qweight int32 [K / 8, N], eight 4-bit numbers of a column in each,
  or four of 8 bits, the lowest bits first; X.scales [groups, N]; X.qzeros int32 [groups, N / 8], one less than
  they are where the checkpoint format is not gptq_v2; X.g_idx [K], each column's group. W = scale * (number -
  zero), transposed.
- `awq` (Lin et al., arXiv 2306.00978): X.qweight int32 [K, N / 8] and X.qzeros [groups, N / 8], eight neighbours
  in the order 0 2 4 6 1 3 5 7; X.scales [groups, N]. The same formula.
- `compressed-tensors`: X.weight_packed int32 [N, K / 8], 4-bit numbers that have 8 added, or [N, K / 4], 8-bit
  ones that have 128 added, X.weight_scale [N, groups], X.weight_zero_point; or X.weight in 8 bits, integers or
  floats, with X.weight_scale and perhaps X.weight_zero_point; or NVFP4: X.weight_packed uint8 [N, K / 2], two
  4-bit floats in each, the low bits first, X.weight_scale float8 [N, K / 16] and X.weight_global_scale, which
  divides those.
- `fp8`, `fbgemm_fp8`: X.weight in float8, with X.weight_scale_inv for blocks of rows and columns, or with
  X.weight_scale.
- `mxfp4` (OCP Microscaling Formats 1.0): X_blocks uint8 [..., N, K / 32, 16], two 4-bit floats in each, the low
  bits first, and X_scales uint8 [..., N, K / 32], exponents of 2 that have 127 added. transformers' experts are
  transposed.
- `bitsandbytes` in 4 bits (Dettmers et al., arXiv 2305.14314): X.weight uint8 [N * K / 2, 1], the high bits
  first, each an index into X.weight.quant_map; blocks of numbers share a factor of X.weight.absmax, which may be
  quantized itself. In 8 bits (arXiv 2208.07339): X.weight int8 [N, K] and X.SCB [N], what 127 stands for.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor

from scheduler.models.files.checkpoint import Checkpoint, CheckpointError, SafetensorsCheckpoint, open_checkpoint

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)

FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""What the lower three bits stand for; the fourth is the sign."""

METHODS = ("gptq", "awq", "compressed-tensors", "fp8", "fbgemm_fp8", "mxfp4", "bitsandbytes")

FORMS = {"gptq": ("checkpoint_format", ("gptq", "gptq_v2")), "awq": ("version", ("gemm",))}
"""Of methods that have several: the setting that names it, and those that are read, the usual one first."""

BITS = {"gptq": (4, 8), "awq": (4,)}

BITSANDBYTES = (".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4")

PARTS = (
    *(".qzeros", ".scales", ".g_idx", ".weight_scale", ".weight_scale_inv", ".weight_zero_point"),
    *(
        ".weight_shape",
        ".weight_g_idx",
        ".weight_global_scale",
        ".input_global_scale",
        ".SCB",
        ".weight_format",
        ".input_scale",
        ".input_scale_ub",
        ".activation_scale",
        ".k_scale",
    ),
    *(".v_scale", "_scales", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", *BITSANDBYTES),
)
"""Ends of the names of what is no weight by itself. Scales of activations do not count: these are not rounded."""

Read = Callable[[str], Tensor]


class QuantizedCheckpoint:
    """The weights of a quantized checkpoint, in floats."""

    is_quantized = False

    def __init__(self, stored: SafetensorsCheckpoint, config: Mapping[str, Any]) -> None:
        """`config`: the model's quantization_config. Raises `CheckpointError` for a method that is not read."""
        self._stored = stored
        self._config = config
        self._names = set(stored.names)
        method = config.get("quant_method")
        if method not in METHODS:
            raise CheckpointError(f"its weights are quantized by {method!r}; what is read is {', '.join(METHODS)}")
        if method in BITS and (bits := config.get("bits", 4)) not in BITS[method]:
            known_bits = " and ".join(map(str, BITS[method]))
            raise CheckpointError(f"its weights are quantized by {method} in {bits} bits; {known_bits} are read")
        if method in FORMS:
            setting, known = FORMS[method]
            if (form := str(config.get(setting) or known[0]).lower()) not in known:
                raise CheckpointError(f"its weights are quantized by {method} in a form that is not read: {form}")
        self._read: dict[str, Read] = dict(filter(None, map(self._made_of, stored.names)))
        if all(read == stored.weight for read in self._read.values()):
            raise CheckpointError(f"its config says that its weights are quantized by {method}, and they are not")

    @classmethod
    def open(cls, path: str, config: Mapping[str, Any]) -> Self:
        """That of a folder or a Hugging Face id. Raises `CheckpointError` or OSError."""
        stored = open_checkpoint(path)
        if not isinstance(stored, SafetensorsCheckpoint):
            raise CheckpointError("quantized weights are read from safetensors and GGUF files only")
        return cls(stored, config)

    def _made_of(self, name: str) -> tuple[str, Read] | None:
        """Which weight a stored tensor has the numbers of, and how that is read; None: it is part of another's."""
        if name.endswith(".qweight"):
            is_awq = self._config["quant_method"] == "awq"
            return f"{name.removesuffix('.qweight')}.weight", self._awq if is_awq else self._gptq
        if name.endswith(".weight_packed"):
            return name.removesuffix("_packed"), self._packed
        if name.endswith("_blocks"):
            return name.removesuffix("_blocks"), self._mxfp4
        if any(f"{name}{end}" in self._names for end in BITSANDBYTES):
            return name, self._bitsandbytes
        if name.endswith(".weight") and f"{name.removesuffix('weight')}SCB" in self._names:
            return name, self._rows_of_bytes
        if f"{name}_scale" in self._names or f"{name}_scale_inv" in self._names:
            return name, self._scaled
        if name.endswith(PARTS):
            return None
        if name not in self._stored:
            raise CheckpointError(f"{name} is no floats, and nothing says what its numbers stand for")
        return name, self._stored.weight

    @property
    def names(self) -> list[str]:
        return list(self._read)

    def __contains__(self, name: str) -> bool:
        return name in self._read

    def weight(self, name: str) -> Tensor:
        """In float32 where it was quantized, and otherwise as it is."""
        return self._read[name](name)

    def table(self, name: str) -> Tensor:
        return self.weight(name)

    def _gptq(self, name: str) -> Tensor:
        stem = name.removesuffix(".weight")
        scales = self._raw(f"{stem}.scales").float()
        bits = self._config.get("bits", 4)
        numbers = _numbers(self._raw(f"{stem}.qweight").T, bits).T  # [K, N]
        zeros = _numbers(self._raw(f"{stem}.qzeros"), bits)
        if self._config.get("checkpoint_format") != "gptq_v2":
            zeros = zeros + 1
        size = self._group_size(numbers.shape[0])
        groups = torch.arange(numbers.shape[0]) // size
        if f"{stem}.g_idx" in self._names:
            groups = self._raw(f"{stem}.g_idx").long()
        return (scales[groups] * (numbers - zeros[groups])).T.contiguous()

    def _awq(self, name: str) -> Tensor:
        stem = name.removesuffix(".weight")
        numbers, zeros = (
            _in_awq_order(_numbers(self._raw(f"{stem}.{part}"), 4)) for part in ("qweight", "qzeros")
        )
        groups = torch.arange(numbers.shape[0]) // self._group_size(numbers.shape[0])
        return (self._raw(f"{stem}.scales").float()[groups] * (numbers - zeros[groups])).T.contiguous()

    def _packed(self, name: str) -> Tensor:
        packed = self._raw(f"{name}_packed")
        if packed.dtype == torch.uint8 and f"{name}_global_scale" in self._names:
            return self._nvfp4(name, packed)
        rows, columns = self._raw(f"{name}_shape").tolist()
        forms = [bits for bits in (4, 8) if packed.shape == (rows, -(-columns // (32 // bits)))]
        if packed.dtype != torch.int32 or not forms:
            raise CheckpointError(f"{name} is packed in another form than numbers of 4 or 8 bits in 32")
        (bits,) = forms
        half = 1 << (bits - 1)
        numbers = _numbers(packed, bits)[:, :columns] - half
        scales = self._raw(f"{name}_scale").float().view(rows, -1)
        groups = torch.arange(columns) // (columns // scales.shape[1])
        if f"{name}_g_idx" in self._names:
            groups = self._raw(f"{name}_g_idx").long()
        if f"{name}_zero_point" in self._names:
            zeros = _numbers(self._raw(f"{name}_zero_point").T, bits).T[:rows] - half
            numbers = numbers - zeros[:, groups]
        return numbers * scales[:, groups]

    def _scaled(self, name: str) -> Tensor:
        """8 bits, and a factor for all, for each row, or for blocks of rows and columns."""
        end = "_scale_inv" if f"{name}_scale_inv" in self._names else "_scale"
        weight, scale = self._raw(name).float(), self._raw(f"{name}{end}").float()
        if f"{name}_zero_point" in self._names:
            zeros = self._raw(f"{name}_zero_point").float()
            if zeros.numel() not in (1, len(weight)):
                raise CheckpointError(f"{name} has zero points, which are read of whole rows only")
            weight = weight - zeros.view(-1, 1)
        if scale.numel() == 1:
            return weight * scale.reshape(())
        scale = scale.view(scale.shape[0], -1)
        height, width = self._block_size(name, weight.shape, scale.shape)
        whole = scale.repeat_interleave(height, 0).repeat_interleave(width, 1)
        return weight * whole[: weight.shape[0], : weight.shape[1]]

    def _block_size(self, name: str, weight: torch.Size, scale: torch.Size) -> tuple[int, int]:
        """Rows and columns that share a factor: as stated, or such that a factor is for as many as any other."""
        groups = self._config.get("config_groups") or {}
        stated = [self._config.get("weight_block_size")]
        stated += [(group.get("weights") or {}).get("block_structure") for group in groups.values()]
        for height, width in filter(None, stated):
            if (-(-weight[0] // height), -(-weight[1] // width)) == tuple(scale):
                return height, width
        if weight[0] % scale[0] or weight[1] % scale[1] or (any(stated) and tuple(scale) != (weight[0], 1)):
            raise CheckpointError(
                f"{name} has the shape {list(weight)} and factors {list(scale)}, and its config does not say for "
                "which blocks these are"
            )
        return weight[0] // scale[0], weight[1] // scale[1]

    def _nvfp4(self, name: str, packed: Tensor) -> Tensor:
        factors = self._raw(f"{name}_scale").float() / self._raw(f"{name}_global_scale").float().reshape(())
        return _floats(packed) * factors.repeat_interleave(16, 1)

    def _rows_of_bytes(self, name: str) -> Tensor:
        """bitsandbytes in 8 bits."""
        return self._raw(name).float() * self._raw(f"{name.removesuffix('weight')}SCB").float().unsqueeze(1) / 127

    def _mxfp4(self, name: str) -> Tensor:
        blocks, scales = self._raw(f"{name}_blocks"), self._raw(f"{name}_scales")
        exponents = (scales.int() - 127).unsqueeze(-1)
        return torch.ldexp(_floats(blocks), exponents).flatten(-2).transpose(-1, -2).contiguous()

    def _bitsandbytes(self, name: str) -> Tensor:
        kind = next(end for end in BITSANDBYTES if f"{name}{end}" in self._names)
        state = json.loads(bytes(self._raw(f"{name}{kind}").tolist()))
        data = self._raw(name).flatten()
        numbers = torch.stack((data >> 4, data & 15), dim=1).flatten().long()
        factors = self._raw(f"{name}.absmax")
        if factors.dtype == torch.uint8:
            nested = self._raw(f"{name}.nested_quant_map").float()[factors.long()]
            whole = self._raw(f"{name}.nested_absmax").float().repeat_interleave(state["nested_blocksize"])
            factors = nested * whole[: len(nested)] + state["nested_offset"]
        shape: list[int] = state["shape"]
        values = self._raw(f"{name}.quant_map").float()[numbers][: math.prod(shape)]
        return (values * factors.float().repeat_interleave(state["blocksize"])[: len(values)]).view(shape)

    def _raw(self, name: str) -> Tensor:
        if name not in self._names:
            raise CheckpointError(f"the checkpoint lacks {name}")
        return self._stored.raw(name)

    def _group_size(self, columns: int) -> int:
        size: int = self._config.get("group_size", 128)
        return columns if size == -1 else size


def _numbers(packed: Tensor, bits: int) -> Tensor:
    """[rows, columns] int32 to [rows, 32 / bits * columns], the lowest bits first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return ((packed.int().unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).flatten(-2)


def _floats(packed: Tensor) -> Tensor:
    """Two 4-bit floats of each byte: [..., n] uint8 to [..., 2 n]."""
    halves = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2).long()
    return torch.tensor([*FP4, *(-value for value in FP4)])[halves]


def _in_awq_order(numbers: Tensor) -> Tensor:
    order = torch.tensor([AWQ_ORDER.index(place) for place in range(8)])
    return numbers.view(len(numbers), -1, 8)[:, :, order].flatten(1)


def open_weights(path: str, quantization: Mapping[str, Any] | None) -> Checkpoint | None:
    """The weights of a folder or a Hugging Face id, which are quantized so; None if they are in no format that is
    read here. Raises `CheckpointError`, `GgufError` or OSError."""
    return open_checkpoint(path) if quantization is None else QuantizedCheckpoint.open(path, quantization)
