"""What a server tells those who watch it from outside: JSON logs, spans, traces, and `carousel top`."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import aiohttp
import pytest
from openai import AsyncOpenAI
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.server.serving import Server, carousel
from tests.server.users_server import UsersServer

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
SECRET = "Open sesame and a pinch of salt"


class Collector:
    """An OpenTelemetry collector: keeps the spans that it is sent."""

    def __init__(self) -> None:
        self.requests: list[ExportTraceServiceRequest] = []

    @contextmanager
    def running(self) -> Iterator[str]:
        requests = self.requests

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                requests.append(ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *args: object) -> None: ...

        with HTTPServer(("127.0.0.1", 0), Handler) as server:
            Thread(target=server.serve_forever, daemon=True).start()
            yield f"http://127.0.0.1:{server.server_port}/v1/traces"
            server.shutdown()


async def test_json_logs_spans_and_traces(tmp_path: Path, model_path: str) -> None:
    collector = Collector()
    trace_file = tmp_path / "trace.json"
    flags = ("--log-format", "json", "--trace", str(trace_file), "--metrics-port", "0")
    with collector.running() as endpoint, Server(tmp_path / "log", "--otlp-endpoint", endpoint, *flags) as server:
        async with server.async_client() as client, aiohttp.ClientSession() as session:
            recording = asyncio.create_task(_post(session, f"{server.url}/v1/trace?steps=20"))
            await asyncio.sleep(0.2)
            headers = {"traceparent": f"00-{TRACE_ID}-b7ad6b7169203331-01", "X-Request-Id": "mine"}
            await client.completions.create(
                model="SmolLM2-135M-Instruct",
                prompt=SECRET,
                max_tokens=30,
                extra_headers=headers,
                extra_body={"ignore_eos": True},
            )
            status, events = await recording
            assert status == 200
            steps = [event for event in events if event["ph"] == "X" and event["name"].startswith("step ")]
            assert len(steps) == 20
            assert (await _post(session, f"{server.url}/v1/trace?steps=many"))[0] == 400
            (metrics,) = re.findall(r"^Metrics: (\S+)$", server.log, re.MULTILINE)
            async with session.get(metrics) as response:
                assert (
                    'carousel_user_generation_tokens_total{model="SmolLM2-135M-Instruct",user="anonymous"} 30.0'
                    in (await response.text())
                )
            async with session.get(f"{server.url}/metrics") as response:
                assert response.status == 404
        log = server.log

    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    (access,) = [line for line in lines if line.get("request_id") == "mine"]
    assert (access["status"], access["completion_tokens"], access["path"]) == (200, 30, "/v1/completions")
    assert access["level"] == "INFO"
    loggers = {line["logger"] for line in lines}
    assert "scheduler.models.loading" in loggers, "the engine's process logs JSON too"
    assert SECRET not in log, "what was said is nobody's business"

    assert json.loads(trace_file.read_text())
    assert SECRET not in trace_file.read_text()

    (span,) = [
        span
        for request in collector.requests
        for resource in request.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]
    assert span.trace_id.hex() == TRACE_ID
    attributes = {each.key: each.value for each in span.attributes}
    assert attributes["gen_ai.usage.output_tokens"].int_value == 30
    assert attributes["carousel.request_id"].string_value == "mine"
    assert [event.name for event in span.events] == ["first token"]


async def _post(session: aiohttp.ClientSession, url: str) -> tuple[int, list[dict[str, Any]]]:
    async with session.post(url) as response:
        return response.status, await response.json()


async def test_prompts_are_logged_where_that_is_wanted(users_server: UsersServer) -> None:
    await users_server.ask("carol", {"prompt": SECRET, "max_tokens": 1})
    await users_server.until_logged(f"asked=['{SECRET}']")


async def test_top_shows_who_is_served(server: Server, async_client: AsyncOpenAI) -> None:
    stream = await async_client.completions.create(
        model="SmolLM2-135M-Instruct", prompt="On", max_tokens=900, stream=True, extra_body={"ignore_eos": True}
    )
    await anext(stream)
    started = time.monotonic()
    picture = await asyncio.to_thread(carousel, "top", "--url", server.url, "--once", "--interval", "0.5")
    assert time.monotonic() - started < 60
    await stream.close()
    assert picture.returncode == 0, picture.stderr
    assert "1 of 64 taken" in picture.stdout
    assert "anonymous" in picture.stdout
    assert "tokens generated" in picture.stdout
    assert "0 tokens to be computed" in picture.stdout


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "http://127.0.0.1:9/else"])
def test_top_says_when_there_is_no_server(url: str) -> None:
    failed = carousel("top", "--url", url)
    assert failed.returncode == 1
    assert f"carousel top: cannot read {url}/metrics" in failed.stderr
