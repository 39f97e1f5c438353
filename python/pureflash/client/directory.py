"""The data directory of a cluster: whether it may be used, and what in it is PureFlash's own.

Theory of operation. `--data` names any folder that a user likes, also one with their photos in it,
or one that somebody else has prepared. So nothing is made in a folder before `check_directory` has
looked: it must be this user's, nobody else may be able to write to it, to move it away or to let a
link to it lead elsewhere, and what is in it must be a cluster or nothing. And nothing is deleted by
walking down from it: `purge` knows by name what processes of a cluster make (`_OWN`), follows no
link in it, and removes a folder only when nothing is left in it. What it does not know it leaves,
and says so. By the same names a command that is refused takes back what it made (`Beginning`).

`_OWN` is the one list of these names. A process that begins to make another file adds it here; the
test that purges a used cluster fails otherwise, because the folder is still there.
"""

from __future__ import annotations

import fcntl
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from pureflash.errors import CallerError, Code
from pureflash.model.layout import Layout

OTHERS_WRITE: Final = stat.S_IWGRP | stat.S_IWOTH
LEFT_SHOWN: Final = 8
DEPTH_MAX: Final = 4
"""Folders below each other that are searched for what would be left; ours are three."""
LOCK_TRIES: Final = 8
"""How often a lock may be deleted by who held it, just as it is taken."""
LINKS_MAX: Final = 40
"""Links on the way to a directory; the kernel follows no more either."""

_PROCESS: Final = r"(c1|g[0-9]+|s[0-9]+|supervisor)"
_TEMPORARY: Final = r"\..+\.[0-9]+"
"""What `write_whole` had begun when its process ended: .NAME.PID."""
_OWN: Final[dict[str, str]] = {
    "": r"cluster\.toml",
    "secret": r"admin\.token|cluster\.key",
    "conductor": r"meta\.sqlite(-wal|-shm|-journal|\.lock)?",
    "log": rf"{_PROCESS}\.(jsonl(\.[0-9]+)?|out)",
    "config": rf"{_PROCESS}\.toml",
    "gateways": "",
    "gateways/g1": r"incarnation|exports\.json",
    "stores": "",
    "stores/*": (r"disk[0-9]+\.(img|json)|incarnation|conductor\.json|damage\.json"),
    "run": rf"up\.lock|supervisor\.json|{_PROCESS}\.ready",
}
"""Names of files by their folder; `stores/*` stands for each store. A folder named here is ours.

What `pf up --new-disk` moved aside is not in the list: it may be another cluster's disk.
"""
_STORE: Final = re.compile(r"s[0-9]+")
_DATA: Final = re.compile(r"disk[0-9]+\.img.*|meta\.sqlite")
"""What no first start leaves behind, only a cluster that was used."""


@dataclass(slots=True)
class Purged:
    """What a purge did: `left` are paths that it did not make or may not remove, relative."""

    is_foreign: Callable[[Path], bool] = lambda _: False
    left: list[str] = field(default_factory=list)


def check_directory(layout: Layout) -> None:
    """Refuse a data directory that is not this user's own, or that holds somebody's files.

    One that does not exist is fine, if the folder that it will be in is.
    Errors: CallerError UNSAFE; INVALID for what is no folder or cannot be looked at.
    """
    directory = layout.directory
    try:
        _check_above(directory)
        if not directory.exists():
            return
        _check_own(directory)
        if layout.cluster_file.exists():
            _check_folders(directory)
            return
        _check_contents(directory, list(_entries(directory)))
        _check_folders(directory)
    except OSError as cause:
        raise CallerError(
            Code.INVALID,
            f"cannot use {directory}: {cause.strerror}",
            next_step="name a directory of your own with --data",
        ) from cause


def _check_folders(directory: Path) -> None:
    """Refuse folders of a cluster, there before it or not, that are not this user's alone."""
    stores = [f"stores/{store}" for store in _subfolders(directory / "stores")]
    for name in [name for name in _OWN if name not in ("", "stores/*")] + stores:
        if os.path.lexists(directory / name):
            _check_own(directory / name, is_link_fine=False)


def _check_contents(directory: Path, found: list[tuple[str, bool]]) -> None:
    """Refuse a folder without `cluster.toml` that is not empty, but for a first start's remains."""
    used = [name for name, is_own in found if is_own and _DATA.fullmatch(name.rpartition("/")[2])]
    if used:
        raise CallerError(
            Code.UNSAFE,
            f"{directory} was a cluster ({used[0]} is there), and its cluster.toml is gone",
            next_step="restore cluster.toml from a backup: it has the cluster's id and ports;"
            " for a new cluster name another directory with --data",
        )
    foreign = [name for name, is_own in found if not is_own]
    if foreign:
        raise CallerError(
            Code.UNSAFE,
            f"{directory} is not empty and holds no cluster: {_listed(foreign)}",
            next_step="name a directory that is empty or does not exist with --data",
        )


