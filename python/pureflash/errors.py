"""Errors of PureFlash: one exception class per band of codes.

Generated from errors.toml by tools/gen_errors.py; edit the list, not this file.

Catch the band to react (`RouteError`: try again; `CallerError`: fix the request), read `code` to
be exact, and show `next_step` to people.
"""

from __future__ import annotations

import enum


class Code(enum.IntEnum):
    """Stable numbers, the same on the wire, in REST and in logs."""

    OK = 0
    STALE_EPOCH = 1
    FENCED = 2
    NOT_PRIMARY = 3
    BUSY = 4
    CANCELLED = 5
    INVALID = 20
    OUT_OF_RANGE = 21
    MISALIGNED = 22
    NOT_FOUND = 23
    ALREADY_EXISTS = 24
    IN_USE = 25
    READ_ONLY = 26
    LIMIT = 27
    UNSAFE = 28
    NO_SPACE = 40
    MEDIA_ERROR = 41
    BAD_CHECKSUM = 42
    DISK_FAILED = 43
    UNAVAILABLE = 60
    NO_QUORUM = 61
    TIMED_OUT = 62
    WRONG_CLUSTER = 63
    UNAUTHENTICATED = 80
    DENIED = 81
    UNSUPPORTED = 90
    INTERNAL = 99


MEANING: dict[Code, str] = {
    Code.OK: "Done",
    Code.STALE_EPOCH: "The request names an older configuration of the shard",
    Code.FENCED: "A newer attach took the volume over; this session may not write",
    Code.NOT_PRIMARY: "This replica is not the shard's primary",
    Code.BUSY: "A queue is full; the request was not started",
    Code.CANCELLED: "The request was dropped before it took effect",
    Code.INVALID: "A field has a value that is never allowed",
    Code.OUT_OF_RANGE: "The range lies outside the volume or the shard",
    Code.MISALIGNED: "Offset or length is not a multiple of 512 bytes",
    Code.NOT_FOUND: "There is no object of this name or id",
    Code.ALREADY_EXISTS: "An object of this name exists",
    Code.IN_USE: "The object is attached or another object depends on it",
    Code.READ_ONLY: "The object cannot be written: a snapshot or a read-only attach",
    Code.LIMIT: "A named limit would be exceeded",
    Code.UNSAFE: "It could lose or fork data, and nothing proves that it does not",
    Code.NO_SPACE: "No space is left for new data; overwrites still work",
    Code.MEDIA_ERROR: "No replica could read or write the data on its disk",
    Code.BAD_CHECKSUM: "The data does not match its checksum and was not used",
    Code.DISK_FAILED: "The disk stopped after a failed flush or journal write",
    Code.UNAVAILABLE: "The service or the store is not reachable or not ready",
    Code.NO_QUORUM: "Too few members are present to decide safely",
    Code.TIMED_OUT: "No answer came in time; the outcome is not known",
    Code.WRONG_CLUSTER: "The other side belongs to a different cluster",
    Code.UNAUTHENTICATED: "The caller did not prove who it is",
    Code.DENIED: "The caller is known but has no right to do this",
    Code.UNSUPPORTED: "This version does not have the operation or feature",
    Code.INTERNAL: "A bug in PureFlash",
}

NEXT_STEP: dict[Code, str] = {
    Code.OK: "Nothing to do",
    Code.STALE_EPOCH: "Fetch the shard's configuration and send the request again",
    Code.FENCED: "Attach again, if the newer user of the volume is done with it",
    Code.NOT_PRIMARY: "Send the request to the primary of the current configuration",
    Code.BUSY: "Send it again after a short pause",
    Code.CANCELLED: "Send it again if it is still wanted",
    Code.INVALID: "Correct the field named in the message",
    Code.OUT_OF_RANGE: "Check offset and length against the volume's size",
    Code.MISALIGNED: "Align the request to 512 bytes, or better to 4096",
    Code.NOT_FOUND: "List the objects; names are case-sensitive",
    Code.ALREADY_EXISTS: "Choose another name or use the existing object",
    Code.IN_USE: "Detach it or remove what depends on it, then try again",
    Code.READ_ONLY: "Clone the snapshot, or attach the volume for writing",
    Code.LIMIT: "See docs/reference/limits.md for the limit named in the message",
    Code.UNSAFE: "Do what the message names first, or leave it as it is",
    Code.NO_SPACE: "Delete or discard data, or add a disk",
    Code.MEDIA_ERROR: "See `pf status` for the failing disk and restore what is lost",
    Code.BAD_CHECKSUM: "Send it again; if it persists run `pf doctor`",
    Code.DISK_FAILED: "Replace the disk; copies in sync on other stores go on serving",
    Code.UNAVAILABLE: "Try again; `pf status` names the missing part",
    Code.NO_QUORUM: "Bring the missing stores or metastore members back",
    Code.TIMED_OUT: "Read the object back before trying again",
    Code.WRONG_CLUSTER: "Check the address and the context that was used",
    Code.UNAUTHENTICATED: "Use a valid token or attach again for a fresh ticket",
    Code.DENIED: "Ask whoever runs the cluster for the right",
    Code.UNSUPPORTED: "Compare the versions with `pf version` and upgrade the older",
    Code.INTERNAL: "Report it with the output of `pf doctor` and `pf logs`",
}

