"""A forked child touches what its parent has open: it is told so at once, and disturbs nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.unit.test_core_client import Store, store

__all__ = ["store"]
ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 60


def run_forked(address: str, way: str) -> dict[str, Any]:
    """Run the program of `tests/support/forked_user.py`; a hang is ended with all its processes."""
    command = [sys.executable, "-m", "tests.support.forked_user", address, way]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as program:
        try:
            output, _ = program.communicate(timeout=PATIENCE_S)
        except subprocess.TimeoutExpired:
            os.killpg(program.pid, signal.SIGKILL)
            raise
    assert program.returncode == 0
    found: dict[str, Any] = json.loads(output)
    return found


@pytest.mark.parametrize("way", ["fork", "multiprocessing"])
def test_a_forked_child_is_refused_whatever_it_touches(store: Store, way: str) -> None:
    found = run_forked(store.address, way)
    for name, (kind, code, message, step) in found["child"].items():
        assert (kind, code) == ("CallerError", "IN_USE"), (name, kind, code)
        assert "was opened by process" in message, name
        assert step is None or "spawn" in step, name
    assert len(found["child"]) > 30
    assert found["own"] == [ord("p")], "what the child opened itself works"
    assert found["status"] == 0, "the child ended as any other"
    assert found["after"] == ["p", "q"], "the parent was not disturbed"
    assert bytes(store.content[:8192]) == b"p" * 4096 + b"q" * 4096, "the child wrote nothing"


def test_an_exception_of_a_child_is_not_hidden_by_the_context_that_it_leaves(store: Store) -> None:
    program = f"""
import os
from tests.unit.test_core_client import CLUSTER, make_spec
from tests.unit.test_follow import Conductor
from pureflash import _core
cluster = Conductor({store.address!r}).connect()
child = None
try:
    with (
        cluster, cluster.volumes.get("v1").open(),
        _core.Volume(make_spec({store.address!r}), cluster_id=CLUSTER),
    ):
        child = os.fork()
        if child == 0:
            raise LookupError("of the child")
except LookupError:
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, timeout=PATIENCE_S)
