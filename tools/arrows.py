"""Check that the crates depend on one another only as ARCHITECTURE.md allows.

A crate is a wall, and an edge that nobody decided on is a hole in it. This reads `cargo metadata`
(normal, build and development dependencies alike: a test that reaches through a wall couples as
much as code does) and the crate roots, and gives one sentence per violation:

- an edge between crates that the arrows do not allow, and a crate without a row in the table;
- a library that does input or output, time, threads or randomness below a sans-I/O crate;
- a crate other than `runtime` and `py` without `#![forbid(unsafe_code)]`;
- a sans-I/O crate without the link to `pure_clippy.toml` that makes clippy refuse clocks, files,
  sockets, threads and the environment in it.

Run it from the root of the checkout; exit status 1 when something is found. Costs 0.1 s.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

PREFIX = "pureflash-"

ARROWS: Mapping[str, frozenset[str]] = {
    "proto": frozenset(),
    "lane": frozenset({"proto"}),
    "shard": frozenset({"lane"}),
    "front": frozenset({"proto"}),
    "runtime": frozenset({"proto"}),
    "node": frozenset({"shard", "front", "runtime"}),
    "sim": frozenset({"shard", "front"}),
    "py": frozenset({"node", "sim"}),
}
"""Each crate and the crates right below it. What those may use, it may use too."""

SANS_IO = ("proto", "lane", "shard", "front")

MAY_BE_UNSAFE = ("runtime", "py")
"""Every other crate forbids unsafe code."""

IO_LIBRARIES = frozenset(
    {
        *("async-std", "crossbeam-channel", "getrandom", "io-uring", "libc", "mio", "nix"),
        *("pyo3", "rand", "rayon", "rustix", "smol", "socket2", "tokio"),
    }
)
"""What no sans-I/O crate may depend on; their tests may (proptest draws randomness)."""


PURE_CLIPPY = Path("tools/pure_clippy.toml")
"""What clippy refuses in a sans-I/O crate; each has a link to it as `clippy.toml`."""


@dataclass(frozen=True, slots=True)
class Edge:
    """One direct dependency as Cargo reports it; `source` is a crate's short name."""

    source: str
    target: str
    is_development: bool
    is_ours: bool


def may_use(crate: str) -> frozenset[str]:
    """Give every crate that `crate` may depend on: all that its arrows reach."""
    below: set[str] = set()
    waiting = list(ARROWS[crate])
    while waiting:
        reached = waiting.pop()
        if reached not in below:
            below.add(reached)
            waiting.extend(ARROWS[reached])
    return frozenset(below)


def wrong_edges(edges: Iterable[Edge], crates: Iterable[str]) -> list[str]:
    """Say each way in which crates and edges differ from the table, in Cargo's order."""
    problems = [
        f"crate {crate}: no row in ARROWS of tools/arrows.py; decide what it may use, in an ADR"
        for crate in crates
        if crate not in ARROWS
    ]
    for edge in edges:
        if edge.source not in ARROWS:
            continue
        if edge.is_ours and edge.target not in may_use(edge.source):
            allowed = ", ".join(sorted(may_use(edge.source))) or "no other crate"
            problems.append(f"{edge.source} -> {edge.target}: {edge.source} may use {allowed}")
        if edge.source in SANS_IO and edge.target in IO_LIBRARIES and not edge.is_development:
            problems.append(f"{edge.source} -> {edge.target}: {edge.source} performs no I/O itself")
    return problems


def unfenced_crates(roots: Mapping[str, str]) -> list[str]:
    """Name each crate whose root, given as text, has to forbid unsafe code and does not."""
    return [
        f"{crate}: its root must say #![forbid(unsafe_code)]"
        for crate, text in roots.items()
        if crate not in MAY_BE_UNSAFE and "#![forbid(unsafe_code)]" not in text.splitlines()
    ]


def loose_crates(checkout: Path) -> list[str]:
    """Name each sans-I/O crate of a checkout whose clippy.toml is no link to the common one."""
    wanted = (checkout / PURE_CLIPPY).resolve()
    return [
        f"{crate}: crates/{crate}/clippy.toml must be a link to ../../{PURE_CLIPPY}"
        for crate in SANS_IO
        if not (link := checkout / "crates" / crate / "clippy.toml").is_symlink()
        or link.resolve() != wanted
        or not wanted.is_file()
    ]


def read_edges(metadata: Mapping[str, list[dict[str, object]]]) -> list[Edge]:
    """Read the direct dependencies out of the answer of `cargo metadata --no-deps`."""
    edges = []
    for package in metadata["packages"]:
        dependencies = package["dependencies"]
        assert isinstance(dependencies, list)
        for dependency in dependencies:
            name = str(dependency["name"])
            edges.append(
                Edge(
                    source=str(package["name"]).removeprefix(PREFIX),
                    target=name.removeprefix(PREFIX),
                    is_development=dependency["kind"] == "dev",
                    is_ours=name.startswith(PREFIX),
                )
            )
    return edges


def main() -> int:
    """Check this checkout; print what is wrong."""
    answer = subprocess.run(
        ["cargo", "metadata", "--locked", "--no-deps", "--format-version", "1"],
        check=True,
        capture_output=True,
        text=True,
    )
    metadata = json.loads(answer.stdout)
    crates = [str(package["name"]).removeprefix(PREFIX) for package in metadata["packages"]]
    roots = {crate: Path(f"crates/{crate}/src/lib.rs").read_text() for crate in crates}
    problems = wrong_edges(read_edges(metadata), crates)
    problems += [*unfenced_crates(roots), *loose_crates(Path.cwd())]
    for problem in problems:
        print(f"arrows: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
