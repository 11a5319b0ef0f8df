"""OpenTelemetry: one span for each generation, a child of the caller's `traceparent`. An optional extra."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from server.app_keys import CONFIG, USER
from server.http.record import record_of

GENERATIONS = frozenset({"/v1/completions", "/v1/chat/completions"})


class OtelMissingError(RuntimeError):
    """OpenTelemetry is not installed; the message says how to install it."""


class Spans:
    """Sends spans to an OTLP endpoint over HTTP, in batches, from a thread of its own.

    The attributes are those of OpenTelemetry's conventions for generative AI, where there is one.
    """

    def __init__(self, endpoint: str) -> None:
        try:
            from opentelemetry import trace
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            raise OtelMissingError(
                f"--otlp-endpoint needs the packages opentelemetry-sdk and opentelemetry-exporter-otlp-proto-http "
                f"({error})"
            ) from error
        self._api: Any = trace
        self._provider = TracerProvider(resource=Resource.create({"service.name": "carousel"}))
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
        self._tracer = self._provider.get_tracer("carousel")
        self._propagator = TraceContextTextMapPropagator()

    async def lifetime(self, app: web.Application) -> AsyncIterator[None]:
        """For `cleanup_ctx`: what has not been sent at the end is sent then."""
        yield
        await asyncio.to_thread(self._provider.shutdown)

    @property
    def middleware(self) -> Middleware:
        @web.middleware
        async def follow(request: web.Request, handler: Handler) -> web.StreamResponse:
            if request.path not in GENERATIONS:
                return await handler(request)
            with self._tracer.start_as_current_span(
                f"{request.method} {request.path}",
                context=self._propagator.extract({name.lower(): value for name, value in request.headers.items()}),
                kind=self._api.SpanKind.SERVER,
            ) as span:
                started = time.time_ns()
                try:
                    response = await handler(request)
                    span.set_attribute("http.response.status_code", response.status)
                    return response
                finally:
                    self._describe(span, request, started)

        return follow

    def _describe(self, span: Any, request: web.Request, started: int) -> None:
        record = record_of(request)
        span.set_attribute("gen_ai.request.model", request.app[CONFIG].model_name)
        span.set_attribute("gen_ai.response.id", record.response_id)
        span.set_attribute("gen_ai.usage.input_tokens", record.prompt_tokens)
        span.set_attribute("gen_ai.usage.output_tokens", record.completion_tokens)
        span.set_attribute("carousel.cached_tokens", record.cached_tokens)
        span.set_attribute("carousel.request_id", record.request_id)
        if (user := request.get(USER)) is not None:
            span.set_attribute("enduser.id", user.name)
        if record.ttft is not None:
            span.add_event("first token", timestamp=started + round(1e9 * record.ttft))
