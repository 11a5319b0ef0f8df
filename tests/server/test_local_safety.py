"""What a page in a browser cannot do to a server on the same machine, and what others still can."""

from __future__ import annotations

import subprocess
from pathlib import Path
from threading import current_thread, main_thread

import pytest
from aiohttp.test_utils import TestClient, TestServer

from server.config import ServeConfig
from server.http import metrics
from server.http.metrics import create_metrics_app
from server.users.file import add_user
from tests.server.scripted import ScriptedEngine, serving
from tests.server.serving import Server
from tests.server.users_server import UsersServer

FORM = "application/x-www-form-urlencoded"


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8000", 200),
        ("localhost", 200),
        ("LOCALHOST.:80", 200),
        ("carousel.localhost:8000", 200),
        ("[::1]:8000", 200),
        ("127.7.7.7", 200),
        ("evil.example:8000", 403),
        ("localhost.evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("10.0.0.1", 403),
        ("", 403),
    ],
)
async def test_without_keys_the_host_is_a_name_of_this_machine(host: str, status: int) -> None:
    async with serving(ScriptedEngine()) as client:
        response = await client.get("/health", headers={"Host": host})
        assert response.status == status
        if status == 403:
            error = (await response.json())["error"]
            assert error["code"] == "host_not_allowed"
            assert "--allowed-hosts" in error["message"]


async def test_other_names_are_allowed_where_that_is_wanted() -> None:
    async with serving(ScriptedEngine(), allowed_hosts="box.lan, proxy") as client:
        for host, status in (("box.lan:8000", 200), ("Proxy", 200), ("localhost", 200), ("else.lan", 403)):
            assert (await client.get("/health", headers={"Host": host})).status == status, host


async def test_with_keys_or_on_every_interface_any_host_is_right(tmp_path: Path) -> None:
    add_user(tmp_path / "users.yaml", "alice", {})
    for knobs in ({"users": tmp_path / "users.yaml"}, {"host": "0.0.0.0"}):
        async with serving(ScriptedEngine(), **knobs) as client:
            assert (await client.get("/health", headers={"Host": "box.lan"})).status == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Content-Type": FORM}, 400),  # curl's own
        ({"Content-Type": FORM, "Sec-Fetch-Site": "none"}, 400),
        ({"Content-Type": FORM, "Origin": "http://localhost:8000"}, 400),
        ({"Content-Type": FORM, "Origin": "https://evil.example"}, 415),
        ({"Content-Type": FORM, "Origin": "null"}, 415),
        ({"Content-Type": "text/plain", "Sec-Fetch-Site": "cross-site"}, 415),
        ({"Content-Type": "multipart/form-data; boundary=x", "Sec-Fetch-Site": "same-site"}, 415),
        ({"Content-Type": "application/json", "Origin": "https://evil.example"}, 400),  # a browser asks first
    ],
)
async def test_a_form_of_another_site_is_refused(headers: dict[str, str], status: int) -> None:
    async with serving(ScriptedEngine()) as client:
        headers = {"Host": "localhost:8000", **headers}
        response = await client.post("/v1/completions", data=b"{}", headers=headers)
        assert response.status == status
        assert "message" in (await response.json())["error"]


async def test_another_site_cannot_record_a_trace() -> None:
    async with serving(ScriptedEngine()) as client:
        response = await client.post("/v1/trace", headers={"Origin": "https://evil.example"})
        assert response.status == 415


def test_the_curl_that_the_server_prints_works(server: Server) -> None:
    command = next(line for line in server.log.splitlines() if line.startswith("Try it: ")).removeprefix(
        "Try it: "
    )
    answer = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=True).stdout
    assert answer.endswith("data: [DONE]\n\n")


# /metrics ----------------------------------------------------------------------------------------------


async def test_metrics_name_nobody_where_there_are_users(users_server: UsersServer) -> None:
    for name in ("alice", "bob"):
        await users_server.ask(name)
    text = await users_server.metrics()
    assert "alice" not in text
    assert "bob" not in text
    assert 'user="1"' in text
    assert 'user="2"' in text


async def test_on_a_port_of_their_own_metrics_have_names() -> None:
    engine = ScriptedEngine()
    engine.metrics.record_request("alice")
    config = ServeConfig(metrics_port=0)
    async with TestClient(TestServer(create_metrics_app(config, engine.registry))) as client:
        assert 'user="alice"' in await (await client.get("/metrics")).text()
        assert (await client.get("/metrics", headers={"Host": "evil.example"})).status == 403
        assert (await client.get("/health")).status == 404
    async with serving(engine, metrics_port=0) as client:
        assert (await client.get("/metrics")).status == 404


async def test_metrics_are_written_off_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []

    def write(registry: object) -> bytes:
        threads.append(current_thread())
        return b""

    monkeypatch.setattr(metrics, "choose_encoder", lambda accept: (write, "text/plain"))
    async with serving(ScriptedEngine()) as client:
        assert (await client.get("/metrics")).status == 200
    assert threads
    assert main_thread() not in threads
