"""Kill a writer again and again, and prove that nothing it was told is lost.

A child process opens one lane of a disk file through `_core.Lane`, writes random blocks from
several threads, and says on a pipe what it begins and what was acknowledged. After a random number
of acknowledgements the parent kills it with SIGKILL, opens the lane (recovery), and compares every
block ever touched: it must hold its last acknowledged content or one that was begun after that,
and never a mixture. Then the next child goes on where the last one died.

Run by the tests; `python -m pureflash.testing.lane_kill` kills 50 writers. What it shows is the
death of a process; loss of power is what the crash explorer of crates/lane simulates.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pureflash import _core
from pureflash.units import format_size

BLOCK_BYTES = 4096
CLUSTER_ID = bytes(range(16))
VOLUME_ID = 1
SHARD_BLOCKS = 16384
"""Size of the replica: 64 MiB."""
HOT_BLOCKS = 2048
"""Blocks that are written: few enough to be overwritten, so that every write mode is used."""
DISK_BYTES = 1 << 30
JOURNAL_BYTES = 16 << 20
WRITERS = 8
ACKS_PER_LIFE = (20, 600)


@dataclass(slots=True)
class Known:
    """What may be in one block: the last acknowledged value, and values begun since."""

    acknowledged: int = 0
    begun: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Totals:
    """Figures of the whole run; all are printed."""

    kills: int = 0
    engine: str = ""
    """Which one really served; another than asked for where that cannot be used."""
    acknowledged: int = 0
    unfinished: int = 0
    verified: int = 0
    replayed_records: int = 0
    checked_blocks: int = 0
    restored_blocks: int = 0
    placed_blocks: int = 0
    touches: int = 0
    redos: int = 0
    intents: int = 0
    checkpoints: int = 0
    journal_wraps: int = 0


class LostWriteProblem(Exception):
    """A block holds something else than it may: the promise is broken."""


def content(block: int, value: int) -> bytes:
    """Make the 4 KiB that name (block, value); zeros for value 0, which is "never written"."""
    if value == 0:
        return bytes(BLOCK_BYTES)
    word = block.to_bytes(4, "little") + value.to_bytes(8, "little")
    return (word * (BLOCK_BYTES // len(word) + 1))[:BLOCK_BYTES]


# ------------------------------------------------------------------------------------- the child --


class _Writer:
    """State that the child's threads share."""

    def __init__(self, lane: _core.Lane, shard_ix: int, seq: int, seed: int) -> None:
        self.lane = lane
        self.shard_ix = shard_ix
        self.next_value = seq
        self.open_values: set[int] = set()
        self.lock = threading.Lock()
        self.seed = seed

    def say(self, kind: str, first: int, count: int, value: int) -> None:
        # One write per line: lines of several threads do not mix, and nothing is buffered here
        # that a kill could take away.
        os.write(1, f"{kind} {first} {count} {value}\n".encode())

    def run(self, number: int) -> None:
        """Write for ever; each thread has blocks of its own, so its order is the blocks' order."""
        rng = random.Random(f"{self.seed}/{number}")
        span = HOT_BLOCKS // WRITERS
        while True:
            count = rng.choice((1, 1, 1, 1, 2, 4, 16, 64))
            first = number * span + rng.randrange(span - count + 1)
            with self.lock:
                value = self.next_value
                self.next_value += 1
                self.open_values.add(value)
                commit = min(self.open_values) - 1
            self.say("B", first, count, value)
            data = b"".join(content(block, value) for block in range(first, first + count))
            self.lane.write(self.shard_ix, first, data, seq=value, commit=commit)
            self.say("A", first, count, value)
            with self.lock:
                self.open_values.remove(value)


