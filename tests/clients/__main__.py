"""Starts the servers, runs every script in an environment of its own, and prints a table of what came of it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.table import Table

from scheduler.models.files.model_source import resolve_model
from tests.server.serving import Server, environment

HERE = Path(__file__).parent
BUILD = Path("build/clients")
MODEL = "SmolLM2-135M-Instruct"
TOOLS_MODEL = "Qwen2.5-Coder-0.5B-Instruct"
INSTALL_SECONDS = 600
SCRIPT_SECONDS = 1200
# The tools alone that they tell of have some 10,000 tokens, and each of their sessions has several requests.
AGENT = ["--model", TOOLS_MODEL, "--kv-cache-memory", "1GB"]
OWN_SERVERS = {
    "codex": AGENT,
    "claude_code": AGENT,
    "opencode": AGENT,
    "qwen_code": AGENT,
    # It describes tools of its own in 6,500 tokens before the first question.
    "open_webui": ["--kv-cache-memory", "512MB"],
    "lm_eval": ["--dtype", "float32"],
    # Its requests often set no limit: every answer to them is as long as the context.
    "schemathesis": [
        "--max-model-len",
        "64",
        "--store",
        "{folder}/store.sqlite3",
        "--batches",
        "{folder}/batches",
    ],
}
"""The clients that get a server of their own in place of the first one, and its flags."""


@dataclass(frozen=True)
class Outcome:
    client: str
    requirement: str
    """With its version, as pip or npm takes it, on the last line."""
    result: str
    """`ok`, `failed` or `not installable`."""
    output: str


def main(names: list[str]) -> int:
    """Run the scripts of these names, or all of them; the exit status is 1 if one fails."""
    scripts = {path.stem.removeprefix("with_"): path for path in sorted(HERE.glob("with_*"))}
    if missing := [name for name in names if name not in scripts]:
        print(f"there is no script for {', '.join(missing)}", file=sys.stderr)
        return 2
    BUILD.mkdir(parents=True, exist_ok=True)
    with _server("server", MODEL) as small, _server("tools-server", TOOLS_MODEL) as tools:
        env = environment(
            {
                "CAROUSEL_URL": small.url,
                "CAROUSEL_MODEL": MODEL,
                "CAROUSEL_TOKENIZER": str(resolve_model(MODEL)),
                "CAROUSEL_TOOLS_URL": tools.url,
                "CAROUSEL_TOOLS_MODEL": TOOLS_MODEL,
                "CAROUSEL_PYTHON": sys.executable,
            }
        )
        env.pop("PYTHONPATH", None)  # the clients' environments are their own
        outcomes = [_run(client, scripts[client], env) for client in names or scripts]
    _print(outcomes)
    return int(any(outcome.result == "failed" for outcome in outcomes))


def _server(name: str, model: str, *flags: str) -> Server:
    return Server(BUILD / f"{name}.log", "--model", model, "--kv-cache-memory", "64MB", *flags)


def _run(client: str, script: Path, env: Mapping[str, str]) -> Outcome:
    requirement = (HERE / "requirements" / f"{client}.txt").read_text().strip()
    install, command = (
        (_npm, ["node"]) if script.suffix == ".cjs" else (_pip, [str(BUILD / client / "bin/python")])
    )
    if problem := _install(install, BUILD / client, requirement):
        return Outcome(client, requirement, "not installable", problem)
    env = {**env, "NODE_PATH": str((BUILD / client / "node_modules").resolve())}
    with ExitStack() as stack:
        if flags := OWN_SERVERS.get(client):
            folder = stack.enter_context(TemporaryDirectory())
            own = _server(f"{client}-server", MODEL, *(flag.format(folder=folder) for flag in flags))
            env["CAROUSEL_URL"] = stack.enter_context(own).url
        try:
            done = subprocess.run(
                [*command, script],
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=SCRIPT_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return Outcome(client, requirement, "failed", f"took more than {SCRIPT_SECONDS} s")
    return Outcome(client, requirement, "failed" if done.returncode else "ok", done.stdout)


def _install(install: Callable[[Path, str], list[list[str]]], folder: Path, requirement: str) -> str:
    """Make the environment if it is not there for this very requirement. Returns what went wrong, if anything."""
    ready = folder / "ready"
    if ready.exists() and ready.read_text() == requirement:
        return ""
    shutil.rmtree(folder, ignore_errors=True)
    try:
        for command in install(folder, requirement):
            done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_SECONDS, check=False)
            if done.returncode:
                return done.stderr
    except subprocess.TimeoutExpired:
        return f"it took more than {INSTALL_SECONDS} s"
    except FileNotFoundError as error:
        return str(error)
    ready.write_text(requirement)
    return ""


def _pip(folder: Path, requirement: str) -> list[list[str]]:
    """A line is a call of pip."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [str(folder / "bin/python"), "-m", "pip", "install", "--quiet"]
    return [[*pip, *line.split()] for line in requirement.splitlines()]


def _npm(folder: Path, requirement: str) -> list[list[str]]:
    folder.mkdir()
    npm = ["npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", str(folder)]
    return [[*npm, *requirement.split()]]


def _print(outcomes: list[Outcome]) -> None:
    table = Table("client", "version", "what", "result")
    for outcome in outcomes:
        checked = re.findall(r"^ok: (.*)$", outcome.output, re.MULTILINE)
        *_, version = outcome.requirement.splitlines()
        table.add_row(outcome.client, version.replace("[", r"\["), "; ".join(checked), outcome.result)
        if outcome.result != "ok":
            print(f"--- {outcome.client}: {outcome.result}\n{outcome.output[-4000:]}")
    Console(width=140).print(table)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
