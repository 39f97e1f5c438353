"""Walk the README as a stranger, in a Debian that has never seen this project.

A new Debian 12 is made with debootstrap, a fresh clone of this checkout's HEAD is put into it, and
the README's commands are run there with an empty environment (`env -i`):

- `demo` and `test`: `make demo` and `make test` as root, after the README's own
  `apt-get install -y git make`;
- `user`: the lines for a cluster of one's own, then the tutorial and every guide, whose outputs are
  compared with what they say; as uid 65534 without groups and without the means to gain rights,
  with an empty HOME.

After each walk nothing may be left: no process, no mount, and after `user` no file in HOME, the XDG
directories or /tmp beyond what installing had put there. (A process holds every socket and every
lock, so without processes there are none; the files of unix sockets are among the files.)

How it stays clean itself: the walks run in a mount and a PID namespace of their own, so that mounts
and processes end with it however it ends, `kill -9` included; the folder is removed by the process
outside. The network is the machine's. Where packages come from (apt's mirror and its
configuration, pip's and cargo's, certificates) is taken from this machine at run time.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

SUITE = "bookworm"
FREE_BYTES_MIN = 12 << 30
"""What a walk needs: the system, the toolchain, Cargo's target folder, three stores' disks."""
STRANGER_UID = 65534
UP_SECONDS_MAX = 60
"""README and `pf up` promise a volume within this time."""
WALKS = ("user", "demo", "test")
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
LOGIN_PATH = "/usr/local/bin:/usr/bin:/bin:/usr/local/games:/usr/games"
"""What Debian gives to who is not root and logs in: without the folders of system programs."""
CHECKOUT = "srv/checkout"
STRANGER_HOME = "srv/stranger"
PAGES = ("docs/tutorial", "docs/guides")
END_SECONDS_MAX = 10
"""How long processes that were told to end may take to be gone."""

SET_UP_LINE = "please run:  sudo "

APT_CONFIGURATION = (
    *("etc/apt/sources.list", "etc/apt/sources.list.d", "etc/apt/apt.conf", "etc/apt/apt.conf.d"),
    *("etc/apt/auth.conf.d", "etc/apt/preferences.d", "etc/apt/trusted.gpg.d"),
    *("etc/apt/keyrings", "usr/share/keyrings"),
)
OTHER_CONFIGURATION = ("etc/resolv.conf", "etc/hosts", "etc/pip.conf")
CERTIFICATES = "usr/local/share/ca-certificates"


class CleanRoomError(Exception):
    """A walk did not go as the README says, or left something behind."""


@dataclass(slots=True)
class Report:
    """What is printed at the end: (what, seconds)."""

    times: list[tuple[str, float]] = field(default_factory=list)

    def add(self, what: str, seconds: float) -> None:
        """Note a time and say it at once."""
        self.times.append((what, seconds))
        say(f"{what}: {seconds:.1f} s")


def say(text: str) -> None:
    """Print one line of our own among those of the commands."""
    print(f"clean-room: {text}", flush=True)


# ----------------------------------------------------------------------- decisions, without I/O --


def choose_mirror(targets: str, suite: str = SUITE) -> str | None:
    """Find where apt gets `suite`'s main packages, in the output of `apt-get indextargets`.

    Shapes: lines "CREATED_BY CODENAME COMPONENT REPO_URI".
    """
    for line in targets.splitlines():
        parts = line.split()
        if len(parts) == 4 and parts[:3] == ["Packages", suite, "main"]:
            return parts[3]
    return None


def left_over(before: Iterable[str], after: Iterable[str]) -> list[str]:
    """Name what is there now and was not before; compiled Python is no news."""
    news = set(after) - set(before)
    return sorted(name for name in news if "__pycache__" not in name.split("/"))


def apt_line(output: str) -> list[str] | None:
    """Find the packages in the line that tools/setup prints for those who are not root."""
    for line in output.splitlines():
        _, found, command = line.partition(SET_UP_LINE)
        words = command.split()
        if found and words[:2] == ["apt-get", "install"]:
            return words
    return None


def package_lines(page: str) -> list[list[str]]:
    """Find the lines in a page by which its reader installs packages."""
    return [line.split() for line in re.findall(r"`(apt-get install -y [^`]+)`", page)]


def export_line(page: str) -> str | None:
    """Find the command in a page by which its reader finds `pf` from then on."""
    found = re.search(r"^\$ (export PATH=.+)$", page, re.MULTILINE)
    return None if found is None else found[1]


def as_reader(exported: str, command: Sequence[str]) -> list[str]:
    """Give the words that run a command in a login shell's PATH after the line `exported`."""
    shell = ["bash", "-c", f'{exported} && exec "$@"', "bash"]
    return ["env", f"PATH={LOGIN_PATH}", *shell, *command]


