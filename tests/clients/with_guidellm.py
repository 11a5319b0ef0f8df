"""guidellm loads the server for a few requests, two at a time: none fails."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from checks import MODEL, URL, check

COUNT = 20
command = [str(Path(sys.executable).with_name("guidellm").absolute()), "run", "--disable-progress"]
command += ["--backend", f"kind=openai_http,target={URL},model={MODEL}"]
command += ["--tokenizer", f"kind=huggingface_auto,model={os.environ['CAROUSEL_TOKENIZER']}"]
command += ["--data", "kind=synthetic_text,prompt_tokens=32,output_tokens=16"]
command += ["--profile", "kind=concurrent,streams=2", "--constraint", f"kind=max_requests,count={COUNT}"]
with tempfile.TemporaryDirectory() as folder:
    report = Path(folder, "report.json")
    command += ["--output", f"kind=json,path={report}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    check("it ends well", done.returncode == 0, done.stderr[-2000:])
    (benchmark,) = json.loads(report.read_text())["benchmarks"]
    requests = benchmark["requests"]
    check(f"{COUNT} requests", len(requests["successful"]) == COUNT, benchmark["scheduler_metrics"])
    check("none failed", not requests["errored"] and not requests["incomplete"], requests["errored"])
    check("each has its 16 tokens", all(each["output_tokens"] == 16 for each in requests["successful"]), requests)