def child(disk: Path, engine: str, seed: int) -> None:
    """Open the lane and write until killed."""
    lane = _core.Lane(disk, cluster_id=CLUSTER_ID, engine=engine)
    replicas = lane.facts()["replicas"]
    shard_ix = replicas[0][0] if replicas else lane.create(VOLUME_ID, SHARD_BLOCKS)
    seq = max((replica[4] for replica in replicas), default=0) + 1
    writer = _Writer(lane, shard_ix, seq, seed)
    threads = [threading.Thread(target=writer.run, args=(number,)) for number in range(WRITERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


# ------------------------------------------------------------------------------------ the parent --


def one_life(
    disk: Path, known: dict[int, Known], *, engine: str, rng: random.Random, totals: Totals
) -> None:
    """Let a child write, kill it after a random number of acknowledgements, note what it said."""
    target = rng.randint(*ACKS_PER_LIFE)
    command = [sys.executable, "-m", __spec__.name if __spec__ else __name__, "--child"]
    command += ["--disk", str(disk), "--engine", engine, "--seed", str(rng.getrandbits(32))]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None, "asked for above"
        seen = 0
        # Read to the end: what was said before the kill counts, whenever it is read.
        for line in process.stdout:
            seen += note(line, known, totals)
            if seen == target:
                process.send_signal(signal.SIGKILL)
        status = process.wait()
    if status != -signal.SIGKILL:
        raise LostWriteProblem(f"the writer ended by itself with status {status}")
    totals.kills += 1
    totals.unfinished += sum(len(entry.begun) > 0 for entry in known.values())


def note(line: bytes, known: dict[int, Known], totals: Totals) -> int:
    """Take one line of the child into account; 1 for an acknowledgement."""
    parts = line.split()
    if len(parts) != 4 or not line.endswith(b"\n"):
        return 0  # the kill cut the last line
    kind, first, count, value = parts[0], int(parts[1]), int(parts[2]), int(parts[3])
    for block in range(first, first + count):
        entry = known.setdefault(block, Known())
        if kind == b"B":
            entry.begun.append(value)
        else:
            entry.acknowledged = value
            entry.begun.clear()
    if kind == b"A":
        totals.acknowledged += 1
        return 1
    return 0


def verify(disk: Path, known: dict[int, Known], *, engine: str, totals: Totals) -> None:
    """Recover the lane and compare every block; what is found is what counts from now on."""
    lane = _core.Lane(disk, cluster_id=CLUSTER_ID, engine=engine)
    try:
        facts = lane.facts()
        totals.engine = facts["engine"]
        totals.replayed_records += facts["replayed_records"]
        totals.checked_blocks += facts["verified_blocks"]
        totals.restored_blocks += facts["restored_blocks"]
        totals.placed_blocks += facts["placed_blocks"]
        shard_ix = facts["replicas"][0][0]
        for block, found in _read_all(lane, shard_ix):
            entry = known.get(block, Known())
            allowed = [entry.acknowledged, *entry.begun]
            value = int.from_bytes(found[4:12], "little")
            if value not in allowed or found != content(block, value):
                raise LostWriteProblem(
                    f"block {block} holds {found[:12].hex()}, allowed are the values {allowed}"
                )
            known[block] = Known(acknowledged=value)
            totals.verified += 1
    finally:
        lane.close()


def _read_all(lane: _core.Lane, shard_ix: int) -> Iterator[tuple[int, bytes]]:
    for first in range(0, HOT_BLOCKS, 256):
        data = lane.read(shard_ix, first, 256)
        for index in range(256):
            yield first + index, data[index * BLOCK_BYTES : (index + 1) * BLOCK_BYTES]


def run(directory: Path, *, kills: int, engine: str, seed: int, progress: bool) -> Totals:
    """Kill `kills` writers over one new disk file in `directory`.

    Errors: LostWriteProblem as soon as a block is wrong; PureFlashError of the lane itself.
    """
    disk = directory / "disk0.img"
    _core.format_disk(
        disk, size_bytes=DISK_BYTES, cluster_id=CLUSTER_ID, journal_bytes=JOURNAL_BYTES
    )
    rng = random.Random(seed)
    known: dict[int, Known] = {}
    totals = Totals()
    started = time.monotonic()
    for number in range(1, kills + 1):
        one_life(disk, known, engine=engine, rng=rng, totals=totals)
        verify(disk, known, engine=engine, totals=totals)
        if progress and number % 5 == 0:
            print(
                f"  {number:3} kills  {totals.acknowledged:7} writes acknowledged,"
                f" all of them there  ({time.monotonic() - started:.1f} s)",
                flush=True,
            )
    return totals


def main() -> int:
    """Run the demonstration; exit status 0 only when every acknowledged write was there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--engine", default="auto", choices=("auto", "uring", "aio", "threads"))
    parser.add_argument("--seed", type=int, default=None, help="random when not given; printed")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--disk", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.disk, arguments.engine, arguments.seed)
        return 0
    seed = random.SystemRandom().getrandbits(32) if arguments.seed is None else arguments.seed
    print(f"PureFlash: one lane, {arguments.kills} kills -9 of its writer (seed {seed})")
    print(
        f"  {WRITERS} threads overwrite {HOT_BLOCKS} blocks of a {format_size(DISK_BYTES)} disk"
        f" file; journal of {JOURNAL_BYTES // BLOCK_BYTES} pages; engine {arguments.engine}"
    )
    with tempfile.TemporaryDirectory(prefix="pureflash-demo-") as folder:
        try:
            totals = run(
                Path(folder),
                kills=arguments.kills,
                engine=arguments.engine,
                seed=seed,
                progress=True,
            )
        except LostWriteProblem as problem:
            print(f"FAILED: {problem} (seed {seed})", file=sys.stderr)
            return 1
    print_summary(totals)
    return 0


def print_summary(totals: Totals) -> None:
    """Say what was shown, in figures."""
    print(f"  engine used                   {totals.engine}")
    print(f"  kills -9                      {totals.kills}")
    print(f"  writes acknowledged           {totals.acknowledged}, lost: 0")
    print(f"  blocks compared               {totals.verified}, wrong: 0")
    print(f"  blocks under an open write    {totals.unfinished}")
    print(f"  records replayed              {totals.replayed_records}")
    print(f"  blocks decided by recovery    {totals.checked_blocks}")
    print(f"    put in place from journal   {totals.placed_blocks}")
    print(f"    kept their old content      {totals.restored_blocks}")


if __name__ == "__main__":
    sys.exit(main())
