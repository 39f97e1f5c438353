"""The checks that guard the repository: each must notice what it is there for."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from tools import arrows, check, clean_room, lint, suite, tidy

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = (
    *("tools/setup", "tools/test", "tools/check", "tools/fmt", "tools/lock", "tools/deep"),
    "tools/clean-room",
    ".ci/run",
)


def edge(source: str, target: str, *, is_development: bool = False) -> arrows.Edge:
    return arrows.Edge(source, target, is_development, is_ours=target in arrows.ARROWS)


@pytest.mark.parametrize(
    ("source", "target"),
    [("lane", "proto"), ("shard", "proto"), ("node", "lane"), ("py", "lane"), ("py", "sim")],
)
def test_an_edge_along_the_arrows_is_allowed_also_over_several_crates(
    source: str, target: str
) -> None:
    assert arrows.wrong_edges([edge(source, target)], [source]) == []


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("proto", "lane"),
        ("lane", "runtime"),
        ("front", "lane"),
        ("runtime", "sim"),
        ("sim", "runtime"),
        ("sim", "node"),
        ("node", "py"),
    ],
)
@pytest.mark.parametrize("is_development", [False, True])
def test_an_edge_against_the_arrows_is_named_with_what_is_allowed(
    source: str, target: str, *, is_development: bool
) -> None:
    (problem,) = arrows.wrong_edges([edge(source, target, is_development=is_development)], [source])
    assert problem.startswith(f"{source} -> {target}: {source} may use ")


def test_a_crate_that_nobody_decided_on_is_refused() -> None:
    (problem,) = arrows.wrong_edges([], ["proto", "helpers"])
    assert problem.startswith("crate helpers: no row")


def test_a_library_that_does_io_stays_above_the_machines() -> None:
    (problem,) = arrows.wrong_edges([edge("lane", "libc")], ["lane"])
    assert problem == "lane -> libc: lane performs no I/O itself"
    assert arrows.wrong_edges([edge("lane", "rand", is_development=True)], ["lane"]) == []
    assert arrows.wrong_edges([edge("runtime", "libc")], ["runtime"]) == []


def test_a_machine_without_its_fence_is_named() -> None:
    fenced = "//! Head.\n#![forbid(unsafe_code)]\n"
    roots = {"proto": fenced, "lane": "// #![forbid(unsafe_code)]\n", "runtime": "", "node": ""}
    assert arrows.unfenced_crates(roots) == [
        "lane: its root must say #![forbid(unsafe_code)]",
        "node: its root must say #![forbid(unsafe_code)]",
    ]


def test_a_machine_without_the_link_to_what_it_may_not_name_is_named(tmp_path: Path) -> None:
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools/pure_clippy.toml").touch()
    for crate in arrows.SANS_IO:
        (tmp_path / "crates" / crate).mkdir(parents=True)
        (tmp_path / "crates" / crate / "clippy.toml").symlink_to("../../tools/pure_clippy.toml")
    assert arrows.loose_crates(tmp_path) == []
    (tmp_path / "crates/shard/clippy.toml").unlink()
    (tmp_path / "crates/lane/clippy.toml").unlink()
    (tmp_path / "crates/lane/clippy.toml").touch()
    assert [problem.partition(":")[0] for problem in arrows.loose_crates(tmp_path)] == [
        "lane",
        "shard",
    ]
    assert arrows.loose_crates(ROOT) == []


IMPURE = """//! A machine that does what none may.
/// A clock.
pub fn clock() -> std::time::Instant {
    std::time::Instant::now()
}
/// A file, a socket, a thread, a setting.
pub fn others() {
    let _ = std::fs::read("x");
    let _ = std::net::TcpStream::connect("127.0.0.1:1");
    let _ = std::thread::spawn(|| ());
    let _ = std::env::var("X");
    let _: std::collections::HashMap<u8, u8> = std::collections::HashMap::new();
}
"""


def test_clippy_finds_a_clock_and_every_other_way_out_of_a_machine(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src/lib.rs").write_text(IMPURE)
    (tmp_path / "clippy.toml").symlink_to(ROOT / arrows.PURE_CLIPPY)
    (tmp_path / "Cargo.toml").write_text(
        '[package]\nname = "impure"\nversion = "0.0.0"\nedition = "2024"\n[workspace]\n'
    )
    environment = {name: value for name, value in os.environ.items() if name != "CARGO_TARGET_DIR"}
    told = subprocess.run(
        ["cargo", "clippy", "--quiet", "--offline", "--", "-D", "warnings"],
        check=False,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert told.returncode != 0
    for name in (
        "type `std::time::Instant`",
        "type `std::net::TcpStream`",
        "method `std::fs::read`",
        "method `std::thread::spawn`",
        "method `std::env::var`",
        "method `std::collections::HashMap::new`",
    ):
        assert f"use of a disallowed {name}" in told.stderr, told.stderr
    (tmp_path / "src/lib.rs").write_text("//! A machine.\n")
    subprocess.run(
        ["cargo", "clippy", "--quiet", "--offline", "--", "-D", "warnings"],
        check=True,
        cwd=tmp_path,
        env=environment,
    )


def test_edges_are_read_from_cargo_metadata() -> None:
    metadata: dict[str, list[dict[str, object]]] = {
        "packages": [
            {
                "name": "pureflash-lane",
                "dependencies": [
                    {"name": "pureflash-proto", "kind": None},
                    {"name": "proptest", "kind": "dev"},
                ],
            }
        ]
    }
    assert arrows.read_edges(metadata) == [
        arrows.Edge("lane", "proto", is_development=False, is_ours=True),
        arrows.Edge("lane", "proptest", is_development=True, is_ours=False),
    ]


@pytest.mark.parametrize("path", ["/home/" + "ann/x", "/Users/" + "ann/x", "/root" + "/.cargo"])
def test_the_path_of_a_home_in_a_tracked_file_is_found(path: str) -> None:
    (problem,) = tidy.findings("docs/x.md", f"see {path} there", Path("/srv/git/pureflash"))
    assert "holds the path of a machine" in problem


@pytest.mark.parametrize("text", ["$HOME/x", "~/pf", "https://a.example/home/ann/", "/var/log/x"])
def test_a_path_that_everybody_has_is_no_finding(text: str) -> None:
    assert list(tidy.findings("docs/x.md", text, Path("/srv/git/pureflash"))) == []


def test_the_place_of_the_checkout_and_its_parent_are_found() -> None:
    checkout = Path("/srv/git/pureflash")
    assert list(tidy.machine_paths("cd /srv/git/pureflash/tools", checkout)) == [
        "/srv/git/pureflash",
        "/srv/git",
    ]
    assert list(tidy.machine_paths("/srv/other", checkout)) == []


def test_a_lock_names_no_registry_but_crates_io() -> None:
    checkout = Path("/srv/git/pureflash")
    good = 'source = "registry+https://github.com/rust-lang/crates.io-index"'
    assert list(tidy.findings("Cargo.lock", good, checkout)) == []
    for name in ("Cargo.lock", "requirements/dev.txt"):
        text = "--index-url https://packages.example/simple"
        assert len(list(tidy.findings(name, text, checkout))) == 1
    assert list(tidy.findings("README.md", "https://packages.example/simple", checkout)) == []


@pytest.mark.parametrize(
    "text",
    [
        "import time\n\ntime.sleep(1)\n",
        "async def f() -> None:\n    await asyncio.sleep(0.01)\n",
        "from unittest.mock import Mock\n",
        "import unittest.mock\n",
        "from unittest import mock\n",
    ],
)
def test_a_test_that_sleeps_or_mocks_is_named(text: str) -> None:
    checkout = Path("/srv/git/pureflash")
    assert len(list(tidy.findings("tests/unit/test_x.py", text, checkout))) == 1
    assert list(tidy.findings("python/pureflash/x.py", text, checkout)) == []


@pytest.mark.parametrize(
    "text", ["await asyncio.sleep(0)\n", "# time.sleep(1)\n", 'run("import time; time.sleep(9)")\n']
)
def test_a_test_that_gives_others_a_turn_or_only_speaks_of_sleep_does_not(text: str) -> None:
    assert list(tidy.findings("tests/unit/test_x.py", text, Path("/srv/git/pureflash"))) == []


def test_the_tally_adds_cargo_up_and_keeps_what_pytest_said() -> None:
    tally = suite.Tally()
    for line in (
        "test result: ok. 12 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished",
        "test result: FAILED. 3 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out",
        "======================== 83 passed, 1 skipped in 4.20s ========================\n",
        "======== 83 passed in 64.20s (0:01:04) ========",
        "================ test session starts ================",
        "tests/unit/test_x.py ....... [ 50%]",
    ):
        tally.read(line)
    assert (tally.cargo_passed, tally.cargo_failed, tally.cargo_ignored) == (15, 2, 1)
    assert tally.pytest_lines == ["83 passed, 1 skipped in 4.20s", "83 passed in 64.20s (0:01:04)"]


def test_the_summary_ends_with_the_runners_own_lines() -> None:
    tally = suite.Tally(cargo_passed=7, pytest_lines=["83 passed in 4.20s"])
    rows = [("setup", "ok", 1.5, 3), ("ring 1", "not written", None, 2)]
    lines = suite.summary(rows, tally).splitlines()
    assert lines[-2:] == ["cargo: 7 passed, 0 failed, 0 ignored", "83 passed in 4.20s"]
    assert any(line.split() == ["setup", "ok", "1.5", "s", "180", "s"] for line in lines)


def test_a_failing_command_fails_its_step_and_its_output_is_passed_on(
    capfd: pytest.CaptureFixture[str],
) -> None:
    failing = suite.Step("x", 1, (("sh", "-c", "echo seen; exit 3"), ("true",)))
    assert not suite.run_step(failing, suite.Tally())
    assert "seen" in capfd.readouterr().out


def test_check_leaves_out_what_is_slow_and_nothing_else() -> None:
    quick, whole = (check.unit_tests(with_slow=with_slow).command for with_slow in (False, True))
    at = quick.index("-m", quick.index("pytest"))
    assert quick[at : at + 2] == ("-m", "not slow")
    assert (*quick[:at], *quick[at + 2 :]) == whole
    step = next(step for step in suite.steps(has_networks=True) if step.name == "ring 0: python")
    assert step.commands[0][-1] == whole[-1] == "tests/unit"
    assert "not slow" not in step.commands[0], "make test runs all of them"


def test_every_job_runs_and_is_timed_also_after_one_that_failed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    failing = lint.Job("bad", ("sh", "-c", "echo its words; exit 3"))
    missing = lint.Job("missing", ("no-such-program",))
    assert not lint.run_jobs("lint", [failing, missing, lint.Job("good", ("true",))])
    told = capsys.readouterr().out
    assert "its words" in told
    assert "no-such-program is not installed; run tools/setup" in told
    assert any(line.split()[:3] == ["lint:", "good", "ok"] for line in told.splitlines())
    assert "lint: 2 of 3 FAILED in " in told
    assert lint.run_jobs("lint", [lint.Job("good", ("true",))])


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_script_is_executable_and_parses(script: str) -> None:
    assert os.access(ROOT / script, os.X_OK)
    subprocess.run(["bash", "-n", ROOT / script], check=True)


def test_setup_without_root_prints_the_one_apt_line_and_exits_2(tmp_path: Path) -> None:
    # Only what the script itself needs, an unprivileged `id`, and no cargo, fio or qemu-img.
    for tool in ("bash", "dirname", "sed", "head", "awk", "sort", "tr", "date", "python3"):
        found = subprocess.run(["which", tool], check=True, capture_output=True, text=True)
        (tmp_path / tool).symlink_to(found.stdout.strip())
    for name, body in (("id", "echo 1000"), ("apt-get", "exit 99"), ("cargo", "echo cargo 1.60.0")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    script = (ROOT / "tools/setup").read_text().replace("/sbin", "/none")
    environment = (ROOT / "tools/environment.sh").read_text().replace("/usr/bin/", "/none/")
    checkout = tmp_path / "checkout"
    (checkout / "tools").mkdir(parents=True)
    (checkout / "tools/setup").write_text(script)
    (checkout / "tools/environment.sh").write_text(environment)
    (checkout / "Cargo.toml").write_text((ROOT / "Cargo.toml").read_text())
    result = subprocess.run(
        [tmp_path / "bash", checkout / "tools/setup"],
        check=False,
        capture_output=True,
        text=True,
        env={"PATH": str(tmp_path), "HOME": str(tmp_path)},
    )
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    packages = line.partition("--no-install-recommends ")[2].split()
    assert line.startswith("setup: please run:  sudo apt-get install -y ")
    assert {"cargo-web", "rustc-web", "fio", "qemu-utils", "libnbd-bin"} <= set(packages)
    assert not (checkout / ".venv").exists()


def test_the_clean_room_takes_the_mirror_of_the_main_archive() -> None:
    targets = (
        "DEP-11 bookworm main http://mirror.example/debian/\n"
        "Packages bookworm-security main http://mirror.example/security/\n"
        "Packages bookworm main http://mirror.example/debian/\n"
    )
    assert clean_room.choose_mirror(targets) == "http://mirror.example/debian/"
    assert clean_room.choose_mirror("Packages trixie main http://mirror.example/\n") is None
    assert clean_room.choose_mirror("") is None


def test_the_clean_room_names_what_was_left_and_not_what_was_there() -> None:
    before = ["/srv/stranger/pf/bin/pf"]
    after = [*before, "/tmp/pureflash-65534/x.sock", "/srv/stranger/pf/__pycache__/a.pyc"]
    assert clean_room.left_over(before, after) == ["/tmp/pureflash-65534/x.sock"]
    assert clean_room.left_over(after, before) == []


def test_the_clean_room_installs_what_the_tutorial_asks_for() -> None:
    page = (ROOT / "docs/tutorial/first-volume.md").read_text()
    (line,) = clean_room.package_lines(page)
    assert line == ["apt-get", "install", "-y", "e2fsprogs", "qemu-utils"]


def test_the_clean_room_walks_in_a_login_shell_and_with_what_the_tutorial_exports(
    tmp_path: Path,
) -> None:
    line = clean_room.export_line((ROOT / "docs/tutorial/first-volume.md").read_text())
    assert line is not None
    words = clean_room.as_reader(line, ["printenv", "PATH"])
    done = subprocess.run(
        words, env={"HOME": str(tmp_path)}, check=True, capture_output=True, text=True
    )
    login = "/usr/local/bin:/usr/bin:/bin:/usr/local/games:/usr/games"
    assert done.stdout == f"{tmp_path}/pf/bin:{login}:/usr/sbin\n"
    assert clean_room.export_line("no $ export PATH=here") is None


def test_the_clean_room_reads_the_line_that_setup_prints() -> None:
    line = "setup: please run:  sudo apt-get install -y --no-install-recommends git fio \n"
    wanted = ["apt-get", "install", "-y", "--no-install-recommends", "git", "fio"]
    assert clean_room.apt_line("before\n" + line) == wanted
    assert clean_room.apt_line("setup: ready in 1 s\n") is None
    assert clean_room.apt_line("setup: please run:  sudo rm -rf x\n") is None


def test_the_clean_room_refuses_without_root_before_it_does_anything(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setattr("sys.argv", ["clean-room", "--folder", str(tmp_path)])
    assert clean_room.main() == 2
    assert "root is needed" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
