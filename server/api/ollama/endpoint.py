"""POST /api/chat, /api/generate and /api/embed, and what Ollama's programs ask about the model."""

from __future__ import annotations

from functools import partial
from hashlib import sha256
from typing import Any

import msgspec
from aiohttp import web

from server.api.completions import completion_of
from server.api.conversation import understand
from server.api.counting import counted
from server.api.embeddings import embedding_of
from server.api.fields import Body, Hint
from server.api.generation import Asked, answer
from server.api.logprobs import LogprobWords
from server.api.models import STARTED, longest_sequence, served_model
from server.api.ollama.request import (
    OllamaChatRequest,
    OllamaEmbedRequest,
    OllamaGenerateRequest,
    OllamaRawRequest,
)
from server.api.ollama.wording import OllamaEmbedWording, OllamaWording, time_of
from server.api.reading import read
from server.api.shape import check_completion, check_embedding, check_fields
from server.app_keys import CONFIG, ENGINE, LIMITS
from server.http.json import json_response
from server.http.protocol import refuse_expectations
from server.http.record import RequestRecord
from server.parsing.events import PlainParser

API_VERSION = "0.12.0"
"""Of Ollama, whose API this is: programs read it to know what they may send."""


class Version(msgspec.Struct, frozen=True):
    version: str


class Details(msgspec.Struct, frozen=True):
    format: str
    family: str
    families: list[str]
    parameter_size: str
    quantization_level: str
    parent_model: str = ""


class Listed(msgspec.Struct, frozen=True):
    name: str
    model: str
    modified_at: str
    size: int
    digest: str
    details: Details


class Models(msgspec.Struct, frozen=True):
    models: list[Listed]


class Shown(msgspec.Struct, frozen=True):
    template: str
    details: Details
    model_info: dict[str, Any]
    capabilities: list[str]
    modified_at: str
    modelfile: str = ""
    parameters: str = ""
    license: str = ""


class ShowRequest(Body):
    model: str | None = None
    """By default, and where the name is none at /v1/models, the model that is served (`--unknown-models`)."""
    name: str | None = None
    """The older name of model."""
    verbose: Hint[bool] = False


def add_routes(router: web.UrlDispatcher, root: str) -> None:
    for path, handler in {"chat": chat, "generate": generate, "embed": embed, "show": show}.items():
        router.add_post(f"{root}/api/{path}", handler, expect_handler=refuse_expectations)
    for path, handler in {"tags": list_tags, "ps": list_tags, "version": get_version}.items():
        router.add_get(f"{root}/api/{path}", handler)


async def chat(request: web.Request) -> web.StreamResponse:
    return await answer(request, understand_chat, prompt_field="messages")


def understand_chat(app: web.Application, record: RequestRecord, content: bytes) -> Asked:
    """Raises whatever is wrong with the request. May be called in a thread."""
    return _understood(app, record, content, OllamaChatRequest)


async def generate(request: web.Request) -> web.StreamResponse:
    return await answer(request, understand_generate, prompt_field="prompt")


class _Kind(msgspec.Struct):
    raw: Any = None
    suffix: Any = None


def understand_generate(app: web.Application, record: RequestRecord, content: bytes) -> Asked:
    """With a suffix, or `raw`, the prompt is continued as it is; otherwise it is what a user says. Raises whatever
    is wrong with the request. May be called in a thread."""
    try:
        kind = msgspec.json.decode(content, type=_Kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        kind = _Kind()  # what is wrong with it is told below
    if not (kind.raw or kind.suffix):
        return _understood(app, record, content, OllamaGenerateRequest)
    longest = longest_sequence(app[ENGINE].info)
    check_completion(content, OllamaRawRequest, longest=longest, max_tokens=app[LIMITS].max_queued_tokens)
    body = read(app, record, content, OllamaRawRequest)
    return completion_of(
        app, body, lambda model, prompts, num_sequences: OllamaWording(model, PlainParser(), record)
    )


def _understood(
    app: web.Application, record: RequestRecord, content: bytes, model: type[OllamaChatRequest]
) -> Asked:
    check_fields(content, model, longest_sequence(app[ENGINE].info))
    body = read(app, record, content, model)
    conversation = understand(app, body.ask())
    words = LogprobWords(app[ENGINE].tokenizer, as_ids=False) if body.logprobs else None
    wording = OllamaWording(
        conversation.model,
        conversation.new_parser(),
        record,
        words,
        in_turns=model is OllamaChatRequest,
        loads=body.loads,
    )
    return conversation.asked(wording)


async def embed(request: web.Request) -> web.StreamResponse:
    return await answer(request, understand_embed, prompt_field="input")


def understand_embed(app: web.Application, record: RequestRecord, content: bytes) -> Asked:
    """Raises whatever is wrong with the request. May be called in a thread."""
    longest = longest_sequence(app[ENGINE].info)
    check_embedding(content, OllamaEmbedRequest, longest=longest, max_tokens=app[LIMITS].max_queued_tokens)
    body = read(app, record, content, OllamaEmbedRequest)
    return embedding_of(app, body, partial(OllamaEmbedWording, record=record))


async def get_version(request: web.Request) -> web.Response:
    return json_response(Version(API_VERSION))


async def list_tags(request: web.Request) -> web.Response:
    """The model that is served, by each of its names."""
    app = request.app
    size, modified = app[ENGINE].info.weights_bytes, time_of(app[STARTED])
    digest = sha256(app[CONFIG].model.encode()).hexdigest()
    names = app[CONFIG].model_names
    return json_response(Models([Listed(name, name, modified, size, digest, _details(app)) for name in names]))


async def show(request: web.Request) -> web.Response:
    return await counted(request, _show)


def _show(app: web.Application, record: RequestRecord, content: bytes) -> Shown:
    check_fields(content, ShowRequest, 0)
    body = read(app, record, content, ShowRequest)
    served_model(app, body.model or body.name)
    info, template = app[ENGINE].info, app[ENGINE].tokenizer.chat_template.source
    facts: dict[str, Any] = {
        "general.architecture": "carousel",
        "carousel.context_length": info.max_model_len,
        "carousel.embedding_length": info.embedding_size,
        "carousel.vocab_size": info.vocab_size,
    }
    can = ["completion", "tools"] if info.has_head else ["embedding"]
    if info.has_head and "think" in template:
        can.append("thinking")
    return Shown(template, _details(app), facts, can, time_of(app[STARTED]))


def _details(app: web.Application) -> Details:
    info = app[ENGINE].info
    form = "gguf" if info.products == "stored" else "safetensors"
    return Details(form, "carousel", ["carousel"], "", info.products)
