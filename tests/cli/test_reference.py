"""The references in docs/ are those of this code."""

from typing import Any, cast

import pytest
from starlette.applications import Starlette

from hexgen2.cli import reference
from hexgen2.coordinator.page.site import Site
from services.gateway.http_api import make_app
from tests.page.fleets import fleet


@pytest.mark.parametrize("name", reference.FILES)
def test_what_is_published_is_of_this_code(name: str) -> None:
    published = (reference.ROOT / "docs" / name).read_text(encoding="utf-8")
    assert published == reference.FILES[name](), "run: make docs"


def test_every_call_and_every_field_has_a_row() -> None:
    text = reference.api()
    for row in (
        "| `Generate` | `GenerateRequest` | stream of `GenerateResponse` |",
        "| `max_tokens` | optional `uint32`",
    ):
        assert row in text
    assert "| `prompt` | `string` (one of `input`) | 2 |" in text
    assert "| `kv.transport` | `--kv-transport` | `auto` | `auto`, `ucx`, `tcp` |" in reference.configuration()
    assert "| `listen` | `--listen` | `127.0.0.1:50051` |" in reference.configuration()


def test_every_endpoint_is_listed() -> None:
    app = cast("Starlette", make_app(cast("Any", None)))
    served = {("gateway", f"{method} {path}") for path, method in routes(app)}
    assert served == {each for each in reference.ENDPOINTS if each[0] == "gateway"}
    site = Site(fleet)
    for where, endpoint in reference.ENDPOINTS:
        if where == "coordinator's page":
            method, path = endpoint.split()
            assert site.answer(method, path).status == 200


def routes(app: Starlette) -> set[tuple[str, str]]:
    found = set()
    for route in cast("Any", app.routes):
        found.add((route.path, "POST" if "POST" in (route.methods or ()) else "GET"))
    return found
