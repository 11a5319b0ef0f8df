"""The least HTTP server around openvino-genai's continuous batching: POST /v1/completions and
/v1/chat/completions, streamed.

openvino-genai is a library; this lets it take part in the comparison over the same wire. It runs in the peer's own
virtual environment, and imports nothing of Carousel.

    python openvino_server.py MODEL_FOLDER --port PORT --seats 32
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import threading
import time
from typing import Any

import openvino_genai as genai
from aiohttp import web


class Engine:
    """Steps the pipeline in a thread of its own, and hands each request's tokens to its queue."""

    def __init__(self, folder: str, seats: int, precision: str | None) -> None:
        config = genai.SchedulerConfig()
        config.max_num_seqs = seats
        config.cache_size = 2  # GB
        config.dynamic_split_fuse = True
        hints = {} if precision is None else {"INFERENCE_PRECISION_HINT": precision}
        self.pipeline = genai.ContinuousBatchingPipeline(folder, config, "CPU", hints)
        self.tokenizer = self.pipeline.get_tokenizer()
        self._ids = itertools.count()
        self._live: dict[int, tuple[Any, asyncio.Queue[list[int] | None]]] = {}
        self._lock = threading.Lock()
        self._loop = asyncio.get_running_loop()
        threading.Thread(target=self._run, daemon=True).start()

    def add(self, prompt: str, body: dict[str, Any]) -> asyncio.Queue[list[int] | None]:
        params = genai.GenerationConfig()
        params.max_new_tokens = body["max_tokens"]
        params.eos_token_id = self.tokenizer.get_eos_token_id()
        params.ignore_eos = body.get("ignore_eos", False)
        params.do_sample = body.get("temperature", 1.0) > 0
        if params.do_sample:
            params.temperature = body.get("temperature", 1.0)
            params.rng_seed = body.get("seed", 0)
        queue: asyncio.Queue[list[int] | None] = asyncio.Queue()
        with self._lock:
            number = next(self._ids)
            self._live[number] = (self.pipeline.add_request(number, prompt, params), queue)
        return queue

    def template(self, messages: list[dict[str, str]]) -> str:
        """The prompt of a chat."""
        prompt: str = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        return prompt

    def _run(self) -> None:
        while True:
            if not self.pipeline.has_non_finished_requests():
                time.sleep(0.001)
                continue
            self.pipeline.step()
            with self._lock:
                for number, (handle, queue) in list(self._live.items()):
                    while handle.can_read():
                        for output in handle.read().values():
                            self._loop.call_soon_threadsafe(queue.put_nowait, list(output.generated_ids))
                    if handle.get_status() != genai.GenerationStatus.RUNNING:
                        self._loop.call_soon_threadsafe(queue.put_nowait, None)
                        del self._live[number]


ENGINE = web.AppKey("engine", Engine)


async def complete(request: web.Request) -> web.StreamResponse:
    body = await request.json()
    engine = request.app[ENGINE]
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    is_chat = "messages" in body
    prompt = engine.template(body["messages"]) if is_chat else body["prompt"]
    queue = engine.add(prompt, body)
    count = 0
    while (token_ids := await queue.get()) is not None:
        count += len(token_ids)
        text = engine.tokenizer.decode(token_ids) or " "
        said = {"delta": {"content": text}} if is_chat else {"text": text}
        chunk = {"choices": [{"index": 0, **said, "finish_reason": None}]}
        await response.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
    usage = {"choices": [], "usage": {"prompt_tokens": 0, "completion_tokens": count}}
    await response.write(b"data: " + json.dumps(usage).encode() + b"\n\ndata: [DONE]\n\n")
    return response


async def models(request: web.Request) -> web.Response:
    return web.json_response({"data": [{"id": "model"}]})


async def make_app(folder: str, seats: int, precision: str | None) -> web.Application:
    app = web.Application()
    app[ENGINE] = Engine(folder, seats, precision)
    app.router.add_post("/v1/completions", complete)
    app.router.add_post("/v1/chat/completions", complete)
    app.router.add_get("/v1/models", models)
    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="MODEL_FOLDER", help="a model that optimum-cli exported")
    parser.add_argument("--port", type=int, required=True, help="of 127.0.0.1")
    parser.add_argument("--seats", type=int, default=32, help="sequences at most in a step (default: 32)")
    parser.add_argument("--inference-precision", help="OpenVINO's hint, as f32 (default: what it finds best)")
    args = parser.parse_args()
    app = make_app(args.folder, args.seats, args.inference_precision)
    web.run_app(app, host="127.0.0.1", port=args.port, print=None)


if __name__ == "__main__":
    main()
