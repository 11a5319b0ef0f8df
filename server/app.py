"""The web application: its routes, and the engine that lives as long as it does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from scheduler.async_engine import AsyncEngine, EngineDeadError
from scheduler.messages import StepStats
from server.access_log import log_departures, name_response
from server.admission import tell_limits
from server.app_keys import CONFIG, ENGINE, LEDGER, LIMITS, LIVE, REGISTRY, STARTED, USERS
from server.authentication import authenticate
from server.chat import create_chat_completion
from server.completions import create_completion
from server.config import MAX_BODY_BYTES, ServeConfig
from server.errors import answer_errors
from server.generation import check_model
from server.ledger import Ledger
from server.limits import Limits
from server.live import Live
from server.live_page import end_pages, get_live, get_page, get_page_file, get_settings, live_lifetime
from server.openai_responses import Health, Model, ModelList, json_response
from server.otel import Spans
from server.trace import record_trace
from server.usage import get_usage
from server.users import UserDirectory


def create_app(config: ServeConfig, engine: AsyncEngine, registry: CollectorRegistry) -> web.Application:
    """The application. It starts the engine when it starts, and stops it at its end. Raises `UsersFileError`."""
    app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[log_departures, answer_errors])
    if config.users is not None:
        app[USERS] = UserDirectory(config.users)
        app.middlewares.append(authenticate)
        app.cleanup_ctx.append(_following_of_users)
    if config.otlp_endpoint is not None:
        spans = Spans(config.otlp_endpoint)
        app.middlewares.append(spans.middleware)
        app.cleanup_ctx.append(spans.lifetime)
    app[CONFIG] = config
    app[ENGINE] = engine
    app[LEDGER] = Ledger(config.ledger_file)
    app[LIMITS] = Limits(
        max_queued_requests=config.max_queued_requests, max_queued_tokens=config.max_queued_tokens
    )
    app[LIVE] = Live(engine, with_users=config.users is not None)
    app[REGISTRY] = registry
    app[STARTED] = int(time.time())
    app.cleanup_ctx.extend([_ledger_lifetime, _engine_lifetime, live_lifetime])
    app.on_shutdown.append(end_pages)
    app.on_response_prepare.extend([name_response, tell_limits])
    app.router.add_post("/v1/completions", create_completion)
    app.router.add_post("/v1/chat/completions", create_chat_completion)
    app.router.add_get("/v1/usage", get_usage)
    app.router.add_post("/v1/trace", record_trace)
    app.router.add_get("/v1/models", list_models)
    app.router.add_get("/v1/models/{model:.+}", retrieve_model)
    app.router.add_get("/", get_page)
    app.router.add_get("/page/server.json", get_settings)
    app.router.add_get("/page/{name}", get_page_file)
    app.router.add_get("/live", get_live)
    app.router.add_get("/health", health)
    app.router.add_get("/metrics", metrics)
    return app


async def _following_of_users(app: web.Application) -> AsyncIterator[None]:
    watching = asyncio.create_task(app[USERS].watch())
    yield
    watching.cancel()


async def _ledger_lifetime(app: web.Application) -> AsyncIterator[None]:
    def account(step: StepStats) -> None:
        for user, received in step.users.items():
            app[LEDGER].add(user, engine_seconds=received.seconds)

    app[ENGINE].listeners.append(account)
    async with app[LEDGER]:  # opened before the engine and closed after it, so that nothing it does is missed
        yield


async def _engine_lifetime(app: web.Application) -> AsyncIterator[None]:
    async with app[ENGINE]:
        yield


async def list_models(request: web.Request) -> web.Response:
    return json_response(ModelList([_served_model(request.app)]))


async def retrieve_model(request: web.Request) -> web.Response:
    check_model(request, request.match_info["model"])
    return json_response(_served_model(request.app))


def _served_model(app: web.Application) -> Model:
    return Model(app[CONFIG].model_name, app[STARTED], app[ENGINE].info.max_model_len)


async def health(request: web.Request) -> web.Response:
    """200 while requests can be served; 503 with the reason when the engine is gone."""
    if (reason := request.app[ENGINE].error) is not None:
        raise EngineDeadError(reason)
    return json_response(Health("ok"))


async def metrics(request: web.Request) -> web.Response:
    encoder, content_type = choose_encoder(request.headers.get("Accept", ""))
    return web.Response(body=encoder(request.app[REGISTRY]), headers={"Content-Type": content_type})
