"""How a command ends: its exit status, and what a person reads when it failed.

Every failure says what failed, why, what to do next, and the request id if a server was asked.
Commands raise; `present` at the top of `pf` is the only place that turns an exception into text
and a status, so no command prints its own errors.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from pathlib import Path
from types import FrameType
from typing import Protocol, runtime_checkable

from pureflash.model.exits import Exit, exit_of_code

__all__ = [
    "CommandProblem",
    "Exit",
    "Explained",
    "Terminated",
    "catch_term",
    "describe",
    "exit_status_of",
    "flush_output",
    "present",
    "unreadable",
]


@runtime_checkable
class Explained(Protocol):
    """An exception that carries its own explanation: every `PureFlashError` has this shape.

    `code` names the problem in the vocabulary of errors.toml; `request_id` is None when no server
    was asked.
    """

    code: object
    message: str
    next_step: str | None
    request_id: str | None


class Terminated(BaseException):
    """TERM came: the command unwinds as after Ctrl-C, and takes back what it had begun.

    Not a KeyboardInterrupt, which the command tree turns into a status of its own.
    """


class CommandProblem(Exception):
    """A problem that the command itself found, before or without any server."""

    def __init__(self, message: str, *, exit_status: Exit, next_step: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.exit_status = exit_status
        self.next_step = next_step


def catch_term() -> None:
    """Let TERM raise `Terminated` in this process's main thread, unless TERM is ignored.

    A program that takes its place by exec has the default again.
    """
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _raise_terminated)


def _raise_terminated(_number: int, _frame: FrameType | None) -> None:
    raise Terminated


def exit_status_of(problem: BaseException) -> Exit:
    """Choose the exit status of a problem; what has no row of its own is `FAILED`."""
    if isinstance(problem, CommandProblem):
        return problem.exit_status
    if isinstance(problem, KeyboardInterrupt):
        return Exit.INTERRUPTED
    if isinstance(problem, Terminated):
        return Exit.TERMINATED
    if isinstance(problem, Explained):
        return exit_of_code(getattr(problem.code, "name", str(problem.code)))
    return Exit.FAILED


def describe(problem: BaseException) -> str:
    """Say in plain lines what failed, what to do, and the request id; never a stack trace."""
    if isinstance(problem, KeyboardInterrupt):
        return "pf: interrupted"
    if isinstance(problem, Terminated):
        return "pf: ended by TERM"
    if isinstance(problem, CommandProblem):
        lines = [f"pf: {problem.message}"]
        request_id = None
        next_step = problem.next_step
    elif isinstance(problem, Explained):
        code = getattr(problem.code, "name", str(problem.code))
        lines = [f"pf: {problem.message} ({code})"]
        next_step, request_id = problem.next_step, problem.request_id
    elif isinstance(problem, OSError):
        lines = [f"pf: {problem.strerror or problem}"]
        if problem.filename is not None:
            lines[0] += f": {os.fsdecode(problem.filename)}"
        next_step, request_id = None, None
    else:
        lines = [f"pf: internal error: {type(problem).__name__}: {problem}"]
        next_step = "this is a bug in PureFlash; run it again with PF_DEBUG=1 and report the output"
        request_id = None
    if next_step:
        lines.append(f"  what to do: {next_step}")
    if request_id:
        lines.append(f"  request id: {request_id}")
    return "\n".join(lines)


def present(problem: BaseException) -> Exit:
    """Print a problem to standard error and give the exit status that belongs to it."""
    if os.environ.get("PF_DEBUG"):
        traceback.print_exception(problem, file=sys.stderr)
    print(describe(problem), file=sys.stderr)
    return exit_status_of(problem)


def flush_output() -> CommandProblem | None:
    """Write what standard output still holds; gives the problem if that cannot be done.

    Then nothing more is written there: the interpreter would try once more on its way out, show a
    trace of its own, and end with its own status.
    """
    if sys.stdout is None:  # closed before we began
        return None
    try:
        sys.stdout.flush()
    except OSError as cause:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
        return CommandProblem(
            f"cannot write standard output: {cause.strerror}",
            exit_status=Exit.FAILED,
            next_step="make room there, or send it elsewhere",
        )
    return None


def unreadable(
    file: Path, cause: OSError | UnicodeDecodeError, *, next_step: str
) -> CommandProblem:
    """Say that a file of the user's cannot be read; one that is not there is NOT_FOUND."""
    is_missing = isinstance(cause, FileNotFoundError)
    reason = cause.strerror if isinstance(cause, OSError) else "it is not UTF-8"
    return CommandProblem(
        f"cannot read {file}: {reason}",
        exit_status=Exit.NOT_FOUND if is_missing else Exit.FAILED,
        next_step=next_step,
    )
