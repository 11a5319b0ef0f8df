"""A real server whose engine says what a script says: for the steps of an agent's task.

    python -m tests.clients.scripted_server MODEL STEPS.json

`STEPS.json` is a list of texts. A conversation with tools is answered by the text at the place that its number of
tools' results says, and by the last text after that; one without tools by a title. The chat template and the
tokenizer are the model's own. Prints the address, and serves until it is ended.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any, cast

import msgspec
from aiohttp import web

from scheduler.client.async_engine import AsyncEngine, Delta
from scheduler.core.request import FinishReason
from scheduler.core.step import ChunkResult, SampledToken
from scheduler.models.files.model_source import resolve_model
from scheduler.text.tokenizer import Tokenizer
from scheduler.wire.messages import SequenceOutput
from server.app import create_app
from server.config import ServeConfig
from tests.server.scripted import ScriptedEngine

WINDOW = 32_768
TITLE = "A folder with notes"


class Steps(ScriptedEngine):
    """Answers by how far the task has come."""

    def __init__(self, tokenizer: Tokenizer, steps: Sequence[str]) -> None:
        super().__init__()
        self.info = msgspec.structs.replace(
            self.info, max_model_len=WINDOW, num_blocks=WINDOW // 16, vocab_size=tokenizer.vocab_size
        )
        self.tokenizer = tokenizer
        self._steps = steps

    async def generate(self, *request: object, **options: object) -> AsyncGenerator[Delta, None]:
        prompt = self.tokenizer.decode(cast(list[int], request[0]), skip_special_tokens=False)
        num_results = prompt.count("<tool_response>")
        text = self._steps[min(num_results, len(self._steps) - 1)] if "<tools>" in prompt else TITLE
        tokens: list[int] = self.tokenizer.encode(text, False)
        for place, token in enumerate(tokens):
            await asyncio.sleep(0)
            is_last = place == len(tokens) - 1
            piece = self.tokenizer.decode(tokens[: place + 1])[len(self.tokenizer.decode(tokens[:place])) :]
            result = ChunkResult([SampledToken(token)])
            yield Delta(SequenceOutput("", 0, result, FinishReason.STOP if is_last else None), piece)


async def serve(model: str, steps: Sequence[str]) -> None:
    engine: Any = Steps(Tokenizer(str(resolve_model(model))), steps)
    app = create_app(ServeConfig(model=model), cast(AsyncEngine, engine), engine.registry)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    print(site.name, *runner.addresses[0], flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], json.loads(Path(sys.argv[2]).read_text())))