def take_lock(layout: Layout) -> int | None:
    """Take the lock of a directory; gives its descriptor, None while a supervisor has it.

    The directory is made where there is none. Errors: CallerError INVALID when it cannot be
    written.
    """
    for _ in range(LOCK_TRIES):
        lock = _open_lock(layout)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return None
        if os.fstat(lock).st_nlink:
            os.ftruncate(lock, 0)
            os.write(lock, str(os.getpid()).encode())
            return lock
        os.close(lock)  # deleted between our opening and our taking it: another one counts now
    return None


def _open_lock(layout: Layout) -> int:
    try:
        layout.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        layout.lock.parent.mkdir(exist_ok=True, mode=0o700)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(layout.lock, flags, 0o600)
    except OSError as cause:
        raise CallerError(
            Code.INVALID,
            f"cannot write {layout.directory}: {cause.strerror}",
            next_step="name a directory of your own with --data",
        ) from cause


class Beginning:
    """What was in a data directory when a command began: it can take back what it has added."""

    def __init__(self, layout: Layout) -> None:
        """Look before the lock is taken, which makes folders."""
        self._directory = layout.directory
        inside = [layout.directory / name for name in _OWN if name not in ("", "stores/*")]
        folders = {*inside, layout.directory, *layout.directory.parents}
        missing = [folder for folder in folders if not os.path.lexists(folder)]
        self._missing = sorted(missing, key=lambda folder: -len(folder.parts))
        self._lock = None if os.path.lexists(layout.lock) else layout.lock
        self._names: frozenset[str] | None = None

    def look(self) -> None:
        """Look again with the lock: another one may have made a cluster before we had it."""
        found = {name for name, _ in _entries(self._directory)}
        if self._lock is not None:
            found.discard(str(self._lock.relative_to(self._directory)))
        self._names = frozenset(found)

    def take_back(self) -> None:
        """Remove files of ours that were not there, and folders that were not and are empty.

        The caller has the lock, or no file is removed. What cannot be removed stays: the error that
        a person should see is another one.
        """
        with suppress(OSError):
            if self._names is not None:
                for name, is_own in list(_entries(self._directory)):
                    if is_own and name not in self._names:
                        path = self._directory / name
                        _unlink(path.parent, path.name)
        for folder in self._missing:
            with suppress(OSError):  # something is in it
                if _is_folder(folder) and _is_this_users(folder):
                    folder.rmdir()


def purge(layout: Layout, *, is_foreign: Callable[[Path], bool]) -> Purged:
    """Delete what a cluster made in its data directory, and the folders that are empty then.

    The caller holds the lock of the directory. `cluster.toml` goes last, so that a purge that was
    interrupted can be repeated. `is_foreign` tells of a disk's file whether it is another
    cluster's, which stays. Errors: OSError for what is ours and cannot be removed.
    """
    done = Purged(is_foreign)
    directory = Path(os.path.realpath(layout.directory))  # a link to it is the user's, and stays
    if not directory.exists():
        return done
    stores = _subfolders(directory / "stores")
    folders = [name for name in _OWN if name not in ("", "stores/*")]
    # The deepest folders first, `run` with the lock behind all others.
    ordered = [f"stores/{store}" for store in stores]
    ordered += sorted(folders, key=lambda name: (name == "run", -name.count("/")))
    for name in ordered:
        _purge_folder(directory, name, done)
    for name in _names_in(directory):
        if _is_own("", name) and not _is_folder(directory / name):
            _unlink(directory, name)
        elif not _is_folder_of_ours(name, directory / name):
            done.left.append(name)
    with suppress(OSError):  # not empty, or a mount point: it is not ours to unmount
        directory.rmdir()
    return done


def purge_sockets(folder: Path) -> Purged:
    """Delete the sockets of a cluster's gateways, their folder, and the one above when empty.

    Both lie where anybody may have made them, below /tmp: those of others are not looked into.
    """
    done = Purged()
    if not all(_is_folder(path) and _is_this_users(path) for path in (folder.parent, folder)):
        return done
    for name in _names_in(folder):
        if stat.S_ISSOCK((folder / name).lstat().st_mode):
            _unlink(folder, name)
        else:
            done.left.append(str(folder / name))
    for path in (folder, folder.parent):
        if any(path.iterdir()):
            break
        path.rmdir()
    return done


def _purge_folder(directory: Path, name: str, done: Purged) -> None:
    folder = directory / name
    if not _is_folder(folder):
        return  # a link, or nothing: what is no folder is seen in the one above
    for entry in _names_in(folder):
        is_disk = name.startswith("stores/") and entry.endswith(".img")
        is_kept = _is_folder(folder / entry) or (is_disk and done.is_foreign(folder / entry))
        if _is_own(name, entry) and not is_kept:
            _unlink(folder, entry)
        elif not _is_folder_of_ours(f"{name}/{entry}", folder / entry):
            done.left.append(f"{name}/{entry}")
    if not any(folder.iterdir()):
        folder.rmdir()


def _unlink(folder: Path, name: str) -> None:
    """Remove one name; of a link the link itself, not what it names."""
    with _opened(folder) as descriptor:
        os.unlink(name, dir_fd=descriptor)


