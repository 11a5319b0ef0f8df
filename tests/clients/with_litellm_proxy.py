"""LiteLLM's proxy in front of Carousel: a chat through it, whole and streamed, a tool, and an error."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import yaml
from checks import ASK, MODEL, SAY, TOOLS_MODEL, TOOLS_URL, URL, WEATHER, check

START_SECONDS = 90
KEY = "sk-of-this-test-alone-" + "0" * 32  # the proxy does not start without one
places = (("small", MODEL, URL), ("tools", TOOLS_MODEL, TOOLS_URL))
models = [
    {
        "model_name": name,
        "litellm_params": {"model": f"hosted_vllm/{model}", "api_base": f"{url}/v1", "api_key": "none"},
    }
    for name, model, url in places
]


def up(client: httpx.Client) -> bool:
    try:
        return client.get("/health/liveliness").is_success
    except httpx.TransportError:
        return False


def ask(client: httpx.Client, **body: Any) -> httpx.Response:
    return client.post("/v1/chat/completions", json={"messages": SAY, "temperature": 0, "max_tokens": 12, **body})


def try_it(client: httpx.Client) -> None:
    """What somebody behind the proxy sees."""
    whole = ask(client, model="small").json()
    text = whole["choices"][0]["message"]["content"]
    check("chat", text and whole["usage"]["completion_tokens"] == 12, whole)
    lines = [
        line[6:] for line in ask(client, model="small", stream=True).text.splitlines() if line[:6] == "data: "
    ]
    chunks = [json.loads(line) for line in lines[:-1]]
    streamed = "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])
    check("chat, streamed, is the same text", streamed == text and lines[-1] == "[DONE]", lines)
    tools = [{"type": "function", "function": {"name": "get_weather", "parameters": WEATHER}}]
    question = {"messages": [{"role": "user", "content": ASK}], "tools": tools, "tool_choice": "required"}
    called = ask(client, model="tools", **question, max_tokens=60, parallel_tool_calls=False).json()
    (call,) = called["choices"][0]["message"]["tool_calls"]
    check("a tool", json.loads(call["function"]["arguments"]).keys() == {"city"}, called)
    refused = ask(client, model="small", temperature=-1)
    check("a bad value is refused", refused.status_code == 400 and "temperature" in refused.text, refused.text)


with tempfile.TemporaryDirectory() as folder:
    config, log = Path(folder, "config.yaml"), Path(folder, "log")
    config.write_text(yaml.safe_dump({"model_list": models, "general_settings": {"master_key": KEY}}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("litellm").absolute()), "--config", str(config)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--telemetry", "False"]
    env = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}  # else it asks the internet for prices
    with log.open("wb") as output, subprocess.Popen(command, env=env, stdout=output, stderr=output) as proxy:
        try:
            address = {"base_url": f"http://127.0.0.1:{port}", "headers": {"Authorization": f"Bearer {KEY}"}}
            with httpx.Client(**address, timeout=60) as client:
                deadline = time.monotonic() + START_SECONDS
                while not up(client):
                    if proxy.poll() is not None or time.monotonic() > deadline:
                        raise SystemExit(f"failed: the proxy did not start; saw {log.read_text()[-3000:]}")
                    time.sleep(0.2)
                try_it(client)
        finally:
            proxy.terminate()
