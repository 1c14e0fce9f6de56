"""The page over HTTP: what is answered, to whom, and that nobody keeps others from it."""

import asyncio
import json
from collections.abc import AsyncIterator

import httpx
import pytest

from hexgen2 import metrics
from hexgen2.coordinator.page.site import FRESH_S, HEADERS, Site, page_served
from hexgen2.coordinator.page.view import Fleet
from hexgen2.errors import ConfigError
from hexgen2.web.guard import Limits
from tests.eventually import eventually
from tests.page.fleets import EVIL, evil, fleet

LIMITS = Limits(max_connections=4, head_timeout_s=1.0, unread_timeout_s=1.0)


def closed(reason: str) -> float:
    return float(metrics.HTTP_CONNECTIONS_CLOSED.labels(reason)._value.get())


@pytest.fixture
async def address() -> AsyncIterator[str]:
    async with page_served("127.0.0.1:0", fleet, LIMITS) as address:
        yield address


async def test_every_answer_has_the_headers_that_keep_it_safe(address: str) -> None:
    async with httpx.AsyncClient(base_url=f"http://{address}") as http:
        for method, path, status in (
            *(("GET", path, 200) for path in ("/", "/state.json", "/page.js", "/page.css")),
            *(("GET", path, 404) for path in ("/nothing", "/page.css/x", "/%2e%2e/etc/passwd")),
            *((method, "/", 405) for method in ("POST", "PUT", "DELETE", "OPTIONS")),
        ):
            answer = await http.request(method, path)
            assert answer.status_code == status, (method, path)
            assert {name: answer.headers[name] for name in HEADERS} == HEADERS
        assert (await http.post("/")).headers["allow"] == "GET, HEAD"
        whole, head = await http.get("/page.css"), await http.head("/page.css")
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-length"] == str(len(whole.content))


@pytest.mark.parametrize(
    ("host", "status"),
    [
        *((host, 200) for host in ("localhost", "LOCALHOST:8001", "127.0.0.1:8001", "[::1]:8001", "[::1]", "10.0.0.7")),
        *(
            (host, 421)
            for host in ("rebound.example.com", "rebound.example.com:8001", "localhost.example.com", "", "a b")
        ),
    ],
)
async def test_on_loopback_it_is_only_for_who_asks_for_this_machine(address: str, host: str, status: int) -> None:
    async with httpx.AsyncClient(base_url=f"http://{address}") as http:
        answer = await http.get("/state.json", headers={"host": host})
        assert answer.status_code == status
        assert (status == 200) == ("compared" in answer.text)


async def test_elsewhere_it_may_have_any_name() -> None:
    async with page_served("0.0.0.0:0", fleet) as address:
        port = address.rpartition(":")[2]
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
            assert (await http.get("/", headers={"host": "fleet.example.com"})).status_code == 200


async def test_in_a_container_it_has_the_names_that_are_given() -> None:
    async with page_served("0.0.0.0:0", fleet, names="localhost, Desk") as address:
        port = address.rpartition(":")[2]
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
            for host, status in (("localhost:8001", 200), ("desk", 200), ("10.0.0.7", 200), ("fleet.example.com", 421)):
                assert (await http.get("/", headers={"host": host})).status_code == status, host


async def test_the_state_is_json_of_what_the_page_shows(address: str) -> None:
    async with httpx.AsyncClient(base_url=f"http://{address}") as http:
        state = (await http.get("/state.json")).json()
        assert state["compared"][0] == {
            "name": "Time to first token",
            "unit": "s",
            "planned": 0.5,
            "measured": 0.55,
            "verdict": "kept",
        }
        assert "<h3>Time to first token</h3>" in (await http.get("/")).text


async def test_slow_and_many_clients_keep_nobody_out(address: str) -> None:
    host, _, port = address.partition(":")
    slow, many = closed("slow"), closed("too_many")
    flood = [await asyncio.open_connection(host, int(port)) for _ in range(12)]
    for _, writer in flood:
        writer.write(b"GET / HTTP/1.1\r\nx: ")
    async with httpx.AsyncClient(base_url=f"http://{address}") as http:
        assert (await http.get("/")).status_code == 200
        await eventually(lambda: closed("too_many") >= many + 8 and closed("slow") >= slow + 3)
        assert (await http.get("/")).status_code == 200
    for _, writer in flood:
        writer.close()


def test_it_is_rendered_once_a_second_however_many_look() -> None:
    now_s, looks = 10.0, 0

    def look() -> Fleet:
        nonlocal looks
        looks += 1
        return evil()

    site = Site(look, lambda: now_s)
    first = site.answer("GET", "/")
    assert (site.answer("GET", "/").body, looks) == (first.body, 1)
    now_s += FRESH_S
    assert EVIL in json.loads(site.answer("GET", "/state.json").body)["gateways"]
    site.answer("GET", "/")
    assert looks == 3


async def test_a_port_that_is_taken_is_said(address: str) -> None:
    with pytest.raises(ConfigError, match=r"page_listen|in use"):
        async with page_served(address, fleet):
            pass


async def test_without_an_address_there_is_none() -> None:
    async with page_served("", fleet) as address:
        assert address == ""
