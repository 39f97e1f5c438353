"""Idempotency keys: a request that is sent again with its key is carried out once.

A client that lost an answer repeats the request with the same `Idempotency-Key` and gets the
answer of the first time; while that one still runs, the second waits for it, also when the first
one's connection is gone. Every request that changes something takes a key. Answers are kept in
memory: after a restart of the conductor a repeated creation is answered with ALREADY_EXISTS, and
nothing is made twice.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar

from pureflash.errors import CallerError, Code

KEYS_KEPT: Final = 1_000
SHARDS_KEPT_MAX: Final = 100_000
"""Shards that all kept answers together describe: those of large volumes have thousands each."""
_A = TypeVar("_A")


class Idempotency:
    """The answers of the newest keys, and all that are not answered yet."""

    def __init__(self) -> None:
        self._answers: OrderedDict[str, tuple[bytes, asyncio.Future[Any]]] = OrderedDict()
        self._shards: dict[str, int] = {}
        """Of each finished answer, how many it describes."""

    def __len__(self) -> int:
        return len(self._answers)

    async def once(
        self,
        key: str | None,
        *,
        request: tuple[str, ...],
        body: bytes = b"",
        make: Callable[[], Awaitable[_A]],
    ) -> _A:
        """Give `make()`, or what it gave for this key before; failures are not kept.

        `request` says all that the request depends on besides its body: method, path, version.
        Errors: CallerError INVALID when the key came with another request before; those of `make`.
        """
        if key is None:
            return await make()
        mark = "\0".join(request).encode() + b"\0" + body
        if (known := self._answers.get(key)) is not None:
            if known[0] != mark:
                raise CallerError(
                    Code.INVALID,
                    "the idempotency key was used for another request",
                    next_step="draw a fresh key for each request",
                )
            answer: _A = await asyncio.shield(known[1])
            return answer
        future: asyncio.Future[Any] = asyncio.ensure_future(make())
        self._answers[key] = (mark, future)
        # Also without anybody who waits: the connection may be gone, and the answer is wanted.
        future.add_done_callback(lambda done: self._finish(key, done))
        made: _A = await asyncio.shield(future)
        return made

    def _finish(self, key: str, future: asyncio.Future[Any]) -> None:
        """Keep an answer and forget the oldest; a failure is not kept."""
        if future.cancelled() or future.exception() is not None:
            del self._answers[key]
            return
        self._shards[key] = len(getattr(future.result(), "shards", ()))
        total = sum(self._shards.values())
        while len(self._shards) > 1 and (len(self._answers) > KEYS_KEPT or total > SHARDS_KEPT_MAX):
            oldest = next(one for one in self._answers if one in self._shards)
            del self._answers[oldest]
            total -= self._shards.pop(oldest)
