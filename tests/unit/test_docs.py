"""Documentation that points somewhere points at something, and examples shown in it are true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_each_relative_link_leads_to_a_file(page: Path) -> None:
    targets = [target for target in LINK.findall(page.read_text()) if "://" not in target]
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert missing == []


def test_every_folder_of_the_docs_has_an_index_that_names_each_page() -> None:
    for folder in (ROOT / "docs").iterdir():
        if folder.is_dir():
            index = (folder / "README.md").read_text()
            pages = {page.name for page in folder.glob("*.md")} - {"README.md"}
            assert pages, f"{folder.name} has an index of nothing"
            assert {name for name in pages if f"({name})" not in index} == set()


@pytest.mark.parametrize("page", ["README.md", "docs/tutorial/first-volume.md"])
def test_who_begins_is_told_to_clone_and_to_set_up_once(page: str) -> None:
    text = " ".join((ROOT / page).read_text().split())
    assert "in a clone of this repository (`git clone`, then `cd` into it)" in text
    assert (
        "Run `tools/setup` once. If it prints an apt line, run that as root; it needs no second"
        " run." in text
    )


@pytest.mark.parametrize(
    "word",
    ["raw", "usable", "promised", "overcommit", "used", "out", "job", "export", "finding"],
)
def test_the_words_of_the_status_are_among_the_concepts(word: str) -> None:
    assert f"*{word}*" in (ROOT / "docs/concepts.md").read_text().lower()


def test_the_readme_has_all_rows_of_the_roadmap() -> None:
    rows = re.findall(r"^\| (\d+) \|", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    assert [int(row) for row in rows] == list(range(1, 33))


def test_every_declared_dependency_has_its_reason() -> None:
    reasons = (ROOT / "docs/dependencies.md").read_text()
    project = (ROOT / "pyproject.toml").read_text()
    names = re.findall(r'^    "([a-z0-9-]+)>=', project, flags=re.MULTILINE)
    assert len(names) > 10
    assert [name for name in names if name not in reasons] == []
