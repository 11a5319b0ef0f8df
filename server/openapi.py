"""GET /openapi.json: what can be sent here, made from the models that validate it."""

from __future__ import annotations

import json
import re
from importlib.metadata import version
from typing import Any

from aiohttp import web
from pydantic.json_schema import models_json_schema

from server.api.chat_request import ChatRequest
from server.api.completion_request import CompletionRequest
from server.api.embedding_request import EmbeddingRequest
from server.api.fields import Body
from server.api.llama_cpp import ApplyTemplateRequest, InfillRequest, LlamaCompletionRequest
from server.api.messages_api.request import CountRequest, MessagesRequest
from server.api.ollama.endpoint import ShowRequest
from server.api.ollama.request import OllamaChatRequest, OllamaEmbedRequest, OllamaGenerateRequest
from server.api.responses_api.request import ResponsesRequest
from server.api.tokens import DetokenizeRequest, TokenizeRequest
from server.app_keys import CONFIG
from server.batches.batch_endpoints import BatchRequest

BODIES: dict[str, tuple[type[Body], str]] = {
    "/v1/completions": (CompletionRequest, "Continue a text"),
    "/v1/chat/completions": (ChatRequest, "Continue a conversation"),
    "/v1/embeddings": (EmbeddingRequest, "Texts as vectors"),
    "/v1/responses": (ResponsesRequest, "Continue a conversation, as items"),
    "/v1/messages": (MessagesRequest, "Continue a conversation, in Anthropic's words"),
    "/v1/messages/count_tokens": (CountRequest, "How many tokens a conversation has"),
    "/v1/batches": (BatchRequest, "Answer the lines of a file, from what others leave (--batches)"),
    "/api/chat": (OllamaChatRequest, "Continue a conversation, in Ollama's words"),
    "/api/generate": (
        OllamaGenerateRequest,
        "Answer a prompt, or continue it, in Ollama's words",
    ),
    "/api/embed": (OllamaEmbedRequest, "Texts as vectors, in Ollama's words"),
    "/api/show": (ShowRequest, "What is known of the model, in Ollama's words"),
    "/completion": (LlamaCompletionRequest, "Continue a text, in llama.cpp's words"),
    "/infill": (InfillRequest, "The text between two, in llama.cpp's words"),
    "/apply-template": (ApplyTemplateRequest, "A conversation as the model reads it, in llama.cpp's words"),
    "/tokenize": (TokenizeRequest, "The tokens of a text, or of a conversation"),
    "/detokenize": (DetokenizeRequest, "The text of tokens"),
}
WITHOUT_BODIES: dict[tuple[str, str], str] = {
    ("get", "/v1/models"): "What is served",
    ("get", "/v1/models/{id}"): "One of the names that it has",
    ("get", "/v1/usage"): "What the caller used, day by day",
    ("get", "/v1/responses/{id}"): "A response that was kept (--store)",
    ("delete", "/v1/responses/{id}"): "Forget a response",
    ("get", "/v1/responses/{id}/input_items"): "What was said before it (--store)",
    ("get", "/v1/files"): "The caller's files (--batches)",
    ("get", "/v1/files/{id}"): "What is known of a file",
    ("get", "/v1/files/{id}/content"): "A file itself",
    ("delete", "/v1/files/{id}"): "Delete a file",
    ("get", "/v1/batches"): "The caller's batches (--batches)",
    ("get", "/v1/batches/{id}"): "How far a batch is",
    ("post", "/v1/batches/{id}/cancel"): "End a batch; what is answered stays",
    ("get", "/tokenizer_info"): "What the tokenizer's configuration says",
    ("get", "/health"): "Whether requests are served at once",
    ("get", "/health/live"): "Whether the server answers at all",
    ("get", "/health/ready"): "Whether requests are served at once",
    ("get", "/version"): "Of Carousel",
    ("get", "/api/tags"): "What is served, in Ollama's words",
    ("get", "/api/ps"): "The same",
    ("get", "/api/version"): "Of Ollama's API that is spoken here",
    ("get", "/props"): "How the model is served, in llama.cpp's words",
    ("get", "/ping"): "Whether anybody is there",
    ("post", "/ping"): "The same",
    ("get", "/load"): "How many requests are being answered or wait",
    ("get", "/metrics"): "For Prometheus",
}
PAGED = ("/v1/files", "/v1/batches")
ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
            "required": ["message", "type", "param", "code"],
        }
    },
    "required": ["error"],
}
REFUSALS = {
    "400": "Something is wrong with the request; `param` names the field",
    "401": "No key, or none that is known",
    "403": "Not allowed",
    "404": "There is no such model",
    "408": "The body did not arrive, or the deadline passed",
    "413": "The body is too large",
    "415": "The body is not JSON, or is encoded",
    "429": "Too much for now; `Retry-After` says how long to wait",
    "500": "An error of the server's, which its log explains",
    "503": "The engine is gone",
}


