"""python -m scheduler.core "some text" ["another" ...]: a batch of answers, on plain torch, to put breakpoints in.

Reads a model's folder through transformers alone, and runs the same planning, block pool and sampling as `carousel
serve` does, with the default of every seam. Plain torch's sums depend on how many rows there are, so here an
answer's bits may depend on the batch; the kernels exist so that `carousel serve`'s do not.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import platformdirs
import torch
from transformers import AutoTokenizer

from scheduler.core.attention import AttentionBackend, TorchAttention
from scheduler.core.blocks import BlockPool
from scheduler.core.engine import Engine
from scheduler.core.kv_cache import KVCache
from scheduler.core.model import StepModel
from scheduler.core.policy import FirstComeFirstServed
from scheduler.core.request import Request
from scheduler.core.runner import BlockTables, Runner
from scheduler.core.sampling import Sampling
from scheduler.core.scheduler import Scheduler
from scheduler.core.transformers_model import TransformersModel

BLOCK_SIZE, NUM_SEATS, STEP_TOKENS = 16, 32, 512
CPU = torch.device("cpu")
DEFAULT_MODEL = platformdirs.user_cache_path("carousel") / "models" / "SmolLM2-135M-Instruct"
"""Where the first `carousel serve` leaves it."""


def main() -> int:
    args = _arguments()
    if not (args.model / "config.json").is_file():
        print(f"there is no model in {args.model}: run `carousel serve` once, or give --model", file=sys.stderr)
        return 1
    tokenizer: Any = AutoTokenizer.from_pretrained(args.model)
    prompts = [_token_ids(tokenizer, text, raw=args.raw) for text in args.text]
    max_len = max(map(len, prompts)) + args.max_tokens
    engine = engine_of(TransformersModel(str(args.model)), max_len, tokenizer.eos_token_id, TorchAttention())
    params = Sampling(max_tokens=args.max_tokens, temperature=args.temperature, seed=args.seed)
    sequences = [
        engine.add(Request(request_id=str(number), prompt_token_ids=prompt, params=params))[0]
        for number, prompt in enumerate(prompts)
    ]
    for _ in engine.run():
        pass
    for text, sequence in zip(args.text, sequences, strict=True):
        answer = tokenizer.decode(sequence.token_ids[sequence.num_prompt_tokens :], skip_special_tokens=True)
        print(f"> {text}\n{answer}\n")
    return 0


def engine_of(model: StepModel, max_len: int, eos_token_id: int, backend: AttentionBackend) -> Engine:
    """With a pool that holds the sequences of all seats."""
    num_blocks = NUM_SEATS * -(-max_len // BLOCK_SIZE)
    pool = BlockPool(num_blocks, BLOCK_SIZE)
    model.bind(
        KVCache(
            model.layers,
            backend,
            num_blocks=num_blocks,
            block_size=BLOCK_SIZE,
            dtype=torch.float32,
            device=CPU,
        ),
        max_len,
    )
    scheduler = Scheduler(
        pool,
        FirstComeFirstServed(),
        max_num_seqs=NUM_SEATS,
        max_batched_tokens=STEP_TOKENS,
        max_model_len=max_len,
        eos_token_ids=[eos_token_id],
    )
    tables = BlockTables(1, NUM_SEATS, max_model_len=max_len, block_size=BLOCK_SIZE, device=CPU)
    return Engine(scheduler, Runner(model, tables))


def _token_ids(tokenizer: Any, text: str, *, raw: bool) -> list[int]:
    if raw or not tokenizer.chat_template:
        return list(tokenizer(text)["input_ids"])
    said = [{"role": "user", "content": text}]
    return list(tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=True)["input_ids"])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m scheduler.core", description="A batch of answers, on plain torch.")
    parser.add_argument("text", nargs="+", help="What to answer: each text is a request of its own.")
    parser.add_argument(
        "--raw", action="store_true", help="Continue the texts, without the model's chat template."
    )
    parser.add_argument(
        "--model", type=Path, default=DEFAULT_MODEL, help="A model's folder. (default: %(default)s)"
    )
    parser.add_argument("--max-tokens", type=int, default=64, metavar="N", help="Of each answer. (default: 64)")
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="X", help="0: the likeliest. (default: 0)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="Of what is drawn. (default: 0)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
