"""What `cluster.toml` has to hold, in the words of an error that a person reads. Pure.

The supervisor reads all of it and a client two entries; whichever meets a damaged one first says
the same, with the same next step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

DAMAGED_STEP: Final = "restore it from a backup; the disks name the cluster they belong to"


def entry(document: Mapping[str, object], section: str, key: str) -> object:
    """Give an entry. Errors: ValueError that says what is missing."""
    content = document.get(section)
    if content is None:
        raise ValueError(f"the section [{section}] is missing")
    if not isinstance(content, dict):
        raise ValueError(f"{section} is no section")  # noqa: TRY004 - the file's fault, as below
    if key not in content:
        raise ValueError(f"{section}.{key} is missing")
    return content[key]
