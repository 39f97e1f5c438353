"""A child that writes a volume until it is killed, and says what it begins and what is done.

Speaks the lines of `pureflash.testing.lane_kill`, whose bookkeeping judges them. Run as
`python -m tests.support.volume_writer VOLUME SEED FIRST_VALUE`.
"""

from __future__ import annotations

import os
import random
import sys
import threading
from itertools import count

import pureflash
from pureflash.client.device import Device
from pureflash.testing import lane_kill
from pureflash.testing.lane_kill import BLOCK_BYTES, HOT_BLOCKS, WRITERS


def write_for_ever(device: Device, number: int, seed: str, values: count[int]) -> None:
    """Overwrite this thread's own blocks; its order is their order."""
    rng = random.Random(f"{seed}/{number}")
    span = HOT_BLOCKS // WRITERS
    while True:
        blocks = rng.choice((1, 1, 1, 2, 4, 16))
        first = number * span + rng.randrange(span - blocks + 1)
        value = next(values)
        os.write(1, f"B {first} {blocks} {value}\n".encode())
        data = b"".join(lane_kill.content(block, value) for block in range(first, first + blocks))
        device.pwrite(data, offset=first * BLOCK_BYTES)
        os.write(1, f"A {first} {blocks} {value}\n".encode())


def main() -> None:
    """Open the volume and write until killed."""
    volume, seed, first_value = sys.argv[1:]
    values = count(int(first_value))
    with pureflash.connect() as cluster, cluster.volumes.get(volume).open() as device:
        threads = [
            threading.Thread(target=write_for_ever, args=(device, number, seed, values))
            for number in range(WRITERS)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


if __name__ == "__main__":
    main()
