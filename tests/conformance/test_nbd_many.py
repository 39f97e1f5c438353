"""Ring 3: programs that list exports, on a gateway that offers very many.

Ten thousand volumes take too long to make, and their data is not what is listed: the gateway's own
table, negotiation and listener are given the list that a conductor would send, on a real socket,
around a core that opens nothing.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from tests.support.gateway import listening, spec
from tests.support.world import GIB

MANY = 10_000
NAMES = [f"volume-{number:05}" for number in range(MANY)]
CLIENT_S = 100
"""For one client; `test_nbd_clients.py` has the ordinary ones, which take milliseconds."""


async def run(*command: str) -> str:
    """Run a client beside the gateway's loop; it must succeed. Gives its output."""
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(CLIENT_S):
        told, complaint = await process.communicate()
    assert process.returncode == 0, f"{command}: {complaint.decode()}"
    return told.decode()


@pytest.mark.parametrize("count", [1, 71, MANY])
async def test_nbdinfo_lists_every_export(tmp_path: Path, count: int) -> None:
    async with listening(tmp_path) as rig:
        rig.exports.apply(tuple(spec(1 + number, NAMES[number]) for number in range(count)))
        uri = f"nbd+unix:///?socket={rig.path}"
        listed = json.loads(await run("nbdinfo", "--list", "--json", uri))["exports"]
        assert [one["export-name"] for one in listed] == NAMES[:count]
        assert {one["export-size"] for one in listed} == {GIB}
        assert not rig.gateway.adopted


@pytest.mark.parametrize("count", [1, 71, MANY])
async def test_qemu_nbd_lists_every_export(tmp_path: Path, count: int) -> None:
    async with listening(tmp_path) as rig:
        rig.exports.apply(tuple(spec(1 + number, NAMES[number]) for number in range(count)))
        lines = (await run("qemu-nbd", "--list", "--socket", str(rig.path))).splitlines()
        assert lines[0] == f"exports available: {count}"
        assert [line for line in lines if line.startswith(" export:")] == [
            f" export: '{name}'" for name in NAMES[:count]
        ]
        assert lines.count(f"  size:  {GIB}") == count