# ---------------------------------------------------------------------------- inside: the walks --


@dataclass(slots=True)
class Room:
    """A Debian in a folder, with the means to run commands in it."""

    root: Path
    report: Report

    def run(
        self,
        command: Sequence[str],
        *,
        folder: str = "/",
        home: str = "/root",
        is_stranger: bool = False,
        is_captured: bool = False,
        is_checked: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in the room with nothing of our environment.

        Errors: CleanRoomError when it is checked and fails.
        """
        rights = ["--no-new-privs"]
        if is_stranger:
            rights += ["--reuid", str(STRANGER_UID), "--regid", str(STRANGER_UID), "--clear-groups"]
        inside = ["setpriv", *rights] if is_stranger else []
        inside += ["env", "-i", f"--chdir={folder}", f"HOME={home}", f"PATH={PATH}", "TERM=dumb"]
        done = subprocess.run(
            ["chroot", str(self.root), *inside, *command],
            env={"PATH": os.environ["PATH"]},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if is_captured else None,
            stderr=subprocess.STDOUT if is_captured else None,
            text=True,
            check=False,
        )
        if is_checked and done.returncode != 0:
            tail = f": {done.stdout[-2000:]}" if is_captured else ""
            raise CleanRoomError(f"{' '.join(command)} ended with {done.returncode}{tail}")
        return done

    def install(self, what: str, line: Sequence[str]) -> None:
        """Run an apt line as root; its many words are shown only when it fails."""
        started = time.monotonic()
        self.run(["apt-get", "update"], is_captured=True)
        self.run(["env", "DEBIAN_FRONTEND=noninteractive", *line], is_captured=True)
        self.report.add(what, time.monotonic() - started)

    def processes(self) -> list[str]:
        """Name the processes that live in the room; those that have ended are taken away."""
        while True:  # we are the first process of the namespace: orphans are ours to take
            try:
                if os.waitpid(-1, os.WNOHANG)[0] == 0:
                    break
            except ChildProcessError:
                break
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue  # it has just ended
            found.append(f"process {entry.name}: {command.strip() or '(no command line)'}")
        return found

    def files(self, *folders: str) -> list[str]:
        """Name everything below these folders of the room."""
        found = []
        for folder in folders:
            found += [str(path) for path in (self.root / folder).rglob("*")]
        return found


def mounts() -> list[str]:
    """Name the mount points of this namespace."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [line.split(" ")[4] for line in lines]


def expect_nothing_left(
    room: Room, mounted: Sequence[str], files: Sequence[str] | None = None
) -> None:
    """Wait a moment for what is about to end, then refuse whatever is still there.

    Errors: CleanRoomError with the list.
    """
    deadline = time.monotonic() + END_SECONDS_MAX
    while (left := room.processes()) and time.monotonic() < deadline:
        time.sleep(0.1)
    left += [f"mount {name}" for name in left_over(mounted, mounts())]
    left += [f"file {name}" for name in files or ()]
    if left:
        raise CleanRoomError("left behind:\n  " + "\n  ".join(left))
    say("nothing is left: no process, no mount" + ("" if files is None else ", no file"))


def make_system(root: Path, mirror: str, report: Report) -> Room:
    """Make a Debian below `root`, and tell it where this machine gets its packages."""
    started = time.monotonic()
    command = ["debootstrap", "--variant=minbase", "--include=ca-certificates", SUITE, str(root)]
    done = subprocess.run([*command, mirror], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CleanRoomError(f"debootstrap ended with {done.returncode}:\n{done.stdout[-2000:]}")
    report.add(f"a new Debian ({SUITE})", time.monotonic() - started)
    # The new system's own list would name the same archive a second time.
    (root / "etc/apt/sources.list").unlink(missing_ok=True)
    for name in (*APT_CONFIGURATION, *OTHER_CONFIGURATION, CERTIFICATES):
        copy_into(Path("/") / name, root / name)
    copy_into(Path.home() / ".cargo" / "config.toml", root / ".cargo" / "config.toml")
    for kind, options, name in (
        ("proc", "nosuid,nodev,noexec", "proc"),
        ("sysfs", "ro,nosuid,nodev,noexec", "sys"),
        ("tmpfs", "nosuid,nodev", "dev/shm"),
    ):
        (root / name).mkdir(exist_ok=True)
        run_outside(["mount", "-t", kind, "-o", options, kind, str(root / name)])
    room = Room(root, report)
    room.run(["update-ca-certificates"], is_captured=True)
    return room


def copy_into(source: Path, target: Path) -> None:
    """Copy a file or folder of this machine's configuration, if there is one."""
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
    elif source.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)


def run_outside(command: Sequence[str]) -> None:
    """Run a command of this machine that must succeed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CleanRoomError(f"{' '.join(command)}: {done.stderr.strip()}")


def put_clone(room: Room, checkout: Path) -> None:
    """Clone HEAD of this checkout into the room, as over a network: nothing is shared."""
    target = room.root / CHECKOUT
    run_outside(["git", "clone", "--quiet", "--no-hardlinks", f"file://{checkout}", str(target)])


def walk_as_root(room: Room, goal: str) -> None:
    """Walk `make demo` or `make test`, after what the README asks for."""
    mounted = mounts()
    room.install("the README's apt line", ["apt-get", "install", "-y", "git", "make"])
    started = time.monotonic()
    room.run(["make", goal], folder=f"/{CHECKOUT}")
    room.report.add(f"make {goal}", time.monotonic() - started)
    expect_nothing_left(room, mounted)


def walk_as_user(room: Room) -> None:
    """Walk the lines of the README for a cluster of one's own, without any rights."""
    mounted = mounts()
    home = room.root / STRANGER_HOME
    home.mkdir(parents=True)
    for path in (home, room.root / CHECKOUT, *(room.root / CHECKOUT).rglob("*")):
        os.chown(path, STRANGER_UID, STRANGER_UID, follow_symlinks=False)

    def stranger(command: Sequence[str], *, is_captured: bool = False) -> str:
        done = room.run(
            command,
            folder=f"/{CHECKOUT}",
            home=f"/{STRANGER_HOME}",
            is_stranger=True,
            is_captured=is_captured,
        )
        return done.stdout or ""

    def timed(what: str, command: Sequence[str]) -> float:
        started = time.monotonic()
        stranger(command)
        seconds = time.monotonic() - started
        room.report.add(what, seconds)
        return seconds

    install_what_setup_asks_for(room)
    timed("python3 -m venv", ["python3", "-m", "venv", f"/{STRANGER_HOME}/pf"])
    timed("pip install .", [f"/{STRANGER_HOME}/pf/bin/pip", "install", "--quiet", "."])
    pf = f"/{STRANGER_HOME}/pf/bin/pf"
    folders = (STRANGER_HOME, "tmp", "var/tmp", "run", "dev/shm")
    before = room.files(*folders)
    seconds = timed("pf up --disk 10G --detach", [pf, "up", "--disk", "10G", "--detach"])
    seconds += timed("pf volume create v1 5G", [pf, "volume", "create", "v1", "5G"])
    if seconds > UP_SECONDS_MAX:
        raise CleanRoomError(f"a volume after {seconds:.1f} s; promised are {UP_SECONDS_MAX} s")
    status = stranger([pf, "status"], is_captured=True)
    print(status, end="")
    if "v1" not in stranger([pf, "volume", "list"], is_captured=True):
        raise CleanRoomError("pf volume list does not name v1")
    timed("pf down --purge --yes", [pf, "down", "--purge", "--yes"])
    walk_pages(room, timed)
    expect_nothing_left(room, mounted, left_over(before, room.files(*folders)))


def walk_pages(room: Room, timed: Callable[[str, Sequence[str]], float]) -> None:
    """Walk the tutorial and the guides as the user, who logged in and did as the tutorial says."""
    checkout = room.root / CHECKOUT
    pages = [
        page
        for folder in PAGES
        for page in sorted((checkout / folder).glob("*.md"))
        if "```console" in page.read_text()
    ]
    for page in pages:
        for line in package_lines(page.read_text()):
            room.install(f"the apt line of {page.name}", line)
    names = [str(page.relative_to(checkout)) for page in pages]
    found = (export_line(page.read_text()) for page in pages)
    lines = [exported for exported in found if exported is not None]
    if len(lines) != 1:
        raise CleanRoomError(f"{len(lines)} pages say how PATH finds pf; it has to be one")
    command = ["python3", "-m", "tests.support.walk", *names]
    timed("the tutorial and the guides", as_reader(lines[0], command))


def install_what_setup_asks_for(room: Room) -> None:
    """Let tools/setup say what is missing, as it does to those who are not root; install that."""
    asked = room.run(
        ["tools/setup"],
        folder=f"/{CHECKOUT}",
        home=f"/{STRANGER_HOME}",
        is_stranger=True,
        is_captured=True,
        is_checked=False,
    )
    line = apt_line(asked.stdout)
    if asked.returncode != 2 or line is None:
        raise CleanRoomError(f"tools/setup did not print its apt line:\n{asked.stdout}")
    room.install("the apt line of tools/setup", line)


def inside(folder: Path, checkout: Path, mirror: str, walks: Sequence[str]) -> None:
    """Do the walks; called as the first process of new mount and PID namespaces."""
    report = Report()
    for walk in walks:
        # A room for each: what one walk has installed must not help the next.
        say(f"walk {walk}")
        room = make_system(folder / walk, mirror, report)
        put_clone(room, checkout)
        if walk == "user":
            walk_as_user(room)
        else:
            walk_as_root(room, walk)
    say("all walks arrived:")
    for what, seconds in report.times:
        print(f"  {seconds:8.1f} s  {what}")


# ------------------------------------------------------------------------ outside: what remains --


def refuse(text: str) -> int:
    """Say why nothing was begun; exit status 2."""
    print(f"clean-room: {text}", file=sys.stderr)
    return 2


def outside(arguments: argparse.Namespace) -> int:
    """Check what is needed, run `inside` in namespaces of its own, and take the folder away."""
    if os.geteuid() != 0:
        return refuse("root is needed for debootstrap and chroot: run it with sudo")
    needed = {"debootstrap": "debootstrap", "unshare": "util-linux", "git": "git"}
    if missing := [package for name, package in needed.items() if shutil.which(name) is None]:
        return refuse(f"please run:  apt-get install -y {' '.join(missing)}")
    free_bytes = shutil.disk_usage(arguments.folder).free
    if free_bytes < FREE_BYTES_MIN:
        return refuse(
            f"{arguments.folder} has {free_bytes >> 30} GiB free, 12 GiB needed: --folder"
        )
    layout = "$(CREATED_BY) $(CODENAME) $(COMPONENT) $(REPO_URI)"
    asked = ["apt-get", "indextargets", "--format", layout]
    targets = subprocess.run(asked, capture_output=True, text=True, check=False).stdout
    mirror = choose_mirror(targets)
    if mirror is None:
        return refuse(f"this machine's apt knows no {SUITE}: add it to its sources")
    checkout = Path(__file__).resolve().parent.parent
    if subprocess.run(
        ["git", "status", "--porcelain"], cwd=checkout, capture_output=True, check=True
    ).stdout:
        say("what is not committed is not walked")
    walks = [arguments.only] if arguments.only else list(WALKS)
    folder = Path(tempfile.mkdtemp(prefix="pureflash-clean-room-", dir=arguments.folder))
    folder.chmod(0o755)  # the stranger has to get in
    command = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    command += [sys.executable, str(Path(__file__).resolve()), "--inside", str(folder)]
    command += ["--checkout", str(checkout), "--mirror", mirror, *walks]
    # A signal ends this process through the `finally` below.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with subprocess.Popen(command) as child:
            try:
                return child.wait()
            except BaseException:
                child.kill()  # with it goes everything in its namespaces
                raise
    finally:
        if arguments.keep:
            say(f"kept: {folder}")
        else:
            shutil.rmtree(folder)


def main() -> int:
    """Exit status 0: every walk arrived and nothing was left; 1: not so; 2: nothing was begun."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=WALKS, help="one walk instead of all")
    parser.add_argument("--folder", type=Path, default=Path("/var/tmp"), help="where to work")  # noqa: S108 - large and on disk; a new folder in it
    parser.add_argument("--keep", action="store_true", help="keep the folder to look around")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--checkout", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--mirror", help=argparse.SUPPRESS)
    parser.add_argument("walks", nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside is None:
        return outside(arguments)
    try:
        inside(arguments.inside, arguments.checkout, arguments.mirror, arguments.walks)
    except CleanRoomError as problem:
        print(f"clean-room: FAILED: {problem}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
