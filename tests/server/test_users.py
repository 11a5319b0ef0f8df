"""Who may use a server with users: keys, the users file while the server runs, and `carousel users`."""

from __future__ import annotations

import asyncio
import json
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from server.users.directory import KEY_PREFIX, UserDirectory, UsersFileError, hash_of, read_users
from server.users.file import add_user, rotate_key, set_disabled
from tests.server.conftest import MODEL
from tests.server.serving import Server, carousel
from tests.server.test_batch_command import line
from tests.server.users_server import COMPLETIONS, UsersServer

# The server --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [COMPLETIONS, "/v1/chat/completions", "/v1/models", "/v1/usage", "/nothing"])
@pytest.mark.parametrize(
    "authorization", [None, "", "Bearer", f"Bearer {KEY_PREFIX}wrong", "Basic YTpi", "Bearer \xff"]
)
async def test_without_a_key_there_is_nothing(
    users_server: UsersServer, path: str, authorization: str | None
) -> None:
    headers = {} if authorization is None else {"Authorization": authorization}
    answer = await users_server.send("POST" if "completions" in path else "GET", path, headers)
    assert (answer.status, answer.code) == (401, "invalid_api_key")
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert answer.body["error"].keys() == {"message", "type", "param", "code"}


async def test_probes_need_no_key(users_server: UsersServer) -> None:
    assert (await users_server.send("GET", "/health", {})).status == 200
    assert (await users_server.send("GET", "/metrics", {})).status == 200


async def test_any_openai_client_with_a_key_is_served(users_server: UsersServer) -> None:
    async with users_server.client_of("alice") as client:
        answer = await client.completions.create(model=MODEL, prompt="Once upon", max_tokens=4)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 4
    await users_server.until_logged("user=alice cmpl-")


async def test_commands_have_keys_from_the_environment_or_a_file(
    users_server: UsersServer, tmp_path: Path
) -> None:
    """Not from their command lines, which everybody on the machine reads."""
    command = ["bench", "--url", users_server.url, "--concurrency", "1", "--requests", "1"]
    key_file = tmp_path / "keys"
    key_file.write_text(f"{users_server.keys['alice']}\n{users_server.keys['carol']}\n")
    from_file = await asyncio.to_thread(carousel, *command, "--key-file", str(key_file))
    assert from_file.returncode == 0, from_file.stderr
    from_environment = await asyncio.to_thread(
        carousel, *command, env={"CAROUSEL_KEY": users_server.keys["alice"]}
    )
    assert from_environment.returncode == 0, from_environment.stderr
    assert (await asyncio.to_thread(carousel, *command)).returncode == 1
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps(line("one")) + "\n")
    batch = ["batch", str(source), str(output), "--url", users_server.url]
    assert (await asyncio.to_thread(carousel, *batch, "--key-file", str(key_file))).returncode == 0
    assert json.loads(output.read_text())["response"]["status_code"] == 200
    for flag in ("--key", "--api-key"):
        assert "unrecognized arguments" in (await asyncio.to_thread(carousel, *command, flag, "sk-a")).stderr


async def test_a_user_is_disabled_and_enabled(users_server: UsersServer) -> None:
    file = str(users_server.users_file)
    assert carousel("users", "disable", "carol", "--users", file).stdout == "carol is disabled.\n"
    await users_server.until_status("carol", 401)
    assert (await users_server.ask("alice")).status == 200
    assert carousel("users", "enable", "carol", "--users", file).stdout == "carol is enabled.\n"
    await users_server.until_status("carol", 200)


async def test_a_key_is_rotated(users_server: UsersServer) -> None:
    run = carousel("users", "rotate", "carol", "--users", str(users_server.users_file))
    await users_server.until_status("carol", 401)
    users_server.keys["carol"] = run.stdout.splitlines()[-1]
    assert (await users_server.ask("carol")).status == 200


async def test_an_edit_that_fails_changes_nothing_and_streams_go_on(users_server: UsersServer) -> None:
    file = users_server.users_file
    good = file.read_text()
    async with users_server.client_of("alice") as client:
        stream = await client.completions.create(
            model=MODEL, prompt="On and", max_tokens=300, stream=True, extra_body={"ignore_eos": True}
        )
        await anext(stream)
        file.write_text("users:\n  alice: {weight: heavy}\n")
        await users_server.until_logged("users.alice.weight should be a valid number, got 'heavy'")
        assert (await users_server.ask("bob")).status == 200
        file.write_text(good.replace("alice:", "alicia:"))
        async with asyncio.timeout(30):
            while (await users_server.usage("alice"))["user"] != "alicia":
                await asyncio.sleep(0.1)
        last = [chunk async for chunk in stream][-1]
        assert last.choices[0].finish_reason == "length"
    file.write_text(good)
    async with asyncio.timeout(30):
        while (await users_server.usage("alice"))["user"] != "alice":
            await asyncio.sleep(0.1)
    assert "Traceback" not in users_server.log


