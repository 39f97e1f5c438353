"""The main job: an image on a volume with three replicas, whose primary dies under load.

`make demo` runs it. Everything is done as a user would: the `pf` command, `qemu-img`, `fio` and
`e2fsck`, unmodified, against a cluster of real processes in a directory of its own.

1. `pf up` with three stores, three processes; two volumes of three replicas; an ext4 image made
   from the machine's own files goes in by qemu-img.
2. fio writes and verifies the second volume over NBD while the store that is its primary is killed
   by pid with SIGKILL and stays down for 15 s; another takes over, fio must not see one error and
   no write may take 5 s; the store comes back and is made equal; then the same with its successor.
3. The image comes out: same hash, `e2fsck` finds nothing; and once more after the whole cluster was
   stopped and started.

It ends with a summary in figures and leaves nothing behind unless KEEP=1. Exit status 0 means that
every line of the summary was measured and in order.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PF = str(Path(sys.executable).parent / "pf")
STORES = 3
IMAGE_MIB = 192
LOAD_MIB = 256
RUNTIME_SECONDS = 75
KILLS = 2
FIRST_KILL_SECONDS = 4
DOWN_SECONDS = 15
WRITE_SECONDS_MAX = 5.0
HEALTHY_SECONDS = 60
RESYNC_RATIO_MAX = 1.2
RESYNC_MIB_MORE = 8
"""What a resync may copy beyond what the other copies have that it lacks."""
LOOK_SECONDS = 0.25
SAY_SECONDS = 5
COMMAND_SECONDS = 180
"""Bound of one command: generous, because the verdict is its result and not its speed."""


class DemoProblem(Exception):
    """A step failed; the text is what a reader needs to see."""


@dataclass(slots=True)
class Summary:
    """What was shown; printed at the end."""

    lines: list[tuple[str, str]] = field(default_factory=list)

    def add(self, what: str, result: str) -> None:
        """Add one line and say it at once."""
        self.lines.append((what, result))
        print(f"  ok  {what}: {result}", flush=True)


class Cluster:
    """A cluster in a directory of its own, driven by the `pf` command."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.environment = {
            **os.environ,
            "PF_DATA": str(directory / "data"),
            "XDG_CONFIG_HOME": str(directory / "config"),
            "XDG_RUNTIME_DIR": str(directory / "run"),
            "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
        }
        (directory / "run").mkdir(mode=0o700)

    def run(self, *command: str) -> str:
        """Run a command to its end and give its output.

        Errors: DemoProblem with the end of what it printed.
        """
        done = subprocess.run(
            command,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=COMMAND_SECONDS,
            check=False,
        )
        if done.returncode != 0:
            text = (done.stdout + done.stderr)[-3000:]
            raise DemoProblem(f"{' '.join(command)} ended with {done.returncode}:\n{text}")
        return done.stdout

    def pf(self, *arguments: str) -> str:
        """Run one `pf` command."""
        return self.run(PF, *arguments)

    def pf_json(self, *arguments: str) -> Any:
        """Run one `pf` command and read its JSON."""
        return json.loads(self.pf(*arguments, "-o", "json"))

    def export(self, volume: str) -> str:
        """Export a volume over NBD and give its URI."""
        return str(self.pf_json("export", "nbd", volume)["uri"])

    def pid_of(self, name: str) -> int:
        """Give the pid of a process as its ready file says."""
        ready = json.loads((self.directory / f"data/run/{name}.ready").read_text())
        return int(ready["pid"])

    def shard(self, volume: str) -> dict[str, Any]:
        """Give the first shard of a volume as the conductor shows it."""
        shown: dict[str, Any] = self.pf_json("volume", "show", volume)["shards"][0]
        return shown


# --------------------------------------------------------------------------------------- steps --


def make_image(cluster: Cluster, image: Path) -> str:
    """Make an ext4 file system from the machine's own files; gives its SHA-256."""
    content = cluster.directory / "content"
    content.mkdir()
    copied = 0
    for source in sorted(Path("/usr/share/doc").glob("*/copyright")):
        text = source.read_bytes()
        (content / f"{source.parent.name}.txt").write_bytes(text)
        copied += len(text)
        if copied > 32 << 20:
            break
    (content / "blob").write_bytes(os.urandom(64 << 20))
    cluster.run("mke2fs", "-q", "-t", "ext4", "-d", str(content), str(image), f"{IMAGE_MIB}M")
    shutil.rmtree(content)
    return sha256(image)


