"""What is served here, and how it is: the models by their names, the version, the load."""

from __future__ import annotations

from importlib.metadata import version

import msgspec
from aiohttp import web

from scheduler.messages import EngineInfo
from server.api.responses import Model, ModelList
from server.app_keys import CONFIG, ENGINE
from server.http.errors import ApiError
from server.http.json import json_response

STARTED = web.AppKey("started", int)
"""Unix time."""


class Version(msgspec.Struct, frozen=True):
    version: str


class Load(msgspec.Struct, frozen=True):
    server_load: int
    """Requests that are being answered or wait."""


def check_model(app: web.Application, model: str | None) -> None:
    """A request may name the served model, by any of its names, or none."""
    served = app[CONFIG].model_names
    if model is not None and model not in served:
        raise ApiError(
            404,
            f"the model {model!r} is not served here; {served[0]!r} is",
            param="model",
            code="model_not_found",
        )


def longest_sequence(info: EngineInfo) -> int:
    """Tokens that prompt plus answer can have at most."""
    return min(info.max_model_len, info.num_blocks * info.block_size)


async def list_models(request: web.Request) -> web.Response:
    return json_response(ModelList([_model(request.app, name) for name in request.app[CONFIG].model_names]))


async def retrieve_model(request: web.Request) -> web.Response:
    name = request.match_info["model"]
    check_model(request.app, name)
    return json_response(_model(request.app, name))


def _model(app: web.Application, name: str) -> Model:
    return Model(name, app[STARTED], app[ENGINE].info.max_model_len, root=app[CONFIG].model)


async def get_version(request: web.Request) -> web.Response:
    return json_response(Version(version("carousel")))


async def get_load(request: web.Request) -> web.Response:
    state = request.app[ENGINE].state
    return json_response(Load(state.num_running + state.num_waiting))
