"""Same bits and right tokens, with the default model, in every build and mode.

    python -m benchmarks.prove              # all; a quarter of an hour on two quiet cores
    python -m benchmarks.prove --cpu avx2 --modes int8 stored

Same bits: the tokens and log-probabilities of each request, run alone, from the prefix cache, among others, in
small chunks, and through preemption. Right tokens: in float32, greedily, what transformers answers from the same
weights; where its two best logits are a tie, either. The exit status is 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.builds import add_cpu_flag, in_build, in_each_build
from scheduler.config import EngineConfig
from scheduler.core.request import Request
from scheduler.core.step import TokenLogprobs
from scheduler.models.checks.quantization import TEXT
from scheduler.models.files.checkpoint import gguf_file
from scheduler.models.files.model_source import resolve_model
from scheduler.models.memory import bytes_per_block
from scheduler.process.engine_core import EngineCore
from scheduler.sampling_params import SamplingParams
from scheduler.text.tokenizer import Tokenizer

MODES: dict[str, dict[str, str]] = {
    "float32": {"dtype": "float32", "quantization": "none"},
    "bfloat16": {"dtype": "bfloat16", "quantization": "none"},
    "int8": {"quantization": "int8"},
    "int4": {"quantization": "int4"},
    "stored": {"quantization": "stored"},
}
WAYS = ("cached", "among others", "chunked", "preempted")
LENGTHS = (3, 180, 40, 90, 25, 120)
WATCHED = 3
"""The prompt that is run alone."""
NUM_TOKENS = 40
FEW_BLOCKS = 38
"""Of 16 tokens: the prompts fit with a block to spare for each, and with their answers they fill 46."""
TIE = 1e-4
PARAMS = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, seed=0, logprobs=5)

Verdicts = dict[str, str]
"""By way, or "exact": empty if all is well, or what is wrong."""


@dataclass(frozen=True, slots=True)
class Answer:
    """All that one request was given."""

    tokens: list[int]
    logprobs: list[TokenLogprobs]
    prompt_logprobs: list[TokenLogprobs]


def prompts(path: str) -> list[list[int]]:
    """Pieces of a book, no two alike."""
    book = Tokenizer(path).encode(TEXT.read_text())
    return [book[number * 300 : number * 300 + length] for number, length in enumerate(LENGTHS)]


def answers(
    core: EngineCore, prompts: list[list[int]], params: SamplingParams = PARAMS
) -> tuple[list[Answer], int]:
    """Run all prompts together; their answers, and how many preemptions there were."""
    result = [Answer([], [], []) for _ in prompts]
    num_preemptions = 0
    for number, prompt in enumerate(prompts):
        core.add(Request(request_id=str(number), prompt_token_ids=prompt, params=params))
    while core.has_work:
        outputs = core.step()
        assert outputs.step is not None
        num_preemptions += outputs.step.num_preemptions
        for output in outputs.outputs:
            if output.error is not None:
                raise RuntimeError(output.error)
            result[int(output.request_id)].tokens.extend(output.token_ids)
            result[int(output.request_id)].logprobs.extend(output.result.logprobs)
            result[int(output.request_id)].prompt_logprobs.extend(output.result.scored)
    return result, num_preemptions


def prove(mode: str, path: str, reference: list[dict[str, Any]]) -> Verdicts:
    """All of it, in this process' build."""

    def engine(**knobs: Any) -> EngineCore:
        return EngineCore(EngineConfig(**{"kv_cache_memory": "256MiB", **MODES[mode], **knobs}), path)

    def difference(got: list[Answer], expected: list[Answer]) -> str:
        differing = [number for number, pair in enumerate(zip(got, expected, strict=True)) if pair[0] != pair[1]]
        return f"differs in {len(differing)} of {len(got)}" if differing else ""

    texts = prompts(path)
    core = engine()
    alone, _ = answers(core, [texts[WATCHED]])
    cached, _ = answers(core, [texts[WATCHED]])
    together, _ = answers(core, texts)
    chunked, _ = answers(engine(max_batched_tokens=16), texts)
    block = bytes_per_block(core.model.layers, 16, getattr(torch, core.info.kv_cache_dtype))
    squeezed, num_preemptions = answers(engine(kv_cache_memory=FEW_BLOCKS * block, max_model_len=256), texts)
    verdicts = {
        "cached": difference(cached, alone),
        "among others": difference([together[WATCHED]], alone),
        "chunked": difference(chunked, together),
        "preempted": difference(squeezed, together) if num_preemptions else "nothing was preempted",
    }
    if mode == "float32":
        verdicts["exact"] = next(filter(None, map(_wrong, together, reference)), "")
    return verdicts


