"""`vllm`, held to AVX2: it asks torch what the processor has, and hears of nothing beyond that.

It runs in the peer's own virtual environment, and imports nothing of Carousel. All of vLLM's processes, forked or
spawned, begin with what is done here.

    python vllm_avx2.py serve ...
"""

from __future__ import annotations

import importlib

import torch
import torch._inductor.config

for feature in ("avx512", "avx512_bf16", "vnni", "amx_tile", "amx_fp16"):
    setattr(torch.cpu, f"_is_{feature}_supported", lambda: False)
torch._inductor.config.cpp.march = "haswell"

if __name__ == "__main__":
    importlib.import_module("vllm.entrypoints.cli.main").main()
