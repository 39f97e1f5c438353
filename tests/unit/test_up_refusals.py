"""`pf up` where it cannot be: a clear error with the documented status, and nothing left behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pureflash.cli.outcome import Exit

PF = str(Path(sys.executable).with_name("pf"))


def up(data: Path, home: Path, *flags: str) -> tuple[int, str]:
    """Run `pf up`; gives its exit status and what it said."""
    result = subprocess.run(
        [PF, "up", "--data", str(data), *flags],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        env={"HOME": str(home), "PATH": "/usr/bin:/bin"},
    )
    return result.returncode, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("place", "more", "status", "cause", "step"),
    [
        ("file/data", (), Exit.USAGE, "cannot write", "--data"),
        ("file/data", ("--detach",), Exit.USAGE, "cannot write", "--data"),
        ("new", ("--disk", "500T"), Exit.FAILED, "10 % of all disks", "a smaller --disk"),
        ("new", ("--disk", "500T", "--detach"), Exit.FAILED, "% of all disks", "smaller --disk"),
        ("new", ("--disk", "4G", "--journal", "3G"), Exit.USAGE, "a journal of", "use 1M to 256M"),
        ("new", ("--disk", "10"), Exit.USAGE, "10G for GiB", "10GB for decimal"),
        ("new", ("--stores", "17"), Exit.USAGE, "17 stores", "1 to 16"),
        ("damaged", (), Exit.USAGE, "cluster.toml is damaged", "restore it"),
    ],
)
def test_a_cluster_that_cannot_be_is_refused(
    tmp_path: Path, place: str, more: tuple[str, ...], status: Exit, cause: str, step: str
) -> None:
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/cluster.toml").write_text("[cluster]\n")
    found, said = up(tmp_path / place, tmp_path / "home", *more)
    assert (found, cause in said, step in said) == (status, True, True), said
    assert "Traceback" not in said
    assert not (tmp_path / "new/cluster.toml").exists()
    left = {entry.name for entry in (tmp_path / "new").rglob("*")}
    assert left <= {"run", "up.lock"}, "no cluster, and no part of one"
    assert not (tmp_path / "home").exists(), "the context names no cluster that is none"