@contextmanager
def _opened(folder: Path) -> Iterator[int]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _is_own(folder: str, name: str) -> bool:
    """Whether a file of this name in this folder is one that a cluster makes."""
    pattern = _OWN.get(folder, _OWN["stores/*"] if folder.startswith("stores/") else None)
    if not pattern:
        return False
    whole = re.fullmatch(pattern, name) is not None
    inner = re.fullmatch(_TEMPORARY, name)
    return whole or (
        inner is not None and re.fullmatch(pattern, name[1:].rpartition(".")[0]) is not None
    )


def _is_folder_of_ours(name: str, path: Path) -> bool:
    """Whether this is one of the folders that a cluster makes, and no link to one."""
    above, _, last = name.rpartition("/")
    is_known = name in _OWN or (above == "stores" and _STORE.fullmatch(last))
    return bool(is_known) and _is_folder(path)


def _is_folder(path: Path) -> bool:
    """Whether this is a folder, and no link to one."""
    return not path.is_symlink() and path.is_dir()


def _is_this_users(path: Path) -> bool:
    return path.lstat().st_uid == os.getuid()


def _entries(directory: Path, folder: str = "") -> Iterator[tuple[str, bool]]:
    """Give each name below, relative, and whether a cluster would have made it.

    Folders of ours are looked into, those of others are one name.
    """
    for name in _names_in(directory / folder):
        inner = f"{folder}/{name}" if folder else name
        if folder.count("/") < DEPTH_MAX and _is_folder_of_ours(inner, directory / inner):
            yield from _entries(directory, inner)
        else:
            yield inner, _is_own(folder, name)


def _names_in(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def _subfolders(folder: Path) -> list[str]:
    if not _is_folder(folder):
        return []
    return [
        name
        for name in _names_in(folder)
        if _STORE.fullmatch(name) and not (folder / name).is_symlink()
    ]


def _check_own(folder: Path, *, is_link_fine: bool = True) -> None:
    """Refuse a folder that is somebody else's, or that others may write to."""
    found = folder.stat() if is_link_fine else folder.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise CallerError(
            Code.INVALID,
            f"{folder} is not a folder",
            next_step="name a directory of your own with --data",
        )
    if found.st_uid != os.getuid():
        raise CallerError(
            Code.UNSAFE,
            f"{folder} belongs to another user (uid {found.st_uid}, you are {os.getuid()})",
            next_step="name a directory of your own with --data; a cluster is run by its owner",
        )
    if found.st_mode & OTHERS_WRITE:
        raise CallerError(
            Code.UNSAFE,
            f"{folder} can be written by other users (mode {stat.S_IMODE(found.st_mode):o})",
            next_step=f"`chmod go-w {folder}` after a look at what is in it, or name another",
        )


def _check_above(directory: Path) -> None:
    """Refuse a place where somebody else could put another folder in this one's stead.

    A folder for all, as /tmp, is fine when it is sticky: only owners move their files there. A link
    on the way is followed only if it is root's or this user's: its owner decides where it leads.
    """
    for link in _links_to(directory):
        owner = link.lstat().st_uid
        if owner not in (0, os.getuid()):
            raise CallerError(
                Code.UNSAFE,
                f"{link} is a link of uid {owner}, who could let it lead elsewhere",
                next_step="name the directory itself with --data, not that link",
            )
    # Not Path.resolve, which takes a link that leads to itself for a bug of ours.
    for folder in Path(os.path.realpath(directory)).parents:
        if not folder.exists():
            continue
        found = folder.stat()
        is_open = found.st_mode & stat.S_IWOTH and not found.st_mode & stat.S_ISVTX
        if is_open or found.st_uid not in (0, os.getuid()):
            whose = "any user" if is_open else f"uid {found.st_uid}"
            raise CallerError(
                Code.UNSAFE,
                f"{directory} is below {folder}, where {whose} could put another folder in its"
                " place",
                next_step="name a directory below folders of your own, or of root, with --data",
            )


def _links_to(path: Path) -> Iterator[Path]:
    """Give the links on the way to a path, each before those on its own way; `LINKS_MAX` ways.

    The caller stops at the first one of somebody else, so what is followed is not hostile.
    """
    ways = [path]
    for _ in range(LINKS_MAX):
        if not ways:
            return
        way = ways.pop()
        for name in (way, *way.parents):
            if name.is_symlink():
                yield name
                ways.append(name.parent / name.readlink())


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - LEFT_SHOWN} more" if len(names) > LEFT_SHOWN else ""
    # Anybody may have chosen these names, also one that gives orders to a terminal.
    shown = [name if name.isprintable() else repr(name) for name in names[:LEFT_SHOWN]]
    return ", ".join(shown) + more


def left_line(place: Path, done: Purged) -> str:
    """Say what a purge has left; empty when that is nothing."""
    if not done.left:
        return ""
    return f"left in {place}, not made by PureFlash: {_listed(done.left)}"