HTTP_STATUS: dict[Code, int] = {
    Code.OK: 200,
    Code.STALE_EPOCH: 409,
    Code.FENCED: 409,
    Code.NOT_PRIMARY: 409,
    Code.BUSY: 503,
    Code.CANCELLED: 409,
    Code.INVALID: 400,
    Code.OUT_OF_RANGE: 400,
    Code.MISALIGNED: 400,
    Code.NOT_FOUND: 404,
    Code.ALREADY_EXISTS: 409,
    Code.IN_USE: 409,
    Code.READ_ONLY: 409,
    Code.LIMIT: 413,
    Code.UNSAFE: 409,
    Code.NO_SPACE: 507,
    Code.MEDIA_ERROR: 500,
    Code.BAD_CHECKSUM: 500,
    Code.DISK_FAILED: 503,
    Code.UNAVAILABLE: 503,
    Code.NO_QUORUM: 503,
    Code.TIMED_OUT: 504,
    Code.WRONG_CLUSTER: 409,
    Code.UNAUTHENTICATED: 401,
    Code.DENIED: 403,
    Code.UNSUPPORTED: 501,
    Code.INTERNAL: 500,
}


class PureFlashError(Exception):
    """Anything PureFlash refuses or fails to do.

    `code` says what happened, `message` the particulars, `next_step` what the reader can do, and
    `request_id` finds the request in the logs (None outside a request).
    """

    def __init__(
        self,
        code: Code,
        message: str | None = None,
        *,
        next_step: str | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(code, message, next_step, request_id)
        self.code = code
        self.message = MEANING[code] if message is None else message
        self.next_step = NEXT_STEP[code] if next_step is None else next_step
        self.request_id = request_id

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle by code, so that an error keeps its class across processes."""
        return (_rebuild, (int(self.code), self.message, self.next_step, self.request_id))

    def __str__(self) -> str:
        tail = "" if self.request_id is None else f" (request {self.request_id})"
        return f"{self.code.name}: {self.message}. {self.next_step}.{tail}"

    @property
    def http_status(self) -> int:
        """Give the HTTP status that carries this code."""
        return HTTP_STATUS[self.code]


class RouteError(PureFlashError):
    """Retry, or ask another replica; nothing is wrong with the request."""


class CallerError(PureFlashError):
    """The request cannot be carried out as it stands."""


class MediaError(PureFlashError):
    """Space or media: a disk is full, failing or returned wrong data."""


class ClusterError(PureFlashError):
    """The cluster cannot serve this now."""


class SecurityError(PureFlashError):
    """The caller is unknown or may not do this."""


class SoftwareError(PureFlashError):
    """The version in use cannot do it, or has a bug."""


_CLASS: dict[Code, type[PureFlashError]] = {
    Code.STALE_EPOCH: RouteError,
    Code.FENCED: RouteError,
    Code.NOT_PRIMARY: RouteError,
    Code.BUSY: RouteError,
    Code.CANCELLED: RouteError,
    Code.INVALID: CallerError,
    Code.OUT_OF_RANGE: CallerError,
    Code.MISALIGNED: CallerError,
    Code.NOT_FOUND: CallerError,
    Code.ALREADY_EXISTS: CallerError,
    Code.IN_USE: CallerError,
    Code.READ_ONLY: CallerError,
    Code.LIMIT: CallerError,
    Code.UNSAFE: CallerError,
    Code.NO_SPACE: MediaError,
    Code.MEDIA_ERROR: MediaError,
    Code.BAD_CHECKSUM: MediaError,
    Code.DISK_FAILED: MediaError,
    Code.UNAVAILABLE: ClusterError,
    Code.NO_QUORUM: ClusterError,
    Code.TIMED_OUT: ClusterError,
    Code.WRONG_CLUSTER: ClusterError,
    Code.UNAUTHENTICATED: SecurityError,
    Code.DENIED: SecurityError,
    Code.UNSUPPORTED: SoftwareError,
    Code.INTERNAL: SoftwareError,
}


def from_code(
    number: int,
    message: str | None = None,
    *,
    next_step: str | None = None,
    request_id: str | None = None,
) -> PureFlashError:
    """Make the error of the right class from a number off the wire.

    Errors: a number that this version does not know becomes INTERNAL and is named in the message,
    because a newer peer may answer with it; 0 (OK) is no error and raises ValueError.
    """
    if number == Code.OK:
        raise ValueError("OK is not an error")
    try:
        code = Code(number)
    except ValueError:
        prefix = f"unknown code {number}"
        message = prefix if message is None else f"{prefix}: {message}"
        code = Code.INTERNAL
    return _CLASS[code](code, message, next_step=next_step, request_id=request_id)


def _rebuild(number: int, message: str, next_step: str, request_id: str | None) -> PureFlashError:
    return from_code(number, message, next_step=next_step, request_id=request_id)
