"""The running server against its own OpenAPI document, with requests that schemathesis makes up.

For every operation: requests that fit the document and requests that do not, many of them about a
volume, store, export or job that is there. No answer is a bug of ours, each has a status, a type
and a form that the document states, and each error is a whole problem. One seed decides all;
`PF_API_SEED` tries another and `PF_API_EXAMPLES` more of them.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import requests
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from tests.api.conftest import Operation, Running, check_problem
from tests.support.server import TOKEN

from pureflash.model.rest import CreateExport, CreateVolume

SEED = int(os.environ.get("PF_API_SEED", "2026"))
EXAMPLES = int(os.environ.get("PF_API_EXAMPLES", "25"))
"""Of each operation and mode."""
ENDLESS = {"GET /v1/events"}
"""A stream has no whole answer; tests/unit/test_api.py reads its events."""
OPEN = {"GET /healthz", "GET /readyz"}
VOLUME_BYTES = 1 << 20
KNOWN = ("v1", "s1", "1", "2", "3")
"""What a path may name: the volume, the store, and the first ids."""
JOBS = 6
"""Ids up to this are drawn on purpose: some are of jobs that verified the volume."""
LIKELY: dict[str, dict[str, Any]] = {
    "POST /v1/volumes": {"name": "v2", "size_bytes": VOLUME_BYTES},
    "PATCH /v1/volumes/{reference}": {"size_bytes": 2 * VOLUME_BYTES},
    "POST /v1/exports": {"kind": "nbd", "volume": "v1"},
}
"""Fields that made-up bodies get in half of the requests, or they would be refused early."""
CHECKS: list[Callable[..., bool | None]] = [
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]


def variants(operation: Operation, mode: GenerationMode) -> st.SearchStrategy[Any]:
    """Make up requests; those with a reference also about something that is there."""
    made: st.SearchStrategy[Any] = operation.as_strategy(mode)
    if "{reference}" in operation.path:
        for name in KNOWN:
            made |= operation.as_strategy(mode, path_parameters={"reference": name})
    if "{job_id}" in operation.path and mode is GenerationMode.POSITIVE:
        for number in range(1, JOBS + 1):
            made |= operation.as_strategy(mode, path_parameters={"job_id": number})
    return made


def modes_of(operation: Operation) -> list[GenerationMode]:
    """Any text fits into paths and headers: only a body and numbers can be wrong."""
    stated = operation.definition.raw
    can_be_wrong = "requestBody" in stated or any(
        parameter["schema"].get("type") == "integer" for parameter in stated.get("parameters", [])
    )
    return list(GenerationMode) if can_be_wrong else [GenerationMode.POSITIVE]


def exercise(
    running: Running, session: requests.Session, operation: Operation, mode: GenerationMode
) -> Counter[str]:
    """Send the requests of one operation; gives how often each outcome came."""
    outcomes: Counter[str] = Counter()
    likely = LIKELY.get(operation.label)
    is_positive = mode is GenerationMode.POSITIVE

    @seed(SEED)
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=variants(operation, mode), is_likely=st.booleans())
    def send(case: Any, is_likely: bool) -> None:
        if is_positive and is_likely and likely is not None and isinstance(case.body, dict):
            case.body = case.body | likely
        answer = case.call_and_validate(
            base_url=running.url,
            session=session,
            headers={"Authorization": f"Bearer {TOKEN}"},
            checks=CHECKS if is_positive else [*CHECKS, negative_data_rejection],
        )
        bad = answer.status_code >= 400
        outcomes[check_problem(answer) if bad else str(answer.status_code)] += 1

    send()
    return outcomes


@pytest.mark.filterwarnings("ignore:Do not use the `random` module")  # schemathesis does
def test_every_operation_keeps_to_what_the_document_says(running: Running) -> None:
    outcomes: Counter[str] = Counter()
    with running.served.api() as api:
        api.create_volume(CreateVolume(name="v1", size_bytes=VOLUME_BYTES))
        api.create_export(CreateExport(kind="nbd", volume="v1"))
    # What deletes comes last, so that the others find something.
    operations = sorted(running.operations().items(), key=lambda one: one[0].startswith("DELETE"))
    with requests.Session() as session:
        for label, operation in operations:
            if label in ENDLESS:
                continue
            for mode in modes_of(operation):
                told = exercise(running, session, operation, mode)
                print(f"{label} {mode}: {dict(told)}")
                outcomes += told
    print(f"seed {SEED}, {outcomes.total()} requests: {dict(outcomes)}")
    assert {"200", "202", "204", "INVALID", "NOT_FOUND"} <= outcomes.keys()


def test_every_operation_is_closed_to_strangers(running: Running) -> None:
    for label, operation in running.operations().items():
        path = operation.path.replace("{reference}", "v1").replace("{job_id}", "1")
        answer = requests.request(operation.method, f"{running.url}{path}", timeout=30)
        if label in OPEN:
            assert answer.status_code == 200, label
        else:
            assert (answer.status_code, answer.json()["code"]) == (401, "UNAUTHENTICATED"), label
