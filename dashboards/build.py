"""Writes the dashboards as the JSON that Grafana reads; with --check, only says whether they are up to date.

python -m dashboards.build [--check]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

from dashboards.latency import latency
from dashboards.overview import overview
from dashboards.scheduler import scheduler
from dashboards.users import users

FOLDER = Path(__file__).parent / "grafana"


def build() -> dict[Path, str]:
    """Each file and what is in it."""
    pages = {"overview": overview, "latency": latency, "scheduler": scheduler, "users": users}
    return {FOLDER / f"{name}.json": _json(page().build()) for name, page in pages.items()}


def _json(page: Dashboard) -> str:
    for number, panel in enumerate(page.panels or [], start=1):
        panel.id_val = number  # a link to a panel goes by it
    return JSONEncoder(sort_keys=True, indent=2, ensure_ascii=False).encode(page) + "\n"


def outdated() -> list[Path]:
    """The files that are not what `build` gives, or should not be there."""
    files = build()
    wrong = [file for file, text in files.items() if not file.is_file() or file.read_text() != text]
    return wrong + sorted(set(FOLDER.glob("*.json")) - set(files))


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dashboards.build", description="Write the Grafana dashboards."
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file is not up to date")
    if parser.parse_args().check:
        for file in outdated():
            print(f"{file} is not what python -m dashboards.build writes", file=sys.stderr)
        return bool(outdated())
    FOLDER.mkdir(exist_ok=True)
    for file, text in build().items():
        file.write_text(text)
        print(file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
