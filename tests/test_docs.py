"""The pages: every link leads somewhere, and the front page is short."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)|(?:src|srcset)=\"([^\"]+)\"", page.read_text())
    near = [link for pair in links for link in pair if link and "://" not in link]
    assert [link for link in near if not (page.parent / link).exists()] == []


def test_the_front_page_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 170


def test_the_core_has_as_many_lines_as_is_said() -> None:
    num_lines = sum(len(file.read_text().splitlines()) for file in (ROOT / "scheduler" / "core").glob("*.py"))
    assert num_lines <= 3000
    for page in ("README.md", "docs/architecture.md"):
        assert f"{num_lines:,} lines" in (ROOT / page).read_text()
