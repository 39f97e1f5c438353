"""What the tests of simulated worlds share: running them, and saying how to run them again."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from pureflash.testing.swarm import Result, replay_command, run_seed

SEEDS = int(os.environ.get("PF_SCENARIO_SEEDS", "500"))
"""Seeds of the swarm test; CI takes the default."""
FIXED = Path(__file__).with_name("seeds.txt")


def fixed_seeds() -> list[tuple[int, str]]:
    """Read the permanent list: seed and options of each."""
    found = []
    for line in FIXED.read_text().splitlines():
        text = line.split("#", 1)[0].strip()
        if text:
            seed, options = text.split(maxsplit=1)
            found.append((int(seed), json.dumps(json.loads(options))))
    return found


def describe(result: Result, options: str) -> str:
    """Say what broke and how to see it again."""
    return f"seed {result.seed}: {result.violation}\n{replay_command(result, options)}"


def run_good(seed: int, options: Mapping[str, int] | str) -> Result:
    """Run a world, judge its trace too, and give its result; a violation fails the test."""
    text = options if isinstance(options, str) else json.dumps(dict(options))
    result = run_seed(seed, text, refine=True)
    assert result.violation is None, describe(result, text)
    assert result.refined_lines > 0
    return result
