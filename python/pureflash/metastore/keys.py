"""Keys of the metastore, as docs/internals/interfaces.md section 7 names them."""

from __future__ import annotations

from typing import Final

CLUSTER: Final = "cluster"
TERM: Final = "term"
LEASE: Final = "lease/conductor"
AMNESIA: Final = "amnesia"


def store(store_id: int) -> str:
    """Key of a store's registration."""
    return f"store/{store_id}"


def volume(volume_id: int) -> str:
    """Key of a volume."""
    return f"volume/{volume_id}"


def name(volume_name: str) -> str:
    """Key of the claim on a name."""
    return f"name/{volume_name}"


def shard(volume_id: int, index: int) -> str:
    """Key of a shard's configuration."""
    return f"shard/{volume_id}/{index}"


def differing(volume_id: int, index: int) -> str:
    """Key of what a verification found to differ between copies of a shard."""
    return f"differing/{volume_id}/{index}"


def export(export_id: int) -> str:
    """Key of an export."""
    return f"export/{export_id}"


def job(job_id: int) -> str:
    """Key of a job."""
    return f"job/{job_id}"
