"""The web application: its routes, and the engine that lives as long as it does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

from aiohttp import web
from prometheus_client import CollectorRegistry

from scheduler.client.async_engine import AsyncEngine
from scheduler.wire.messages import StepStats
from server.api import llama_cpp
from server.api.chat import create_chat_completion
from server.api.completions import create_completion
from server.api.embeddings import create_embeddings
from server.api.health import live, ready
from server.api.messages_api.endpoint import count_tokens, create_message
from server.api.models import (
    OTHER_MODELS,
    STARTED,
    get_load,
    get_version,
    list_models,
    retrieve_model,
)
from server.api.ollama import endpoint as ollama
from server.api.reading import UNKNOWN
from server.api.responses_api.endpoint import create_response, delete_response, get_response, list_input_items
from server.api.responses_api.recent import RECENT, RecentItems
from server.api.responses_api.store import RESPONSES, ResponseStore, store_lifetime
from server.api.tokens import describe_tokenizer, detokenize, tokenize
from server.api.trace import AT_ONCE, TRACES, record_trace
from server.api.usage import get_usage
from server.app_keys import BACKGROUND_LIMITS, CONFIG, ENGINE, LEDGER, LIMITS, USERS
from server.batches.batch_endpoints import cancel_batch, create_batch, get_batch, list_batches
from server.batches.file_endpoints import delete_file, get_file, get_file_content, list_files, upload_file
from server.batches.runner import batches_lifetime, owner_of
from server.batches.store import BATCHES, BatchStore
from server.config import ServeConfig
from server.http.access_log import log_departures
from server.http.admission import tell_limits
from server.http.authentication import authenticate
from server.http.body import BODIES, BodyRoom
from server.http.cors import CrossOrigin
from server.http.draining import DRAINING, Draining
from server.http.errors import answer_errors
from server.http.guard import guard
from server.http.loop_watch import EventLoopWatch
from server.http.metrics import add_metrics, without_names
from server.http.protocol import refuse_expectations
from server.http.record import name_response
from server.http.spans import Spans
from server.http.turnstile import Turnstile
from server.http.worker import TURNSTILE, WORKER, new_worker, worker_lifetime
from server.live.broadcaster import Live
from server.live.handlers import LIVE, end_pages, get_live, get_page, get_page_file, get_settings, live_lifetime
from server.once import Once
from server.openapi import add_specification, get_specification
from server.users.directory import UserDirectory
from server.users.ledger import Ledger
from server.users.limits import Limits


def create_app(config: ServeConfig, engine: AsyncEngine, registry: CollectorRegistry) -> web.Application:
    """The application. It starts the engine when it starts, and stops it at its end. Raises `UsersFileError` and
    `StoreError`."""
    checks = guard(config.host, config.allowed_hosts, has_keys=config.users is not None)
    app = web.Application(middlewares=[log_departures, answer_errors, checks])
    if config.cors_origins is not None:
        cross_origin = CrossOrigin(config.cors_origins)
        app.middlewares.append(cross_origin.middleware)
        app.on_response_prepare.append(cross_origin.on_prepare)
    if config.users is not None:
        app[USERS] = UserDirectory(config.users)
        app.middlewares.append(authenticate)
        app.cleanup_ctx.append(_following_of_users)
    if config.otlp_endpoint is not None:
        spans = Spans(config.otlp_endpoint)
        app.middlewares.append(spans.middleware)
        app.cleanup_ctx.append(spans.lifetime)
    app[DRAINING] = Draining()
    app.middlewares.append(app[DRAINING].middleware)
    app[CONFIG] = config
    app[ENGINE] = engine
    app[LEDGER] = Ledger(config.ledger_file)
    app[LIMITS] = Limits(
        max_queued_requests=config.max_queued_requests, max_queued_tokens=config.max_queued_tokens
    )
    app[BACKGROUND_LIMITS] = app[LIMITS].apart()
    if config.store is not None:
        app[RESPONSES] = ResponseStore(config.store)
        app.cleanup_ctx.append(store_lifetime)
    if config.batches is not None:
        app[BATCHES] = BatchStore(config.batches)
    app[LIVE] = Live(engine, with_users=config.users is not None)
    app[STARTED] = int(time.time())
    app[OTHER_MODELS] = Once()
    app[UNKNOWN] = Once()
    app[RECENT] = RecentItems()
    add_specification(app)
    app[WORKER] = new_worker()
    app[TURNSTILE] = Turnstile()
    app[BODIES] = BodyRoom()
    app[TRACES] = asyncio.Semaphore(AT_ONCE)
    app.cleanup_ctx.extend([_ledger_lifetime, _engine_lifetime, live_lifetime, worker_lifetime])
    if config.batches is not None:
        app.cleanup_ctx.append(batches_lifetime)  # after the engine's: it ends before that does
    app.cleanup_ctx.append(EventLoopWatch(registry).lifetime)
    app.on_shutdown.append(end_pages)
    app.on_response_prepare.extend([name_response, tell_limits])
    add_routes(app.router, "")
    if config.root_path:
        add_routes(app.router, config.root_path)
        app.router.add_get(config.root_path, get_page)
    if config.metrics_port is None:
        add_metrics(app, registry if config.users is None else without_names(registry))
    return app


def add_routes(router: web.UrlDispatcher, root: str) -> None:
    router.add_post(f"{root}/v1/completions", create_completion, expect_handler=refuse_expectations)
    router.add_post(f"{root}/v1/chat/completions", create_chat_completion, expect_handler=refuse_expectations)
    router.add_post(f"{root}/v1/embeddings", create_embeddings, expect_handler=refuse_expectations)
    router.add_post(f"{root}/v1/responses", create_response, expect_handler=refuse_expectations)
    router.add_get(f"{root}/v1/responses/{{id}}", get_response)
    router.add_delete(f"{root}/v1/responses/{{id}}", delete_response)
    router.add_get(f"{root}/v1/responses/{{id}}/input_items", list_input_items)
    router.add_post(f"{root}/v1/messages", create_message, expect_handler=refuse_expectations)
    router.add_post(f"{root}/v1/messages/count_tokens", count_tokens, expect_handler=refuse_expectations)
    router.add_post(f"{root}/v1/files", upload_file, expect_handler=refuse_expectations)
    router.add_get(f"{root}/v1/files", list_files)
    router.add_get(f"{root}/v1/files/{{id}}", get_file)
    router.add_delete(f"{root}/v1/files/{{id}}", delete_file)
    router.add_get(f"{root}/v1/files/{{id}}/content", get_file_content)
    router.add_post(f"{root}/v1/batches", create_batch, expect_handler=refuse_expectations)
    router.add_get(f"{root}/v1/batches", list_batches)
    router.add_get(f"{root}/v1/batches/{{id}}", get_batch)
    router.add_post(f"{root}/v1/batches/{{id}}/cancel", cancel_batch, expect_handler=refuse_expectations)
    ollama.add_routes(router, root)
    llama_cpp.add_routes(router, root)
    router.add_get(f"{root}/v1/usage", get_usage)
    router.add_post(f"{root}/v1/trace", record_trace, expect_handler=refuse_expectations)
    router.add_get(f"{root}/v1/models", list_models)
    router.add_get(f"{root}/v1/models/{{model:.+}}", retrieve_model)
    router.add_post(f"{root}/tokenize", tokenize, expect_handler=refuse_expectations)
    router.add_post(f"{root}/detokenize", detokenize, expect_handler=refuse_expectations)
    router.add_get(f"{root}/tokenizer_info", describe_tokenizer)
    router.add_get(f"{root}/version", get_version)
    router.add_get(f"{root}/load", get_load)
    router.add_get(f"{root}/openapi.json", get_specification)
    router.add_get(f"{root}/", get_page)
    router.add_get(f"{root}/page/server.json", get_settings)
    router.add_get(f"{root}/page/{{name}}", get_page_file)
    router.add_get(f"{root}/live", get_live)
    router.add_get(f"{root}/health/live", live)
    router.add_get(f"{root}/health/ready", ready)
    router.add_get(f"{root}/health", ready)
    router.add_get(f"{root}/ping", ready)
    router.add_post(f"{root}/ping", ready, expect_handler=refuse_expectations)


async def _following_of_users(app: web.Application) -> AsyncIterator[None]:
    watching = asyncio.create_task(app[USERS].watch())
    yield
    watching.cancel()


async def _ledger_lifetime(app: web.Application) -> AsyncIterator[None]:
    def account(step: StepStats) -> None:
        for user, received in step.users.items():
            app[LEDGER].add(owner_of(user), engine_seconds=received.seconds)

    app[ENGINE].listeners.append(account)
    async with app[LEDGER]:  # opened before the engine and closed after it, so that nothing it does is missed
        yield


async def _engine_lifetime(app: web.Application) -> AsyncIterator[None]:
    async with app[ENGINE]:
        yield