def sha256(path: Path) -> str:
    """Hash a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fio_command(uri: str, *extra: str) -> list[str]:
    """Verify what is written, one request per block at a time (docs/internals/testing.md)."""
    return [
        "fio",
        "--name=load",
        "--ioengine=nbd",
        f"--uri={uri}",
        "--bs=4k",
        "--iodepth=32",
        f"--size={LOAD_MIB}M",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--serialize_overlap=1",
        "--output-format=json",
        "--randseed=7",
        *extra,
    ]


def kill_primary(cluster: Cluster, volume: str) -> tuple[str, int, float]:
    """Kill the store that serves a volume; gives its name, its pid and how long nobody served."""
    before = cluster.shard(volume)
    name = f"s{before['primary']}"
    pid = cluster.pid_of(name)
    print(
        f"      kill -9 {pid}: {name}, the primary; it stays down for {DOWN_SECONDS} s", flush=True
    )
    started = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    while (shard := cluster.shard(volume))["primary"] == before["primary"]:
        if time.monotonic() - started > HEALTHY_SECONDS:
            raise DemoProblem(f"nobody took over from {name}: {shard['reason']}")
        time.sleep(LOOK_SECONDS)
    took = time.monotonic() - started
    say(f"s{shard['primary']} is primary, epoch {shard['epoch']}, after {took:.1f} s")
    return name, pid, took


def say(text: str) -> None:
    """Tell how far it is."""
    print(f"      {text}", flush=True)


def wait_whole(cluster: Cluster, volume: str) -> tuple[float, int]:
    """Wait until all three replicas are in sync; gives the seconds and the MiB copied."""
    started, said, copied = time.monotonic(), 0.0, 0
    while True:
        shard = cluster.shard(volume)
        waited = time.monotonic() - started
        copied = max([copied, *(member["regions_copied"] or 0 for member in shard["members"])])
        if shard["state"] == "healthy" and len(shard["isr"]) == STORES:
            return waited, copied
        if waited > HEALTHY_SECONDS:
            raise DemoProblem(f"not whole after {waited:.0f} s: {shard['reason']}")
        if waited - said > SAY_SECONDS:
            said = waited
            say(f"{shard['state']}: {shard['reason']}")
        time.sleep(LOOK_SECONDS)


def wait_equal(cluster: Cluster) -> str:
    """Wait for the resync of the load's volume; gives what it took, and insists on little."""
    took, copied = wait_whole(cluster, "load")
    # The load writes all of its blocks at random: every region may be dirty.
    if copied > LOAD_MIB * RESYNC_RATIO_MAX + RESYNC_MIB_MORE:
        raise DemoProblem(f"{copied} MiB were copied where {LOAD_MIB} may be dirty")
    return f"{took:.1f} s, {copied} MiB copied of at most {LOAD_MIB} MiB dirty"


def load_under_kills(cluster: Cluster, uri: str, summary: Summary) -> None:
    """Let fio write and verify while one primary after the other is killed and comes back."""
    command = fio_command(
        uri, "--rw=randwrite", "--time_based", f"--runtime={RUNTIME_SECONDS}", "--do_verify=1"
    )
    kills: list[tuple[str, int, float]] = []
    output = cluster.directory / "fio.json"
    with (
        output.open("w") as stream,
        subprocess.Popen(
            command,
            cwd=cluster.directory,  # fio leaves a state file where it stands
            env=cluster.environment,
            stdout=stream,
            stderr=subprocess.STDOUT,
        ) as fio,
    ):
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                fio.wait(timeout=FIRST_KILL_SECONDS)
            for _ in range(KILLS):
                kills.append(kill_primary(cluster, "load"))
                name, pid, _ = kills[-1]
                while fio.poll() is None and not is_back(cluster, name, pid):
                    time.sleep(LOOK_SECONDS)
                say(f"{name} is back: {cluster.shard('load')['reason'] or 'in sync'}")
                summary.add(f"{name} in sync again after its return", wait_equal(cluster))
            if fio.poll() == 0:
                raise DemoProblem(
                    f"the machine is too slow: fio was done with its {RUNTIME_SECONDS} s, without"
                    " an error, before the second store was back"
                )
            if fio.poll() is not None:
                raise DemoProblem(f"fio saw an error: {output.read_text()[-2000:]}")
            status = fio.wait(timeout=COMMAND_SECONDS)
        except subprocess.TimeoutExpired as late:
            raise DemoProblem("fio does not end: the volume is stuck") from late
        finally:
            if fio.poll() is None:
                fio.kill()
    report = fio_report(output)
    job = report["jobs"][0]
    if status != 0 or job["error"] != 0:
        raise DemoProblem(f"fio saw an error: status {status}, error {job['error']}")
    writes, verified = job["write"]["total_ios"], job["read"]["total_ios"]
    if verified == 0:
        raise DemoProblem("fio verified nothing")
    longest = job["write"]["clat_ns"]["max"] / 1e9
    if longest >= WRITE_SECONDS_MAX:
        raise DemoProblem(f"a write took {longest:.1f} s; {WRITE_SECONDS_MAX:g} s is the limit")
    shown = ", ".join(f"{name} (pid {pid})" for name, pid, _ in kills)
    summary.add("primary killed with -9 under load", shown)
    summary.add("another is primary", ", ".join(f"after {took:.1f} s" for _, _, took in kills))
    summary.add(
        "fio 4 KiB random writes, depth 32, through all of it",
        f"{writes} writes, {verified} verified, no error, {job['write']['iops']:.0f} IOPS; longest"
        f" wait of one write {longest:.2f} s",
    )


