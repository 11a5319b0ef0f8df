"""Requests made from /openapi.json, right and wrong ones: none is a 5xx."""

import subprocess
import sys
import tempfile
from pathlib import Path

from checks import URL, check

command = [str(Path(sys.executable).with_name("st").absolute()), "run", f"{URL}/openapi.json"]
command += ["--checks", "not_a_server_error", "--max-examples", "150", "--seed", "1", "--workers", "2"]
command += [
    "--phases",
    "examples,coverage,fuzzing",
    "--max-time",
    "150",
    "--request-timeout",
    "60",
    "--exclude-path",
    "/metrics",
]
with tempfile.TemporaryDirectory() as folder:  # it keeps what it found where it runs
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
print(done.stdout[-6000:])
check("no answer is a 5xx", done.returncode == 0, done.stderr[-2000:])
