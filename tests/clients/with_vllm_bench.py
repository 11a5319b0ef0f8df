"""`vllm bench serve` loads the server over both endpoints, four requests at a time: none fails.

vLLM without what it needs to run a model: the requirements name what its load generator imports.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from checks import MODEL, URL, check

COUNT, INPUT, OUTPUT = 12, 48, 24
command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "serve", "--base-url", URL]
command += ["--model", MODEL, "--tokenizer", os.environ["CAROUSEL_TOKENIZER"], "--num-prompts", str(COUNT)]
command += ["--dataset-name", "random", "--random-input-len", str(INPUT), "--random-output-len", str(OUTPUT)]
command += ["--max-concurrency", "4", "--ignore-eos", "--disable-tqdm", "--save-result", "--save-detailed"]
for backend, path in (("openai", "/v1/completions"), ("openai-chat", "/v1/chat/completions")):
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--backend", backend, "--endpoint", path, "--result-dir", folder, "--result-filename", "it.json"]
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        done = subprocess.run([*command, *flags], capture_output=True, text=True, check=False, env=env)
        check(f"{backend} ends well", done.returncode == 0, done.stderr[-2000:])
        result = json.loads(Path(folder, "it.json").read_text())
    check(
        f"{COUNT} requests and no failure", (result["completed"], result["failed"]) == (COUNT, 0), result["errors"]
    )
    check(f"each has its {OUTPUT} tokens", result["output_lens"] == [OUTPUT] * COUNT, result["output_lens"])