def is_back(cluster: Cluster, name: str, pid: int) -> bool:
    """Whether a store has a new process; between two processes it has no ready file."""
    try:
        return cluster.pid_of(name) != pid
    except FileNotFoundError:
        return False


def count_wraps(cluster: Cluster) -> str:
    """Say how often journals have wrapped: what is recovered and resynced has to be that, too."""
    wraps = cluster.pf_json("status")["counters"].get("journal_wraps", 0)
    if wraps < STORES:
        raise DemoProblem(f"the journals wrapped only {wraps} times: the load was too small")
    return f"{wraps} times in all, since the last start of each store"


def fio_report(path: Path) -> Any:
    """Read fio's JSON, which its warnings may precede."""
    text = path.read_text()
    start = text.find("{")
    if start < 0:
        raise DemoProblem(f"fio said:\n{text[-2000:]}")
    return json.loads(text[start:])


def main_job(cluster: Cluster, summary: Summary) -> None:
    """Run all steps."""
    image, back = cluster.directory / "in.img", cluster.directory / "out.img"
    before = make_image(cluster, image)
    started = time.monotonic()
    cluster.pf(
        *("up", "--stores", str(STORES), "--disk", "4G", "--journal", "16M", "--detach"),
        *("--restart-delay", f"{DOWN_SECONDS}s"),
    )
    for volume, size in [("image", IMAGE_MIB), ("load", LOAD_MIB)]:
        cluster.pf("volume", "create", volume, f"{size}MiB", "--replicas", str(STORES))
    pids = [cluster.pid_of(f"s{store}") for store in range(1, STORES + 1)]
    summary.add(f"pf up, {STORES} stores, two volumes", f"{time.monotonic() - started:.1f} s")
    summary.add("store processes", f"pids {pids}")
    image_uri, load_uri = cluster.export("image"), cluster.export("load")

    started = time.monotonic()
    cluster.run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", str(image), image_uri)
    summary.add(
        "ext4 image in by qemu-img", f"{IMAGE_MIB} MiB in {time.monotonic() - started:.1f} s"
    )
    load_under_kills(cluster, load_uri, summary)
    summary.add("journals of 16 MiB wrapped", count_wraps(cluster))

    for volume in ("image", "load"):
        job = cluster.pf_json("volume", "verify", volume)
        if job["state"] != "succeeded" or not job["reason"].startswith(f"{STORES} copies"):
            raise DemoProblem(f"the copies of {volume} are not equal: {job['reason']}")
        summary.add(f"pf volume verify {volume}", f"{job['reason']}, {job['done']} MiB each")

    cluster.run("qemu-img", "convert", "-f", "raw", "-O", "raw", image_uri, str(back))
    after = sha256(back)
    if after != before:
        raise DemoProblem(f"the image changed: {before} went in, {after} came out")
    summary.add("image out by qemu-img", f"same SHA-256, {after[:16]}...")
    cluster.run("e2fsck", "-fn", str(back))
    summary.add("e2fsck -fn on it", "clean")

    cluster.pf("down")
    cluster.pf("up", "--detach")
    back.unlink()
    cluster.run("qemu-img", "convert", "-f", "raw", "-O", "raw", image_uri, str(back))
    if sha256(back) != before:
        raise DemoProblem("the image changed over a restart of the cluster")
    summary.add("stopped and started again", "same volumes, same exports, same SHA-256")


def leave(cluster: Cluster) -> None:
    """Take the cluster down and prove that nothing of it is left."""
    pids = [
        json.loads(ready.read_text())["pid"]
        for ready in (cluster.directory / "data/run").glob("*.ready")
    ]
    cluster.pf("down", "--purge", "--yes")
    left = [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    if left or (cluster.directory / "data").exists():
        raise DemoProblem(f"pf down --purge left processes {left} or data behind")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demonstration in a new directory; exit status 0 only when all of it was shown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.parse_args(arguments)
    directory = Path(tempfile.mkdtemp(prefix="pureflash-demo-"))
    cluster, summary = Cluster(directory), Summary()
    print(f"PureFlash: the main job with {STORES} replicas, in {directory}")
    started = time.monotonic()
    try:
        main_job(cluster, summary)
        if os.environ.get("KEEP") != "1":
            leave(cluster)
    except DemoProblem as problem:
        print(f"FAILED: {problem}\nEverything is kept in {directory}", file=sys.stderr)
        return 1
    print(f"Shown in {time.monotonic() - started:.0f} s:")
    for what, result in summary.lines:
        print(f"  {what:<55} {result}")
    print("Figures against a local disk and a network: make bench; results in bench/results.")
    if os.environ.get("KEEP") == "1":
        print(f"Kept, running: PF_DATA={directory / 'data'} pf status")
    else:
        shutil.rmtree(directory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
