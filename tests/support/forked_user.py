"""A program that opens a volume and forks: what its child may do with what the parent opened.

Usage: python -m tests.support.forked_user ADDRESS fork|multiprocessing. `ADDRESS` is a store of
test_core_client. Prints as JSON what each call in the child raised, and what the parent read and
wrote afterwards. The tests run it as a process of its own, because a child that hangs must not be
one of pytest's.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from tests.unit.test_core_client import CLUSTER, make_spec
from tests.unit.test_follow import Conductor

from pureflash.client import follow
from pureflash.client.cluster import Cluster
from pureflash.client.device import Device
from pureflash.errors import PureFlashError

core: Any = importlib.import_module("pureflash._core")
BLOCK = 4096


def leave(thing: Any) -> None:
    """Leave a context of the parent's in the child."""
    thing.__exit__(None, None, None)


def calls(cluster: Cluster, device: Device, volume: Any, address: str) -> dict[str, Any]:
    """Give everything that the child tries, by name."""
    api, block = cluster.api, bytes(BLOCK)
    return {
        "device.size_bytes": lambda: device.size_bytes,
        "device.news_problem": lambda: device.news_problem,
        "device.pread": lambda: device.pread(0, BLOCK),
        "device.pwrite": lambda: device.pwrite(block, offset=0),
        "device.flush": device.flush,
        "device.discard": lambda: device.discard(0, BLOCK),
        "device.write_zeroes": lambda: device.write_zeroes(0, BLOCK),
        "device.unfollow": device.unfollow,
        "device.__enter__": device.__enter__,
        "device.__exit__": lambda: leave(device),
        "device.close": device.close,
        "volume.size": lambda: volume.size,
        "volume.pread": lambda: volume.pread(0, BLOCK),
        "volume.pread of nothing": lambda: volume.pread(0, 0),
        "volume.pwrite": lambda: volume.pwrite(0, block),
        "volume.pwrite of nothing": lambda: volume.pwrite(0, b""),
        "volume.flush": volume.flush,
        "volume.discard": lambda: volume.discard(0, BLOCK),
        "volume.write_zeroes": lambda: volume.write_zeroes(0, BLOCK),
        "volume.update": lambda: volume.update(make_spec(address)),
        "volume.fileno": volume.fileno,
        "volume.drain": volume.drain,
        "volume.stats": volume.stats,
        "volume.__exit__": lambda: leave(volume),
        "volume.close": volume.close,
        "api.volume": lambda: api.volume("v1"),
        "api.events": lambda: next(api.events()),
        "api.__enter__": api.__enter__,
        "api.__exit__": lambda: leave(api),
        "api.close": api.close,
        "cluster.get": lambda: cluster.volumes.get("v1"),
        "cluster.__enter__": cluster.__enter__,
        "cluster.__exit__": lambda: leave(cluster),
        "cluster.close": cluster.close,
    }


def raised(call: Callable[[], object]) -> list[str | None]:
    """Give class, code, message and next step of what a call raises."""
    try:
        found = call()
    except PureFlashError as problem:
        name, code = type(problem).__name__, problem.code.name
        return [name, code, problem.message, problem.next_step]
    return ["nothing", repr(found), None, None]


def own_device(address: str) -> list[int]:
    """Connect and open anew, as the error says; gives what is read, whose first byte is `p`."""
    with Conductor(address).connect() as cluster, cluster.volumes.get("v1").open() as device:
        return list(device.pread(0, BLOCK)[:1])


def act(tries: Mapping[str, Callable[[], object]], address: str, pipe: int) -> None:
    """Be the child: try everything, then do it right."""
    found = {name: raised(call) for name, call in tries.items()}
    with os.fdopen(pipe, "w") as stream:
        json.dump([found, own_device(address)], stream)


def main(address: str, way: str) -> None:
    """Be the parent."""
    follow.NEWS_S = 0.1  # type: ignore[misc]  # sooner than in life, so that the test is short
    conductor = Conductor(address)
    cluster = conductor.connect()
    device = cluster.volumes.get("v1").open()
    volume = core.Volume(make_spec(address), cluster_id=CLUSTER)
    device.pwrite(b"p" * BLOCK, offset=0)
    tries = calls(cluster, device, volume, address)
    ours, theirs = os.pipe()
    if way == "fork":
        child = os.fork()
        if child == 0:
            act(tries, address, theirs)
            # Not os._exit: finalizers, atexit and the collector meet the parent's objects.
            del tries, device, volume, cluster
            sys.exit(0)
        os.close(theirs)
    else:
        context = multiprocessing.get_context("fork")
        process = context.Process(target=act, args=(tries, address, theirs))
        process.start()
        os.close(theirs)
        assert process.pid is not None
        child = process.pid
    with os.fdopen(ours) as stream:
        found, own = json.load(stream)
    if way == "fork":
        _, status = os.waitpid(child, 0)
    else:
        process.join()
        status = process.exitcode or 0
    conductor.wait_renewed()  # the follower of the parent goes on
    device.pwrite(b"q" * BLOCK, offset=BLOCK)
    after = [chr(device.pread(0, BLOCK)[0]), chr(volume.pread(BLOCK, BLOCK)[0])]
    device.close()
    volume.close()
    cluster.close()
    print(json.dumps({"child": found, "own": own, "status": status, "after": after}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
