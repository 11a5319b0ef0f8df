"""The web application: its routes, and the engine that lives as long as it does."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from scheduler.async_engine import AsyncEngine, EngineDeadError
from server.access_log import log_departures, name_response
from server.app_keys import CONFIG, ENGINE, REGISTRY, STARTED
from server.chat import create_chat_completion
from server.completions import create_completion
from server.config import MAX_BODY_BYTES, ServeConfig
from server.errors import answer_errors
from server.generation import check_model
from server.openai_responses import Health, Model, ModelList, json_response


def create_app(config: ServeConfig, engine: AsyncEngine, registry: CollectorRegistry) -> web.Application:
    """The application. It starts the engine when it starts, and stops it at its end."""
    app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[log_departures, answer_errors])
    app[CONFIG] = config
    app[ENGINE] = engine
    app[REGISTRY] = registry
    app[STARTED] = int(time.time())
    app.cleanup_ctx.append(_engine_lifetime)
    app.on_response_prepare.append(name_response)
    app.router.add_post("/v1/completions", create_completion)
    app.router.add_post("/v1/chat/completions", create_chat_completion)
    app.router.add_get("/v1/models", list_models)
    app.router.add_get("/v1/models/{model:.+}", retrieve_model)
    app.router.add_get("/health", health)
    app.router.add_get("/metrics", metrics)
    return app


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