async def test_after_a_file_that_cannot_be_read_edits_still_count(users_server: UsersServer) -> None:
    file = users_server.users_file
    good = file.read_text()
    file.write_text(f"users: {'[' * 2000}{']' * 2000}\n")
    await users_server.until_logged(f"{file}: not valid as a users file: it is nested too deeply")
    assert (await users_server.ask("carol")).status == 200
    file.write_text(good)
    set_disabled(file, "carol", disabled=True)
    await users_server.until_status("carol", 401)
    file.write_text(good)
    await users_server.until_status("carol", 200)
    assert "Traceback" not in users_server.log


async def test_the_watch_of_the_file_goes_on_whatever_happens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("server.users.directory.CHECK_SECONDS", 0.0)
    monkeypatch.setattr("scheduler.client.background.FIRST_PAUSE", 0.0)
    file = tmp_path / "users.yaml"
    key = add_user(file, "eve", {})
    directory = UserDirectory(file)
    with monkeypatch.context() as broken:
        broken.setattr("server.users.directory.read_users", lambda _: 1 // 0)
        watching = asyncio.create_task(directory.watch())
        file.write_text(f"# A comment.\n{file.read_text()}")
        async with asyncio.timeout(30):
            while "ZeroDivisionError" not in caplog.text:
                await asyncio.sleep(0.01)
    set_disabled(file, "eve", disabled=True)
    async with asyncio.timeout(30):
        while not ((user := directory.find(key)) is not None and user.disabled):
            await asyncio.sleep(0.01)
    watching.cancel()


async def test_a_pipe_in_the_files_place_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("server.users.directory.CHECK_SECONDS", 0.0)
    file = tmp_path / "users.yaml"
    key = add_user(file, "eve", {})
    content = file.read_text()
    directory = UserDirectory(file)
    watching = asyncio.create_task(directory.watch())
    file.unlink()
    os.mkfifo(file)
    async with asyncio.timeout(30):
        while "not a regular file (the users from before stay)" not in caplog.text:
            await asyncio.sleep(0.01)
    assert directory.find(key) is not None
    file.unlink()
    file.write_text(content.replace("eve", "ada"))
    async with asyncio.timeout(30):
        while directory.named("ada") is None:
            await asyncio.sleep(0.01)
    watching.cancel()


async def test_without_users_everybody_is_anonymous(server: Server) -> None:
    status, report = await server.get("/v1/usage")
    assert (status, report["user"]) == (200, "anonymous")


def test_a_users_file_that_is_not_there(tmp_path: Path) -> None:
    run = carousel("serve", "--port", "0", "--users", str(tmp_path / "none.yaml"))
    assert run.returncode == 1
    assert "`carousel users add NAME --users" in run.stderr
    assert "Traceback" not in run.stderr


# The file ----------------------------------------------------------------------------------------------


def test_add_makes_the_file_and_prints_the_key_last(tmp_path: Path) -> None:
    file = tmp_path / "users.yaml"
    limits = [
        "--requests-per-minute",
        "60",
        "--tokens-per-minute",
        "9000",
        "--max-running",
        "4",
        "--max-queued",
        "8",
    ]
    run = carousel("users", "add", "eve", "--users", str(file), "--weight", "2", "--priority", "low", *limits)
    key = run.stdout.splitlines()[-1]
    assert key.startswith(KEY_PREFIX)
    assert len(key) == len(KEY_PREFIX) + 43
    assert key not in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    (eve,) = read_users(file).values()
    assert eve.keys == [hash_of(key)]
    assert (eve.weight, eve.priority, eve.limits.tokens_per_minute, eve.limits.max_queued) == (2, "low", 9000, 8)
    assert (
        "eve   2       low       1     requests_per_minute=60"
        in carousel("users", "list", "--users", str(file)).stdout
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["add", "alice"], "alice is there already"),
        (["add", "a b"], "1 to 64 letters, digits"),
        (["add", "anonymous"], "reserved"),
        (["add", "x", "--weight", "0"], "users.x.weight should be greater than or equal to 0.000001, got 0.0"),
        (["add", "x", "--max-running", "0"], "users.x.limits.max_running should be greater than or equal to 1"),
        (["disable", "bob"], "there is no user bob; there are: alice"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    file = tmp_path / "users.yaml"
    add_user(file, "alice", {})
    before = file.read_text()
    run = carousel("users", *arguments, "--users", str(file))
    assert (run.returncode, run.stdout, len(run.stderr.splitlines())) == (1, "", 1)
    assert message in run.stderr
    assert file.read_text() == before


def test_comments_stay_where_they_are(tmp_path: Path) -> None:
    file = tmp_path / "users.yaml"
    zeros, ones = "a" * 64, "b" * 64
    file.write_text(f"""\
# Ask Kim before you change this.
users:
  # in sales
  alice:
    keys:
    - {zeros}  # laptop
    - {ones}

  # on holiday until May
  bob:
    weight: 2.0  # twice
""")
    file.chmod(0o640)
    set_disabled(file, "alice", True)
    key = rotate_key(file, "alice")
    set_disabled(file, "bob", True)
    add_user(file, "on", {})
    lines = file.read_text().splitlines()
    added = f"    - {read_users(file)['on'].keys[0]}"
    assert lines == [
        "# Ask Kim before you change this.",
        "users:",
        "  # in sales",
        "  alice:",
        "    disabled: true",
        "    keys:",
        f"    - {hash_of(key)}",
        "",
        "  # on holiday until May",
        "  bob:",
        "    disabled: true",
        "    weight: 2.0  # twice",
        "  on:",
        "    keys:",
        added,
    ]
    assert stat.S_IMODE(file.stat().st_mode) == 0o640


def test_those_who_edit_at_the_same_time_wait_for_each_other(tmp_path: Path) -> None:
    file = tmp_path / "users.yaml"
    names = [f"user-{number}" for number in range(16)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: add_user(file, name, {}), names))
    assert sorted(read_users(file)) == sorted(names)


def test_nobody_else_reads_what_lies_beside_the_file(tmp_path: Path) -> None:
    file, lock = tmp_path / "users.yaml", tmp_path / "users.yaml.lock"
    add_user(file, "a", {})
    assert stat.S_IMODE(lock.stat().st_mode) == 0o600
    lock.chmod(0o644)
    rotate_key(file, "a")
    assert stat.S_IMODE(lock.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "expected a mapping that begins with `users:`"),
        ("people: {}", "people is not known here"),
        ("users: {a: 5}", "users.a should be a mapping, got 5"),
        ("users: {7: {}}", "users[7] should be a valid string"),
        ("users: {other: {}}", "users.other is a reserved name"),
        ("users: {a: {colour: red}}", "users.a.colour is not known here"),
        ("users: {a: {priority: urgent}}", "users.a.priority should be 'high', 'normal' or 'low', got 'urgent'"),
        ("users: {a: {keys: [sk-carousel-x]}}", "users.a.keys[0] should be the SHA-256 of a key"),
        (
            "users: {a: {limits: {max_queued: 0}}}",
            "users.a.limits.max_queued should be greater than or equal to 1",
        ),
        (f"users: {{a: {{keys: [{'a' * 64}]}}, b: {{keys: [{'a' * 64}]}}}}", "a and b have the same key"),
        ("users:\n  a: {}\n  a: {}\n", 'line 3: found duplicate key "a"'),
        ("users:\n\t- a", "not valid YAML: line 2"),
        (f"users: {'[' * 2000}{']' * 2000}", "it is nested too deeply"),
        ("".join(f"{' ' * level}a:\n" for level in range(2000)), "it is nested too deeply"),
    ],
)
def test_a_wrong_file_is_told_in_one_line(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "users.yaml"
    file.write_text(content)
    with pytest.raises(UsersFileError) as refused:
        UserDirectory(file)
    assert message in str(refused.value)
    assert str(refused.value).startswith(f"{file}: ")
    assert "\n" not in str(refused.value)


def test_a_user_may_have_several_keys_or_none(tmp_path: Path) -> None:
    file = tmp_path / "users.yaml"
    file.write_text(f"users:\n  a:\n    keys: [{hash_of('one')}, {hash_of('two')}]\n  b:\n")
    directory = UserDirectory(file)
    found = [directory.find(key) for key in ("one", "two", "three", "")]
    assert [user.name if user is not None else None for user in found] == ["a", "a", None, None]
