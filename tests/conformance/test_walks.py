"""Ring 3: the pages that a newcomer follows, run as they are written, on one cluster each."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from tests.support.cluster import temporary_cluster
from tests.support.walk import check, commands_of

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*(ROOT / "docs/tutorial").glob("*.md"), *(ROOT / "docs/guides").glob("*.md")])


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "page", [page for page in PAGES if commands_of(page.read_text())], ids=lambda page: page.stem
)
def test_a_page_does_what_it_says(page: Path, tmp_path: Path) -> None:
    with temporary_cluster() as made:
        path = f"{Path(sys.executable).parent}{os.pathsep}{made.environment['PATH']}"
        count = check(
            page, environment={**made.environment, "PATH": path}, folder=tmp_path, seconds=500
        )
        print(f"{page.name}: {count} commands")
        assert not made.layout.directory.exists(), "a page leaves nothing behind"
