"""`carousel generate`: one answer, written as it comes, or explained step by step."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from contextlib import aclosing

from scheduler.client.stream import Delta
from scheduler.config import EngineConfig
from scheduler.sampling_params import SamplingParams
from scheduler.text.tokenizer import Tokenizer
from server.api.explanation import NUM_LIKELIEST
from server.commands.ending import INTERRUPTED, WRONG_USAGE, complain, run_until_signal
from server.commands.flags import ConfigFlags


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `carousel generate`, and the function that runs it."""
    parser.usage = 'carousel generate [options] "prompt"'
    parser.add_argument("prompt", help="What to answer, or with --raw to continue.")
    parser.add_argument(
        "--raw", action="store_true", help="Continue the prompt as it is, without the model's chat template."
    )
    sampling = parser.add_argument_group("sampling options")
    sampling.add_argument(
        "--max-tokens", type=int, default=256, metavar="N", help="Longest answer, in tokens. (default: 256)"
    )
    sampling.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="X",
        help="0 takes the likeliest token each time; 1 draws as the model would. (default: 0)",
    )
    sampling.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="X",
        help="Draw from the likeliest tokens whose probabilities sum to this. (default: 1)",
    )
    sampling.add_argument("--seed", type=int, metavar="N", help="With a seed, the same answer each time.")
    explaining = parser.add_argument_group("options for those who want to know how")
    explaining.add_argument(
        "--explain",
        action="store_true",
        help="Print each step: what goes in and what is in the cache already, the likeliest next tokens, and "
        "which was taken and how.",
    )
    explaining.add_argument(
        "--json", action="store_true", help="With --explain: a JSON object a step, for programs."
    )
    flags = ConfigFlags(parser, EngineConfig)
    parser.set_defaults(run=lambda args: _run(args, flags))


def _run(args: argparse.Namespace, flags: ConfigFlags[EngineConfig]) -> int:
    config = flags.read(args)
    if args.json and not args.explain:
        return complain(args, "--json is for --explain only", status=WRONG_USAGE)
    params = SamplingParams(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
        explain=args.explain,
        logprobs=NUM_LIKELIEST if args.explain else None,
    )
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    from scheduler.client.async_engine import EngineDeadError, EngineStartError

    try:
        finished = run_until_signal(_generate(config, args, params))
    except (EngineStartError, EngineDeadError) as error:
        return complain(args, str(error))
    return 0 if finished else INTERRUPTED


async def _generate(config: EngineConfig, args: argparse.Namespace, params: SamplingParams) -> None:
    """Print the answer to the prompt; with `--raw`, or without a chat template, its continuation.

    Raises `EngineStartError`, `EngineDeadError` and `InvalidRequestError`.
    """
    from scheduler.client.async_engine import AsyncEngine, EngineDeadError

    async with AsyncEngine(config) as engine:
        if args.raw or not engine.tokenizer.chat_template.source:
            prompt_token_ids = engine.tokenizer.encode(args.prompt)
        else:
            prompt_token_ids = engine.tokenizer.apply_chat_template([{"role": "user", "content": args.prompt}])
        show = _shower(engine.tokenizer, prompt_token_ids, args)
        async with aclosing(engine.generate(prompt_token_ids, params, request_id="generate")) as deltas:
            async for delta in deltas:
                show(delta)
                if delta.output.error is not None:
                    raise EngineDeadError(delta.output.error)


def _shower(
    tokenizer: Tokenizer, prompt_token_ids: list[int], args: argparse.Namespace
) -> Callable[[Delta], None]:
    """What prints an answer as its parts come."""
    if not args.explain:
        return _print_text
    from server.commands.explain import JsonSteps, ReadableSteps

    return (JsonSteps if args.json else ReadableSteps)(tokenizer, prompt_token_ids).show


def _print_text(delta: Delta) -> None:
    print(delta.text, end="" if delta.finish_reason is None else "\n", flush=True)