def specification(root_path: str, *, has_users: bool) -> dict[str, Any]:
    """The document, in OpenAPI 3.1."""
    pairs, schemas = models_json_schema(
        [(model, "validation") for model, _ in BODIES.values()], ref_template="#/components/schemas/{model}"
    )
    refusals = {
        status: _answer(meaning, {"$ref": "#/components/schemas/Error"}) for status, meaning in REFUSALS.items()
    }
    paths: dict[str, Any] = {
        path: {
            "post": {
                "summary": summary,
                "operationId": _name(path),
                "requestBody": {
                    "required": True,
                    "content": {"application/json": {"schema": pairs[(model, "validation")]}},
                },
                "responses": {"200": _answer("The answer, or a stream of events"), **refusals},
            }
        }
        for path, (model, summary) in BODIES.items()
    }
    paths["/v1/files"] = {"post": _upload(refusals)}
    for (method, path), summary in WITHOUT_BODIES.items():
        parameters = [_parameter("id", "path", "string")] if "{id}" in path else []
        if path in PAGED:
            parameters = [_parameter("limit", "query", "integer"), _parameter("after", "query", "string")]
        paths.setdefault(path, {})[method] = {
            "summary": summary,
            "operationId": _name(f"{method} {path}"),
            "parameters": parameters,
            "responses": {
                "200": _answer("The answer"),
                **{name: refusals[name] for name in ("400", "401", "404", "500", "503")},
            },
        }
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "Carousel", "version": version("carousel-llm")},
        "servers": [{"url": root_path or "/"}],
        "paths": paths,
        "components": {"schemas": schemas.get("$defs", {}) | {"Error": ERROR}},
    }
    if has_users:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    return document


def _name(place: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", place).strip("_")


def _parameter(name: str, place: str, kind: str) -> dict[str, Any]:
    return {"name": name, "in": place, "required": place == "path", "schema": {"type": kind}}


def _upload(refusals: dict[str, Any]) -> dict[str, Any]:
    fields = {"purpose": {"const": "batch"}, "file": {"type": "string", "contentMediaType": "application/jsonl"}}
    schema = {"type": "object", "properties": fields, "required": list(fields)}
    return {
        "summary": "Send a file of requests (--batches)",
        "operationId": "upload_file",
        "requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}},
        "responses": {"200": _answer("What is known of it"), **refusals},
    }


def _answer(meaning: str, schema: dict[str, Any] | None = None) -> dict[str, Any]:
    if schema is None:
        return {"description": meaning}
    return {"description": meaning, "content": {"application/json": {"schema": schema}}}


SPECIFICATION = web.AppKey("specification", bytes)
"""Made before anything is served: that takes longer than many steps, and anybody may ask for it."""


def add_specification(app: web.Application) -> None:
    """Put it into an application that has its configuration."""
    config = app[CONFIG]
    whole = specification(config.root_path, has_users=config.users is not None)
    app[SPECIFICATION] = json.dumps(whole).encode()


async def get_specification(request: web.Request) -> web.Response:
    return web.Response(body=request.app[SPECIFICATION], content_type="application/json")
