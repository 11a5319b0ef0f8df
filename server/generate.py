"""`carousel generate`: one answer, written as it comes."""

from __future__ import annotations

from contextlib import aclosing

from scheduler.async_engine import AsyncEngine, EngineDeadError
from scheduler.config import EngineConfig
from scheduler.request import SamplingParams


async def generate(config: EngineConfig, prompt: str, params: SamplingParams, *, raw: bool) -> None:
    """Print the answer to `prompt`; with `raw`, or without a chat template, its continuation.

    Raises `EngineStartError`, `EngineDeadError` and `InvalidRequestError`.
    """
    async with AsyncEngine(config) as engine:
        if raw or not engine.tokenizer.has_chat_template:
            prompt_token_ids = engine.tokenizer.encode(prompt)
        else:
            prompt_token_ids = engine.tokenizer.apply_chat_template([{"role": "user", "content": prompt}])
        async with aclosing(engine.generate(prompt_token_ids, params, request_id="generate")) as deltas:
            async for delta in deltas:
                print(delta.text, end="", flush=True)
                if delta.error is not None:
                    raise EngineDeadError(delta.error)
        print()
