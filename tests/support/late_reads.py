"""A client that goes on reading from the primary it knows, while that one is being succeeded.

It speaks PFW by itself: the product's own client would follow the configuration and ask the
successor. The new value is written under the same attachment, so that nothing but the change of
primary can be what refuses the old connection.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from types import TracebackType
from typing import Final, Self

from tests.support.cluster import RealCluster
from tests.support.pfw import Session, status

from pureflash.errors import Code
from pureflash.testing.model.wire import Opcode

BLOCK_BYTES: Final = 4096
READS: Final = 8
"""In one burst; their replies fit into the socket, nobody takes them while they are sent."""
REFUSALS: Final = frozenset({Code.STALE_EPOCH, Code.NOT_PRIMARY, Code.FENCED})


class LateReader:
    """A connection to the primary of one volume, over which `old` was written and read."""

    def __init__(self, cluster: RealCluster, volume: str) -> None:
        """Attach the volume, write its first block and read it back."""
        self.volume = volume
        self.old = f"old {volume} ".encode().ljust(BLOCK_BYTES, b".")
        self.new = f"new {volume} ".encode().ljust(BLOCK_BYTES, b".")
        self._cluster = cluster
        with cluster.api() as api:
            self._spec = api.attach_volume(volume)
        (shard,) = self._spec.shards
        self._epoch = shard.epoch
        self._sent = 0
        self._session = self._connect(shard.address, shard.epoch)
        cluster.wait(
            f"{volume} is served", lambda: status(self._session.write(0, self.old)) is Code.OK
        )
        read = self._session.read(0, BLOCK_BYTES)
        assert (status(read), read.data) == (Code.OK, self.old), "before all, it is served"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._session.close()

    def write_through_successor(self, former: str) -> None:
        """Wait until another store is primary, and write the new value through that one."""

        def is_written() -> bool:
            with self._cluster.api() as api:
                (shard,) = api.volume(self.volume).shards
                stores = {store.id: store for store in api.stores()}
            if shard.primary is None or stores[shard.primary].name == former:
                return False
            assert shard.epoch > self._epoch, "a successor has an epoch of its own"
            with self._connect(stores[shard.primary].address, shard.epoch) as session:
                return (
                    status(session.write(0, self.new)) is Code.OK
                    and session.read(0, BLOCK_BYTES).data == self.new
                )

        self._cluster.wait(f"a successor of {former} has the new value", is_written, seconds=20)

    def ask(self) -> None:
        """Send a burst of reads to the old primary, and wait for nothing."""
        for _ in range(READS):
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self._session.send(self._session.request(Opcode.READ, 0, BLOCK_BYTES))
            self._sent += 1

    def refusals(self) -> Counter[str]:
        """Take the answers to all that was asked; fails for any that carries data."""
        told: Counter[str] = Counter()
        while self._sent:
            try:
                answer = self._session.receive()
            except (EOFError, ConnectionError):
                told["closed"] += self._sent
                self._sent = 0
                break
            self._sent -= 1
            assert answer.is_error, f"{self.volume}: a late read was answered {answer.data[:32]!r}"
            assert not answer.data
            assert status(answer) in REFUSALS, f"{self.volume}: {status(answer).name}"
            told[status(answer).name] += 1
        return told

    def _connect(self, address: str, epoch: int) -> Session:
        cluster_id, ticket = bytes.fromhex(self._spec.cluster_id), bytes.fromhex(self._spec.ticket)
        session = Session(address, cluster_id, ticket, epoch=epoch)
        assert status(session.hello) is Code.OK
        return session
