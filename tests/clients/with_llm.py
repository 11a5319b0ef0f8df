"""`llm`, set up by its own file for further OpenAI-compatible models."""

import os
import tempfile
from pathlib import Path

from checks import MODEL, URL, check

with tempfile.TemporaryDirectory() as folder:
    os.environ["LLM_USER_PATH"] = folder
    import llm

    Path(folder, "extra-openai-models.yaml").write_text(
        f"- model_id: carousel\n  model_name: {MODEL}\n  api_base: {URL}/v1\n"
    )
    model = llm.get_model("carousel")
    model.key = "none"
    for stream in (False, True):
        text = model.prompt("Name three rivers.", stream=stream, max_tokens=12, temperature=0).text()
        check(f"prompt, {stream=}", text, text)
