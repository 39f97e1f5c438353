"""A file of the user's that is there when it is whole, and before that under a name of ours.

Theory of operation. `NewFile` writes `.FILE.TOKEN.part` beside FILE, made anew for its user alone
(0600), and gives it the name FILE at the end, without ever replacing what has that name. While it
writes it holds two locks that the kernel takes back however the process ends: one on `.FILE.lock`,
so that a second writer of the same FILE is refused before it does anything, and one on the partial
file, which tells a file that is being written from one whose writer was killed. Who holds
`.FILE.lock` removes such remains. It removes nothing else: no file without that form of a name, no
file of another user, none that somebody has locked.

The lock's own file is removed by who holds it. Another one may have opened it just before; so a
lock counts only if the name still leads to the file that was locked.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import secrets
import stat
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Final, Self

from pureflash.cli.outcome import CommandProblem, Exit

TOKEN_BYTES: Final = 8
TRIES_MAX: Final = 16
"""For a lock whose file others remove at the same moment, and for a token that is taken."""
_OURS: Final = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_NEW: Final = _OURS | os.O_CREAT
_NO_LINKS: Final = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
"""What file systems without hard links say."""
_AT_FDCWD: Final = -100
_RENAME_NOREPLACE: Final = 1


class NewFile:
    """See the module's head. A context manager; `stream` is written, then `publish` is called."""

    def __init__(self, file: Path) -> None:
        """Prepare to make `file`, in a directory that is there."""
        self.file = file
        self.removed: list[Path] = []
        """Remains of killed writers that were taken away."""
        self._lock_path = file.with_name(f".{file.name}.lock")
        self._lock: int | None = None
        self._partial: Path | None = None
        self._stream: BinaryIO | None = None

    def __enter__(self) -> Self:
        """Begin. Errors: CommandProblem when it exists or is being made; OSError."""
        if os.path.lexists(self.file):
            raise _exists(self.file)
        try:
            self._lock = self._take_lock()
            self._remove_remains()
            self._stream = self._make_partial()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

    @property
    def stream(self) -> BinaryIO:
        """The file under its name of now."""
        assert self._stream is not None, "inside the context"
        return self._stream

    def publish(self) -> None:
        """Make it durable and give it its name.

        Errors: CommandProblem when something has that name by now: it is left as it is.
        """
        assert self._partial is not None, "inside the context, once"
        self.stream.flush()
        os.fsync(self.stream.fileno())
        try:
            _take_name(self._partial, self.file)
        except FileExistsError as cause:
            raise _exists(self.file) from cause
        folder = os.open(self.file.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _end(self) -> None:
        if self._partial is not None:
            self._partial.unlink(missing_ok=True)  # or only its second name
            self._partial = None
        if self._stream is not None:
            self._stream.close()
            self._stream = None
        if self._lock is not None:
            self._lock_path.unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = None

    def _take_lock(self) -> int:
        for _ in range(TRIES_MAX):
            try:
                descriptor = os.open(self._lock_path, _NEW, 0o600)
            except OSError as cause:
                if not os.path.lexists(self._lock_path):
                    raise  # the directory is at fault, not what has this name
                raise self._no_lock() from cause
            try:
                if self._is_locked(descriptor):
                    return descriptor
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)
        raise _being_made(self.file)  # others come and go all the time

    def _is_locked(self, descriptor: int) -> bool:
        """Lock it; False when the name leads elsewhere by now."""
        found = os.fstat(descriptor)
        is_mine = found.st_uid == os.geteuid()  # another's could not be removed in the end
        if not stat.S_ISREG(found.st_mode) or found.st_size or not is_mine:
            raise self._no_lock()
        if not _lock(descriptor):
            raise _being_made(self.file)
        try:
            named = self._lock_path.lstat()
        except FileNotFoundError:
            return False
        return (named.st_dev, named.st_ino) == (found.st_dev, found.st_ino)

    def _no_lock(self) -> CommandProblem:
        return CommandProblem(
            f"{self._lock_path} is not a lock of ours, and would have to be one to make"
            f" {self.file}",
            exit_status=Exit.IN_THE_WAY,
            next_step="name another file, or move that one away",
        )

    def _remove_remains(self) -> None:
        form = re.compile(rf"\.{re.escape(self.file.name)}\.[0-9a-f]{{{2 * TOKEN_BYTES}}}\.part")
        for path in sorted(self.file.parent.iterdir()):
            if form.fullmatch(path.name) and _is_abandoned(path):
                path.unlink(missing_ok=True)
                self.removed.append(path)

    def _make_partial(self) -> BinaryIO:
        for _ in range(TRIES_MAX):
            token = secrets.token_hex(TOKEN_BYTES)
            path = self.file.with_name(f".{self.file.name}.{token}.part")
            try:
                descriptor = os.open(path, _NEW | os.O_EXCL, 0o600)
            except FileExistsError:
                continue
            self._partial = path
            stream = os.fdopen(descriptor, "w+b")
            assert _lock(descriptor), "nobody else knows it yet"
            return stream
        raise AssertionError("random names of 64 bits do not collide")


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_abandoned(path: Path) -> bool:
    """Tell whether a partial file is a plain one of this user that nobody writes any more."""
    try:
        descriptor = os.open(path, _OURS)
    except OSError:
        return False  # a link, or not for us: left alone
    try:
        found = os.fstat(descriptor)
        is_ours = stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid()
        return is_ours and _lock(descriptor)
    finally:
        os.close(descriptor)


def _take_name(partial: Path, file: Path) -> None:
    """Name a file anew, never in place of another one. Errors: FileExistsError, OSError."""
    try:
        os.link(partial, file, follow_symlinks=False)
    except OSError as problem:
        if problem.errno not in _NO_LINKS:
            raise
        _rename_new(partial, file)


def _rename_new(partial: Path, file: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(partial), os.fsencode(file)
    if libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_NOREPLACE) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(file))


def _exists(file: Path) -> CommandProblem:
    return CommandProblem(
        f"{file} exists",
        exit_status=Exit.IN_THE_WAY,
        next_step="name another file, or remove it",
    )


def _being_made(file: Path) -> CommandProblem:
    return CommandProblem(
        f"{file} is being made by another command at this moment",
        exit_status=Exit.IN_THE_WAY,
        next_step="name another file, or wait until that one has ended",
    )