def _wrong(answer: Answer, expected: dict[str, Any]) -> str:
    """What is wrong before the first tie."""
    for place, (token, right, margin) in enumerate(
        zip(answer.tokens, expected["tokens"], expected["margins"], strict=True)
    ):
        if token != right:
            return "" if margin < TIE else f"token {place}: {token}, not {right} (margin {margin:.2g})"
    return ""


def transformers_answers(path: str) -> list[dict[str, Any]]:
    """Greedy answers of the same weights in float32, each prompt alone, and the two best logits' distances."""
    from transformers import AutoModelForCausalLM

    file = gguf_file(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype="float32", gguf_file=file.name if file else None)
    found = []
    for prompt in tqdm(prompts(path), desc="transformers", unit="prompt", leave=False):
        output = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=NUM_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        best = torch.cat(output.logits).float().topk(2, dim=-1).values
        tokens = output.sequences[0, len(prompt) :].tolist()
        found.append({"tokens": tokens, "margins": (best[:, 0] - best[:, 1]).tolist()})
    return found


def report(found: dict[str, dict[str, Verdicts]]) -> bool:
    """Print the table; whether all is well."""
    columns = (*WAYS, "exact")
    print(f"{'build':<13}{'mode':<10}" + "".join(f"{column:<14}" for column in columns))
    complaints = []
    for cpu, modes in found.items():
        for mode, verdicts in modes.items():
            words = {column: "DIFFERS" if verdicts.get(column) else "same" for column in columns}
            if "exact" not in verdicts:
                words["exact"] = "-"
            print(f"{cpu:<13}{mode:<10}" + "".join(f"{words[column]:<14}" for column in columns))
            complaints += [f"{cpu}, {mode}, {way}: {wrong}" for way, wrong in verdicts.items() if wrong]
    print("\n".join(complaints) or "Nothing differs.")
    return not complaints


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_cpu_flag(parser)
    parser.add_argument(
        "--modes", nargs="+", choices=list(MODES), default=list(MODES), metavar="MODE",
        help=f"of {', '.join(MODES)} (default: all)",
    )  # fmt: skip
    parser.add_argument("--here", action="store_true", help="in this process and build only, printed as JSON")
    parser.add_argument("--reference", type=Path, help="transformers' answers; with --here, none: find them")
    args = parser.parse_args()
    path = resolve_model(EngineConfig().model)
    if args.here:
        print(json.dumps(_here(path, args.modes, args.reference)))
        return 0
    with tempfile.TemporaryDirectory(prefix="carousel-prove-") as folder:
        file = Path(folder) / "reference.json"
        file.write_text(json.dumps(in_build("benchmarks.prove", None, ["--here"])))
        arguments = ["--here", "--reference", str(file), "--modes", *args.modes]
        found = dict(in_each_build("benchmarks.prove", args.cpu, arguments))
    return 0 if report(found) else 1


def _here(path: str, modes: Sequence[str], reference: Path | None) -> Any:
    if reference is None:
        return transformers_answers(path)
    expected = json.loads(reference.read_text())
    return {mode: prove(mode, path, expected) for mode in tqdm(modes, desc="proving", unit="mode", leave=False)}


if __name__ == "__main__":
    sys.exit(main())
