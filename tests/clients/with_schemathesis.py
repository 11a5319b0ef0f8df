"""Requests made from /openapi.json, right and wrong ones: none is a 5xx."""

import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from checks import URL, check

CASES = 2000
# By one worker: with two, CPython 3.11's parser now and then fails in the tool itself ("AST constructor recursion
# depth mismatch").
command = [str(Path(sys.executable).with_name("st").absolute()), "run", f"{URL}/openapi.json", "--no-color"]
command += ["--checks", "not_a_server_error", "--max-examples", "50", "--seed", "1"]
command += ["--phases", "coverage,fuzzing,stateful", "--request-timeout", "60", "--exclude-path", "/metrics"]
command += ["--report", "har", "--report-har-path", "requests.json"]
with tempfile.TemporaryDirectory() as folder:  # it keeps what it found where it runs
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    print(done.stdout[-6000:])
    requests = json.loads(Path(folder, "requests.json").read_text())["log"]["entries"]
statuses = Counter(request["response"]["status"] for request in requests)
counts = ", ".join(f"{status}: {count}" for status, count in sorted(statuses.items()))
check("no answer is a 5xx", done.returncode == 0 and all(status < 500 for status in statuses), done.stderr[-2000:])
check(f"{len(requests)} cases ({counts})", len(requests) >= CASES)
