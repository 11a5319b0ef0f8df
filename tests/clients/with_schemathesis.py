"""Requests made from /openapi.json, right and wrong ones: none is a 5xx."""

import subprocess
import sys
from pathlib import Path

from checks import URL, check

command = [
    str(Path(sys.executable).with_name("st")),
    "run",
    f"{URL}/openapi.json",
    "--checks",
    "not_a_server_error",
    "--max-examples",
    "150",
    "--seed",
    "1",
    "--phases",
    "examples,coverage,fuzzing",
    "--workers",
    "1",
    "--request-timeout",
    "60",
    "--exclude-path",
    "/metrics",
]
done = subprocess.run(command, capture_output=True, text=True, check=False)
print(done.stdout[-6000:])
check("no answer is a 5xx", done.returncode == 0, done.stderr[-2000:])
