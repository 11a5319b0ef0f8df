"""Which kind of processor is measured: the two differ so much that each has a comparison of its own."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

OVERRIDE = "CAROUSEL_CPU"
"""The environment variable that makes Carousel run as if on a lesser processor."""

HELD_TO_AVX2 = {
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "DNNL_MAX_CPU_ISA": "AVX2",
    "OV_CPU_MAX_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "ATEN_CPU_CAPABILITY": "avx2",
}
"""What makes oneDNN, OpenVINO (from a release after 2026.4 on), MKL and ATen do the same."""

_TELLING = ("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")


class ProcessorError(RuntimeError):
    """A processor, or a setting of it, that there is no comparison for."""


@dataclass(frozen=True, slots=True)
class Processor:
    """The processor as it takes part in the comparison."""

    name: str
    cores: int
    instructions: list[str]
    """Of those that matter here, what the processor has."""
    kind: Literal["avx512", "avx2"]
    is_held: bool
    """Whether it could do more than its kind, and is kept from it."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        held = f" held to AVX2 ({OVERRIDE}=avx2)" if self.is_held else ""
        return f"{self.cores} cores of {self.name}{held}"


def processor() -> Processor:
    """This machine's, less what `CAROUSEL_CPU` takes from it. Raises `ProcessorError`."""
    facts: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        facts.setdefault(key.strip(), value.strip())
    flags = facts.get("flags", "").split()
    wanted = os.environ.get(OVERRIDE, "")
    if "avx2" not in flags:
        raise ProcessorError("this processor has neither AVX-512 nor AVX2, and there is no comparison for others")
    if wanted not in ("", "avx2") and not wanted.startswith("avx512"):
        raise ProcessorError(f"{OVERRIDE}={wanted}: peers can be held to avx2 only, or left as they are")
    return Processor(
        name=facts.get("model name", "an unknown processor"),
        cores=len(os.sched_getaffinity(0)),
        instructions=[flag for flag in _TELLING if flag in flags],
        kind="avx512" if "avx512f" in flags and wanted != "avx2" else "avx2",
        is_held=wanted == "avx2" and ("avx512f" in flags or "avx_vnni" in flags),
    )
