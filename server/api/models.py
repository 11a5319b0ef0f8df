"""What is served here, and how it is: the models by their names, the version, the load."""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from importlib.metadata import version

import msgspec
from aiohttp import web

from scheduler.wire.messages import EngineInfo
from server.api.completion_objects import Model, ModelList
from server.app_keys import CONFIG, ENGINE
from server.http.errors import ApiError
from server.http.json import json_response
from server.once import Once

STARTED = web.AppKey("started", int)
"""Unix time."""


OTHER_MODELS = web.AppKey("other_models", Once)
"""The names of models that were asked for and are none of this one's."""

logger = logging.getLogger(__name__)


class Version(msgspec.Struct, frozen=True):
    version: str


class Load(msgspec.Struct, frozen=True):
    server_load: int
    """Requests that are being answered or wait."""


def check_model(app: web.Application, model: str | None) -> None:
    """A request may name the served model, by any of its names, or none. Raises `ApiError` for another name."""
    served = app[CONFIG].model_names
    if model and model not in served:
        raise ApiError(
            404,
            f"the model {model!r} is not served here; {served[0]!r} is",
            param="model",
            code="model_not_found",
        )


def served_model(app: web.Application, model: str | None) -> str:
    """The name of the model that answers a request for `model`. Raises `ApiError` where another name than its own
    is refused."""
    config = app[CONFIG]
    if not model:
        return config.model_name
    if model in config.model_names:
        return model
    if config.unknown_models == "refuse":
        check_model(app, model)
    if app[OTHER_MODELS].is_new(model):
        logger.warning(
            "requests for the model %s, which is not here, are answered by %s",
            ascii(model[:100]),
            config.model_name,
        )
    return config.model_name


def longest_sequence(info: EngineInfo) -> int:
    """Tokens that prompt plus answer can have at most."""
    return min(info.max_model_len, info.num_blocks * info.block_size)


async def list_models(request: web.Request) -> web.Response:
    names = request.app[CONFIG].model_names
    return json_response(ModelList([_model(request.app, name) for name in names], names[0], names[-1]))


async def retrieve_model(request: web.Request) -> web.Response:
    name = request.match_info["model"]
    check_model(request.app, name)
    return json_response(_model(request.app, name))


def _model(app: web.Application, name: str) -> Model:
    started, longest = app[STARTED], app[ENGINE].info.max_model_len
    return Model(
        id=name,
        created=started,
        max_model_len=longest,
        root=app[CONFIG].model,
        display_name=name,
        created_at=datetime.fromtimestamp(started, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        max_input_tokens=longest,
    )


async def get_version(request: web.Request) -> web.Response:
    return json_response(Version(version("carousel-llm")))


async def get_load(request: web.Request) -> web.Response:
    state = request.app[ENGINE].state
    return json_response(Load(state.num_running + state.num_waiting))
