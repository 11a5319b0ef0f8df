"""docs/api.md: made from the models that validate, and whole."""

from __future__ import annotations

from pathlib import Path

from aiohttp import web

from server import reference
from server.app import add_routes
from server.openapi import BODIES

PAGE = Path(reference.__file__).parents[1] / "docs" / "api.md"
FOR_PEOPLE = {"/", "/live", "/openapi.json", "/v1/trace"}


def test_it_is_up_to_date() -> None:
    assert PAGE.read_text() == reference.page(), "run `python -m server.reference > docs/api.md`"


def test_every_field_of_a_request_is_explained() -> None:
    page = reference.page()
    for model, _ in BODIES.values():
        for name, info in model.model_fields.items():
            meaning = reference.meaning(name, info)
            assert meaning.removeprefix("**Required.** "), (model.__name__, name)
            assert f"| `{name}` |" in page


def test_every_route_is_named() -> None:
    router = web.UrlDispatcher()
    add_routes(router, "")
    page = reference.page()
    for route in router.routes():
        assert route.resource is not None
        path = route.resource.canonical.replace("{model}", "{id}")
        if route.method != "HEAD" and path not in FOR_PEOPLE and not path.startswith("/page/"):
            assert f"`{route.method} {path}`" in page, path
