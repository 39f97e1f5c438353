"""Real processes on loopback: a cluster with its own home, ports and directory."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tests.support.small_host import small_host

from pureflash.client.api import Api
from pureflash.errors import PureFlashError
from pureflash.model.layout import Layout

PF: Final = str(Path(sys.executable).with_name("pf"))
LOOK_S: Final = 0.1
COMMAND_S: Final = 120
EXPECTED_WARNINGS: Final = frozenset({"STORE_OFFLINE", "STORE_SUSPECTED", "VOLUME_PARKED"})
"""Health codes that a story which kills a process may log; anything else is a failure."""


@dataclass
class RealCluster:
    """A cluster of `pf up --detach` below `home`."""

    home: Path
    layout: Layout
    environment: dict[str, str]
    enter: tuple[str, ...] = ()
    """What goes before a command so that it sees the cluster's files; empty: everybody does."""
    allowed: set[str] = field(default_factory=set)
    """Health codes of warnings that the story explains."""
    allowed_errors: set[str] = field(default_factory=set)
    """Events of errors that the story explains."""
    has_torn_lines: bool = False
    """Whether a full disk may have cut lines of logs short."""

    def pf(self, *arguments: str, status: int = 0) -> str:
        """Run `pf`; gives what it printed, and insists on its exit status."""
        result = self.run([PF, *arguments])
        assert result.returncode == status, f"pf {arguments}: {result.stdout}{result.stderr}"
        return result.stdout + result.stderr

    def run(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        """Run any program in the cluster's environment."""
        return subprocess.run(
            [*self.enter, *command],
            check=False,
            capture_output=True,
            text=True,
            env=self.environment,
            timeout=COMMAND_S,
        )

    def api(self) -> Api:
        """Give a client of this cluster."""
        # Read, not asked of `pf config show`: the loops that wait for something look here.
        settings = tomllib.loads(self.layout.config("c1").read_text())
        address: str = settings["node"]["listen"]
        return Api(address, self.layout.token.read_text().strip(), source="the test")

    def children(self) -> dict[str, dict[str, Any]]:
        """Give what the supervisor knows, by name."""
        report = json.loads(self.layout.supervisor_file.read_text())
        return {child["name"]: child for child in report["children"]}

    def kill(self, name: str) -> int:
        """Kill a child with -9; gives the pid that it had."""
        pid: int = self.children()[name]["pid"]
        os.kill(pid, signal.SIGKILL)
        return pid

    def kill_and_await(self, name: str) -> None:
        """Kill a child with -9 and wait until the supervisor has it running again."""
        killed = self.kill(name)

        def is_back() -> bool:
            child = self.children()[name]
            return bool(child["state"] == "running" and child["pid"] != killed)

        self.wait(f"a new life of {name}", is_back)

    @contextlib.contextmanager
    def stopped(self, name: str) -> Iterator[None]:
        """Keep a child stopped with SIGSTOP during the block; it must live on after it."""
        pid = self.children()[name]["pid"]
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(pid, signal.SIGCONT)
        assert self.children()[name]["pid"] == pid, "it woke up, it was not started again"

    def export(self, volume: str, *flags: str) -> str:
        """Export a volume through NBD; gives the URI."""
        return self.pf("export", "nbd", volume, *flags, "-o", "name").splitlines()[0]

    def primary_of(self, volume: str) -> str:
        """Name the store that serves the first shard of a volume now."""
        with self.api() as api:
            return f"s{api.volume(volume).shards[0].primary}"

    def wait_whole(self, volume: str) -> None:
        """Wait until every replica of the first shard of a volume is in sync again."""

        def is_whole() -> bool:
            with self.api() as api:
                shard = api.volume(volume).shards[0]
            return shard.state == "healthy" and not shard.learners

        self.wait("all replicas in sync", is_whole)

    def wait(self, what: str, is_so: Callable[[], bool], *, seconds: float = 60) -> None:
        """Look until it is so, with a bound; another process gives us no event to await."""
        pause = threading.Event()
        deadline = time.monotonic() + seconds
        while True:
            try:
                if is_so():
                    return
            except (PureFlashError, OSError, KeyError):
                pass  # a part is just restarting
            assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
            pause.wait(LOOK_S)

    def wait_healthy(self) -> None:
        """Wait until nothing is wrong."""

        def is_healthy() -> bool:
            with self.api() as api:
                return api.cluster().state == "healthy"

        try:
            self.wait("healthy", is_healthy)
        except AssertionError as problem:
            raise AssertionError(f"{problem}\n{self.run([PF, 'status']).stdout}") from None

    def processes(self) -> list[int]:
        """Give the pids of all processes that have this directory on their command line."""
        found: list[int] = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    line = (entry / "cmdline").read_bytes()
                except OSError:
                    continue  # it has just ended
                if (
                    os.fsencode(self.environment["PF_DATA"]) in line
                    and int(entry.name) != os.getpid()
                ):
                    found.append(int(entry.name))
        return found

    def check_logs(self) -> None:
        """Fail for every WARNING or ERROR that the story does not explain."""
        for path in self.layout.log("x").parent.glob("*.jsonl"):
            for line in path.read_text().splitlines():
                try:
                    entry = json.loads(line)
                except ValueError:
                    assert self.has_torn_lines, f"{path.name}: {line}"
                    continue
                is_bad = {
                    "ERROR": entry["event"] not in self.allowed_errors,
                    "WARNING": entry.get("code") not in self.allowed,
                }.get(entry["level"], False)
                assert not is_bad, f"{path.name}: {line}"


@contextlib.contextmanager
def temporary_cluster(*, host_bytes: int | None = None) -> Iterator[RealCluster]:
    """Give a directory for a cluster; whatever runs there is stopped afterwards.

    With `host_bytes` the directory is a file system of that size, which nothing else uses.
    """
    # A short path: unix sockets allow 107 bytes.
    with tempfile.TemporaryDirectory(prefix="pf-") as text, contextlib.ExitStack() as stack:
        home = Path(text)
        (home / "run").mkdir(mode=0o700)
        layout, enter = Layout(home / "data"), tuple[str, ...]()
        if host_bytes is not None:
            host = stack.enter_context(small_host(home / "data", host_bytes))
            layout, enter = Layout(host.seen), host.enter
        kept = {key: value for key, value in os.environ.items() if not key.startswith("PF_")}
        environment = {
            **kept,
            "HOME": text,
            "XDG_CONFIG_HOME": str(home / "config"),
            "XDG_RUNTIME_DIR": str(home / "run"),
            "PF_DATA": str(home / "data"),
        }
        made = RealCluster(home, layout, environment, enter)
        try:
            yield made
            if made.layout.directory.exists():
                made.check_logs()
        finally:
            made.run([PF, "down"])
            for pid in made.processes():
                os.kill(pid, signal.SIGKILL)
            shutil.rmtree(layout.directory, ignore_errors=True)
