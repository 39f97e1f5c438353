"""One load in a process of its own, so that its CPU can be told from everybody else's.

`python -m bench.client volume|lane|disk JSON`; prints {"report": .., "cpu_s": ..}. The CPU is that
of the load alone: starting Python and importing are over when the clock begins.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from pureflash import _core


def run(kind: str, document: dict[str, Any]) -> dict[str, Any]:
    """Run the load that `document` describes. Errors: ValueError for an unknown kind."""
    work = document["work"]
    started = time.process_time()
    report: object
    if kind == "volume":
        spec = document["spec"] | {"ticket": bytes.fromhex(document["spec"]["ticket"])}
        report = _core.load_volume(spec, work, cluster_id=bytes.fromhex(document["cluster_id"]))
    elif kind == "lane":
        cluster_id = bytes.fromhex(document["cluster_id"])
        report = _core.load_lane(document["path"], work, cluster_id=cluster_id)
    elif kind == "disk":
        report = _core.load_disk(document["path"], work)
    else:
        raise ValueError(f"no load is called {kind!r}: volume, lane or disk")
    return {"report": report, "cpu_s": time.process_time() - started}


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1], json.loads(sys.argv[2]))))
