"""The Rust core, for the few commands that use it directly; loaded when one runs."""

from __future__ import annotations

import importlib
from typing import Any

from pureflash.cli.outcome import CommandProblem, Exit


def load_core(*names: str) -> Any:
    """Give the module `pureflash._core`, which has all of `names`.

    Errors: CommandProblem when it cannot be loaded or is of another version.
    """
    step = "install the package again: pip install --force-reinstall pureflash"
    try:
        core = importlib.import_module("pureflash._core")
    except ImportError as cause:
        raise CommandProblem(
            f"the Rust core cannot be loaded: {cause}", exit_status=Exit.FAILED, next_step=step
        ) from cause
    for name in names:
        if not hasattr(core, name):
            text = f"this build of the Rust core has no {name}"
            raise CommandProblem(text, exit_status=Exit.FAILED, next_step=step)
    return core
