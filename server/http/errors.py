"""Whatever goes wrong, the client reads it with the right status, in the error format of the API that it speaks:
OpenAI's, Anthropic's or Ollama's."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Mapping

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler
from msgspec import UNSET, UnsetType
from pydantic import ValidationError

from scheduler.client.async_engine import EngineDeadError, RequestCrashedError
from scheduler.core.request import InvalidRequestError
from scheduler.features.deadline import DeadlineError
from scheduler.text.grammar_checker import NotCheckedError
from server.app_keys import ENGINE, user_of
from server.http.json import json_response
from server.http.record import record_of
from server.storage import StorageError
from server.users.limits import LimitExceededError
from server.validation import place, printable, sentence

MAX_PROBLEMS = 8
"""How many things wrong with a request are told at once."""

NO_RETRY = {"x-should-retry": "false"}
"""OpenAI's clients would otherwise send a request again that met its deadline, or that crashed the engine."""

logger = logging.getLogger(__name__)


class ErrorContent(msgspec.Struct, frozen=True):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct, frozen=True):
    """An error's answer, in OpenAI's words; a stream that fails midway carries it as an event."""

    error: ErrorContent


class MessagesError(msgspec.Struct, frozen=True):
    """The same in Anthropic's words."""

    error: dict[str, str]
    request_id: str | UnsetType = UNSET
    type: str = "error"


class OllamaError(msgspec.Struct, frozen=True):
    """The same in Ollama's words."""

    error: str


_OLLAMAS = re.compile(r"(/.*)?/api/[a-z]+")
_ANTHROPICS = re.compile(r"(/.*)?/v1/messages(/.*)?")
_ANTHROPICS_HEADER = "anthropic-version"
"""Which all of their clients send, to /v1/models too."""

_ANTHROPICS_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class ApiError(Exception):
    """An answer other than the one asked for."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        rejection: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers
        self.rejection = rejection
        """In a word, for the metrics: why a request that was right by itself was refused."""
        self.body = ErrorBody(ErrorContent(printable(message), type, param and printable(param), code))


def as_api_error(error: Exception, request: web.Request) -> ApiError:
    """What the client is told of an exception. A refusal is counted; what nobody foresaw is logged, not told."""
    answer = _told(error, request)
    if answer.rejection is not None:
        request.app[ENGINE].metrics.record_rejection(user_of(request).name, answer.rejection)
    return answer


def told_of(error: Exception) -> ApiError | None:
    """What is told of a refusal that does not depend on how the request came."""
    match error:
        case ApiError():
            return error
        case LimitExceededError():
            return ApiError(
                429,
                str(error),
                type=error.type,
                code=error.code,
                headers=error.headers,
                rejection=error.reason,
            )
        case DeadlineError():
            return ApiError(
                408,
                str(error),
                type="timeout",
                code="deadline_unreachable",
                headers=NO_RETRY,
                rejection="deadline",
            )
        case InvalidRequestError():
            return ApiError(400, str(error), param=error.param, code=error.code)
        case ValidationError():
            problems = error.errors(include_url=False)[:MAX_PROBLEMS]
            message = "; ".join(sentence(problem, place(problem)) for problem in problems)
            return ApiError(400, message, param=place(problems[0]) or None)
        case StorageError():
            message = f"this server cannot keep or find anything at the moment: {error}"
            headers = {"Retry-After": "5"}
            return ApiError(503, message, type="server_error", code="storage_unavailable", headers=headers)
        case NotCheckedError():
            headers = {"Retry-After": "1"}
            return ApiError(503, str(error), type="server_error", code="grammar_not_checked", headers=headers)
        case EngineDeadError():
            return ApiError(503, str(error), type="server_error", code="engine_dead")
        case RequestCrashedError():
            return ApiError(500, str(error), type="server_error", code="engine_crashed", headers=NO_RETRY)
        case _:
            return None


def _told(error: Exception, request: web.Request) -> ApiError:
    if (known := told_of(error)) is not None:
        return known
    match error:
        case web.HTTPMethodNotAllowed():
            allowed = " or ".join(sorted(error.allowed_methods))
            return ApiError(
                405,
                f"{request.path} answers {allowed}, not {request.method}",
                headers={"Allow": error.headers["Allow"]},
            )
        case web.HTTPNotFound():
            return ApiError(404, f"there is nothing at {_path(request)}{_meant(request)}", code="not_found")
        case web.HTTPException():
            return ApiError(error.status, error.reason)
        case web.RequestPayloadError():
            return ApiError(400, "the request body ended early or is not encoded as its headers say")
        case _:
            request_id = record_of(request).request_id
            path = request.rel_url.raw_path
            logger.error("%s %s failed [%s]", request.method, path, request_id, exc_info=error)
            message = f"internal error; the server's log has it under request id {request_id}"
            return ApiError(500, message, type="server_error", code="internal_error")


def _path(request: web.Request) -> str:
    """As it was asked for: what begins with two slashes would else be read as a host's name."""
    return request.raw_path.partition("?")[0][:200]


def _meant(request: web.Request) -> str:
    """The path that was likely meant: without slashes too many, and with no prefix twice."""
    plain = re.sub(r"/+", "/", _path(request)).rstrip("/")
    plain = re.sub(r"^(.*?)(/v1)+(?=/|$)", r"\1/v1", plain)
    if plain == _path(request):
        return ""
    for resource in request.app.router.resources():
        if isinstance(resource, web.Resource) and resource._match(plain) is not None:
            return f"; did you mean {plain}?"
    return ""


@web.middleware
async def answer_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn what a handler raises into an error answer. A client that is gone gets none."""
    try:
        return await handler(request)
    except (asyncio.CancelledError, ConnectionError):
        raise
    except Exception as error:
        return error_response(as_api_error(error, request), request)


def error_response(error: ApiError, request: web.BaseRequest) -> web.Response:
    """In the words of the API that the request is for."""
    body: msgspec.Struct = error.body
    if _ANTHROPICS.fullmatch(request.path) or _ANTHROPICS_HEADER in request.headers:
        body = in_anthropics_words(error, record_of(request).request_id)
    elif _OLLAMAS.fullmatch(request.path):
        body = OllamaError(error.body.error.message)
    return json_response(body, status=error.status, headers=error.headers)


def in_anthropics_words(error: ApiError, request_id: str | UnsetType = UNSET) -> MessagesError:
    kind = _ANTHROPICS_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    return MessagesError({"type": kind, "message": error.body.error.message}, request_id)
