"""Idempotency keys: a request that is sent again with its key is carried out once.

A client that lost an answer repeats the request with the same `Idempotency-Key` and gets the
answer of the first time; while that one still runs, the second waits for it. Answers are kept in
memory: after a restart of the conductor a repeated creation is answered with ALREADY_EXISTS, and
nothing is made twice.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar

import msgspec

from pureflash.errors import CallerError, Code

KEYS_KEPT: Final = 1_000
_A = TypeVar("_A")


class Idempotency:
    """The answers of the newest `KEYS_KEPT` keys."""

    def __init__(self) -> None:
        self._answers: OrderedDict[str, tuple[bytes, asyncio.Future[Any]]] = OrderedDict()

    async def once(
        self, key: str | None, *, path: str, body: msgspec.Struct, make: Callable[[], Awaitable[_A]]
    ) -> _A:
        """Give `make()`, or what it gave for this key before; failures are not kept.

        Errors: CallerError INVALID when the key came with another request before; those of `make`.
        """
        if key is None:
            return await make()
        mark = path.encode() + b"\0" + msgspec.json.encode(body)
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
        while len(self._answers) > KEYS_KEPT:
            self._answers.popitem(last=False)
        try:
            made: _A = await asyncio.shield(future)
        except Exception:
            self._answers.pop(key, None)
            raise
        return made
