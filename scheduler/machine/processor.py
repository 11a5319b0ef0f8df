"""Which instructions this processor has, as far as products care, and how to hold everything to fewer.

`CAROUSEL_CPU=avx2` (or any other name below) makes this machine a lesser one: the native kernels are built for it,
the choice of arithmetic follows, and torch's own libraries are held to it by their switches. No torch here: those
switches must be set before it is imported.
"""

from __future__ import annotations

import os
import platform
from functools import cache
from pathlib import Path

VARIABLE = "CAROUSEL_CPU"

FLAGS: dict[str, tuple[str, ...]] = {
    "avx512-bf16": ("-march=x86-64-v4", "-mavx512vnni", "-mavx512bf16"),
    "avx512-vnni": ("-march=x86-64-v4", "-mavx512vnni"),
    "avx512": ("-march=x86-64-v4",),
    "avx2-vnni": ("-march=x86-64-v3", "-mavxvnni"),
    "avx2": ("-march=x86-64-v3",),
    "portable": (),
}
"""Instruction sets from the most to the least, and what tells the compiler of each. Portable is whatever the
compiler takes for the least machine of this kind; on Arm that has NEON."""

_V3 = {"avx2", "fma", "f16c", "bmi1", "bmi2", "movbe"}
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_FEATURES: dict[str, set[str]] = {
    "avx512-bf16": _V4 | {"avx512_vnni", "avx512_bf16"},
    "avx512-vnni": _V4 | {"avx512_vnni"},
    "avx512": _V4,
    "avx2-vnni": _V3 | {"avx_vnni"},
    "avx2": _V3,
    "portable": set(),
}
_LIBRARIES: dict[str, dict[str, str]] = {
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
    "portable": {
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    },
}


class UnknownProcessorError(ValueError):
    """`CAROUSEL_CPU` names no instruction set, or one that this processor lacks."""


@cache
def instruction_set() -> str:
    """The fastest of `FLAGS` that this processor has, or the one that `CAROUSEL_CPU` names."""
    wanted = os.environ.get(VARIABLE, "").lower()
    if not wanted:
        # On Intel's processors a product of bfloat16 takes longer than converting to float32 and multiplying there
        # (`python -m benchmarks.micro products`).
        slow = {"avx512-bf16"} if _cpuinfo("vendor_id") == "GenuineIntel" else set()
        return next(name for name in available() if name not in slow)
    if wanted not in FLAGS:
        raise UnknownProcessorError(f"{VARIABLE}={wanted}: give one of {', '.join(FLAGS)}")
    if wanted not in available():
        raise UnknownProcessorError(f"{VARIABLE}={wanted}: this processor has only {', '.join(available())}")
    return wanted


@cache
def available() -> list[str]:
    """Those of `FLAGS` that this processor has, the best first."""
    features = _features()
    return [name for name, needed in _FEATURES.items() if needed <= features]


def hold_libraries() -> None:
    """Hold torch's libraries to what `CAROUSEL_CPU` names. To be called before torch is imported."""
    wanted = os.environ.get(VARIABLE, "").lower()
    family = "avx2" if wanted.startswith("avx2") else wanted
    for name, value in _LIBRARIES.get(family, {}).items():
        os.environ.setdefault(name, value)


def multiplies_bfloat16() -> bool:
    """Whether bfloat16 is a type to compute in here, rather than only to store."""
    return "avx512-bf16" in available() and instruction_set().startswith("avx512")


def _features() -> set[str]:
    """What the kernel of the operating system says the processor has; nothing where it does not say."""
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return set(_cpuinfo("flags").split()) if is_x86 else set()


def _cpuinfo(field: str) -> str:
    """What it says of the first core, or nothing."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(field)), "")
