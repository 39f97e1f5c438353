"""Random I/O around every edge of a volume, against a model: the workload of the edge tests.

One seed decides everything. Offsets lie within a few sectors of the edges of blocks, slots,
regions, extents, shards and of the volume itself, so that nearly every request straddles one.
Requests of a batch do not overlap and are all in flight together.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from tests.support.nbd import FUA, NO_HOLE, Command, NbdClient
from tests.support.sparse import PAGE_BYTES, SparseBytes

SECTOR: Final = 512
KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30
BATCH_REQUESTS: Final = 16
BATCH_BYTES: Final = 8 * MIB
"""Of data in one batch: less than what a connection may have in flight."""
NEAR_SECTORS: Final = 9
"""How far from an edge a request begins: one sector more than a block."""
LONG_BYTES: Final = 3 * MIB
VAST_BYTES: Final = 1536 * MIB
"""Of a trim or write of zeros that spans two shard edges."""


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked for; `data` of a write only."""

    command: Command
    offset: int
    length: int
    flags: int = 0
    data: bytes = b""

    @property
    def end(self) -> int:
        """The first byte behind it."""
        return self.offset + self.length


class EdgeLoad:
    """The workload of one volume with its model."""

    def __init__(self, *, size_bytes: int, shard_bytes: int, seed: str) -> None:
        """Begin with a volume that reads as zeros."""
        self.model = SparseBytes()
        self.size_bytes = size_bytes
        self.shard_bytes = shard_bytes
        self.counts = dict.fromkeys(Command, 0)
        self._chance = random.Random(seed)
        self._written = 0

    def edges(self) -> list[int]:
        """Give the places around which everything happens."""
        near = [0, 4 * KIB, 64 * KIB, MIB, 4 * MIB, self.size_bytes]
        for shard in range(self.shard_bytes, self.size_bytes, self.shard_bytes):
            near += [shard, shard, shard + 4 * MIB, shard - 4 * MIB, shard + 64 * KIB]
        return near

    def run(self, client: NbdClient, *, batches: int) -> None:
        """Do so many batches and compare whatever is read."""
        for _ in range(batches):
            self._batch(client, self._draw_batch())
        self._send(client, [Request(Command.FLUSH, 0, 0)])

    def vast(self, client: NbdClient) -> None:
        """Trim, then zero, a range that holds at least one whole extent and shard edges."""
        for command in (Command.TRIM, Command.WRITE_ZEROES):
            start = self.shard_bytes // 2 + SECTOR * self._chance.randint(-9, 9)
            length = min(VAST_BYTES, self.size_bytes - start) // SECTOR * SECTOR
            self._batch(client, [Request(command, start, length)])

    def compare_all(self, client: NbdClient) -> None:
        """Read every page that was ever written, and one on each side of it."""
        pages = {
            number + beside
            for number in self.model.touched
            for beside in (-1, 0, 1)
            if 0 <= (number + beside) * PAGE_BYTES < self.size_bytes
        }
        reads = [
            Request(
                Command.READ,
                number * PAGE_BYTES,
                min(PAGE_BYTES, self.size_bytes - number * PAGE_BYTES),
            )
            for number in sorted(pages)
        ]
        for first in range(0, len(reads), 64):
            self._send(client, reads[first : first + 64])

    def _draw_batch(self) -> list[Request]:
        batch: list[Request] = []
        data_bytes = 0
        for _ in range(BATCH_REQUESTS):
            request = self._draw()
            overlaps = any(
                request.offset < other.end and other.offset < request.end for other in batch
            )
            has_data = request.command in (Command.READ, Command.WRITE)
            if overlaps or (has_data and data_bytes + request.length > BATCH_BYTES):
                continue
            data_bytes += request.length if has_data else 0
            batch.append(request)
        return batch

    def _draw(self) -> Request:
        chance = self._chance
        command = chance.choices(
            [Command.READ, Command.WRITE, Command.WRITE_ZEROES, Command.TRIM], [40, 40, 10, 10]
        )[0]
        length = SECTOR * chance.randint(1, 24)
        if chance.random() < 0.15:
            length = chance.choice([4 * KIB, 64 * KIB, MIB, LONG_BYTES - SECTOR])
        edge = chance.choice(self.edges()) + SECTOR * chance.randint(-NEAR_SECTORS, NEAR_SECTORS)
        # In half of all cases the edge is somewhere inside.
        if chance.random() < 0.5:
            edge -= SECTOR * chance.randint(0, length // SECTOR)
        offset = min(max(0, edge), self.size_bytes - SECTOR)
        length = min(length, self.size_bytes - offset)
        flags = FUA if command is not Command.READ and chance.random() < 0.3 else 0
        if command is Command.WRITE_ZEROES and chance.random() < 0.3:
            flags |= NO_HOLE
        data = self._data(length) if command is Command.WRITE else b""
        return Request(command, offset, length, flags, data)

    def _data(self, length: int) -> bytes:
        """Give data that differ from all others of this load, and from sector to sector."""
        self._written += 1
        first = self._written * 1_000_003
        return b"".join(
            (first + sector).to_bytes(8, "big") * (SECTOR // 8)
            for sector in range(length // SECTOR)
        )

    def _batch(self, client: NbdClient, batch: list[Request]) -> None:
        self._send(client, batch)
        for request in batch:
            if request.command is Command.WRITE:
                self.model.write(request.offset, request.data)
            elif request.command in (Command.TRIM, Command.WRITE_ZEROES):
                self.model.zero(request.offset, request.length)

    def _send(self, client: NbdClient, batch: list[Request]) -> None:
        """Let all of them be under way together; what is read must be as the model has it."""
        waiting = {
            client.send(
                request.command,
                request.offset,
                request.length,
                data=request.data,
                flags=request.flags,
            ): request
            for request in batch
        }
        while waiting:
            answer = client.receive()
            request = waiting.pop(answer.cookie)
            self.counts[request.command] += 1
            assert answer.error == 0, f"{request.command.name} {_place(request)}: {answer}"
            if request.command is Command.READ:
                expected = self.model.read(request.offset, request.length)
                assert answer.data == expected, _difference(request, expected, answer.data)


def _place(request: Request) -> str:
    return f"of {request.length} bytes at {request.offset:#x}"


def _difference(request: Request, expected: bytes, found: bytes) -> str:
    def sectors(data: bytes) -> Iterator[bytes]:
        return (data[first : first + SECTOR] for first in range(0, len(data), SECTOR))

    for number, (one, other) in enumerate(zip(sectors(expected), sectors(found), strict=True)):
        if one != other:
            where = request.offset + number * SECTOR
            return f"READ {_place(request)}: at {where:#x} {other[:8].hex()}, not {one[:8].hex()}"
    return "equal"
