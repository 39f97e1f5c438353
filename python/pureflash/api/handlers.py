"""The handlers of `/v1`: HTTP in, one call of the conductor, HTTP out. Nothing here decides.

Lists are sorted by id and paged: `?limit=` (1 to 1,000) and `?cursor=`, the id after which to go
on.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, TypeVar

import msgspec
from litestar import Request, Response, delete, get, patch, post
from litestar.di import NamedDependency
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import FromPath, HeaderParameter, JSONBody, QueryParameter
from litestar.response import ServerSentEvent
from litestar.response.sse import ServerSentEventMessage

from pureflash.api.idempotency import Idempotency
from pureflash.api.problems import request_id_of
from pureflash.conductor import explaining, health, requests, states
from pureflash.conductor.disk_states import disk_views
from pureflash.conductor.service import Conductor
from pureflash.conductor.view import View
from pureflash.errors import CallerError, Code
from pureflash.model.domain import Export, Store
from pureflash.model.messages import VolumeSpec
from pureflash.model.names import read_id
from pureflash.model.rest import (
    Alive,
    AttachVolume,
    ClusterView,
    CreateExport,
    CreateVolume,
    DiskView,
    EventView,
    ExitedStore,
    ExplainLine,
    ExportView,
    ForceAccept,
    ForceAcceptView,
    GatewayView,
    JobView,
    Page,
    PatchVolume,
    RecoverConfig,
    RecoveryView,
    RenewAttach,
    StoreView,
    VolumeView,
)

PAGE_MAX: Final = 1_000
_R = TypeVar("_R")
_V = TypeVar("_V")

Leader = NamedDependency[Conductor]
Reference = FromPath[str]
Limit = Annotated[int, QueryParameter(name="limit", ge=1, le=PAGE_MAX)]
Cursor = Annotated[int, QueryParameter(name="cursor", ge=0)]
IfMatch = Annotated[str | None, HeaderParameter(name="If-Match")]
Key = Annotated[
    str | None,
    HeaderParameter(name="Idempotency-Key", min_length=1, max_length=128, pattern="^[!-~]+$"),
]


@dataclass(frozen=True, slots=True)
class OnceForKey:
    """Carries out the change that one request asks for, once for the key that it came with."""

    idempotency: Idempotency
    key: str | None
    request: tuple[str, ...]
    body: bytes

    async def __call__(self, make: Callable[[], Awaitable[_R]]) -> _R:
        """Give `make()`; errors as `Idempotency.once`."""
        return await self.idempotency.once(
            self.key, request=self.request, body=self.body, make=make
        )


async def provide_once(
    idempotency: NamedDependency[Idempotency],
    request: Request[Any, Any, Any],
    key: Key = None,
    version: IfMatch = None,
) -> OnceForKey:
    """Make what a handler that changes something calls with its change."""
    what = (request.method, request.url.path, version or "")
    return OnceForKey(idempotency, key, what, await request.body())


Once = NamedDependency[OnceForKey]


def page(
    records: Sequence[tuple[int, _R]], *, cursor: int, limit: int, show: Callable[[_R], _V]
) -> Page[_V]:
    """Cut a page out of (id, record) pairs and show its records."""
    rest = sorted((pair for pair in records if pair[0] > cursor), key=lambda pair: pair[0])
    shown = rest[:limit]
    following = str(shown[-1][0]) if len(rest) > limit else None
    return Page(items=[show(record) for _, record in shown], next=following)


def parse_if_match(header: str | None) -> int | None:
    """Read a version from If-Match: `3` or `"3"`; `*` and no header match any."""
    if header is None or header == "*":
        return None
    text = header[1:-1] if len(header) > 2 and header[0] == header[-1] == '"' else header
    version = read_id(text)
    if version is None:
        raise CallerError(
            Code.INVALID,
            f"If-Match is {header[:32]!r}",
            next_step='send the version of the object: 3 or "3"',
        )
    return version


@get("/v1/cluster")
async def show_cluster(conductor: Leader) -> ClusterView:
    """Show the whole cluster on one screen: state, capacity, parts, findings."""
    view = conductor.view()
    found = health.findings(view)
    state, sentence = health.cluster_state(view, found)
    volumes = [states.volume_state(view, volume)[0] for volume in view.volumes.values()]
    running = [job for job in view.jobs.values() if not job.is_finished]
    counters: dict[str, int] = {}
    for seen in view.observed.values():
        for name, value in seen.counters.items():
            counters[name] = counters.get(name, 0) + value
    return ClusterView(
        cluster_id=view.cluster.cluster_id,
        state=state,
        sentence=sentence,
        term=conductor.term,
        lineage=conductor.records.metastore.lineage,
        revision=conductor.records.revision,
        capacity=health.capacity_view(view),
        stores=[states.store_view(view, store) for store in conductor.shown_stores()],
        gateways=[
            GatewayView(
                name=name,
                state="online" if seen.is_connected else "offline",
                connections=seen.connections if seen.is_connected else 0,
            )
            for name, seen in sorted(view.gateways.items())
        ],
        volumes_by_state={state.value: volumes.count(state) for state in sorted(set(volumes))},
        exports=len(view.exports),
        running_jobs=[states.job_view(job) for job in running],
        counters=counters,
        health=found,
    )


@get("/v1/volumes")
async def list_volumes(
    conductor: Leader, limit: Limit = PAGE_MAX, cursor: Cursor = 0
) -> Page[VolumeView]:
    """List volumes."""
    view = conductor.view()
    return page(
        list(view.volumes.items()),
        cursor=cursor,
        limit=limit,
        show=lambda volume: states.volume_view(view, volume),
    )


@post("/v1/volumes", responses={200: ResponseSpec(VolumeView, description="A dry run: not made")})
async def create_volume(
    conductor: Leader, once: Once, data: JSONBody[CreateVolume]
) -> Response[VolumeView]:
    """Make a volume; answers when its stores have it, at the latest after 10 s."""

    async def make() -> VolumeView:
        volume = await conductor.create_volume(
            name=data.name,
            size_bytes=data.size_bytes,
            replicas=data.replicas,
            shard_size_bytes=data.shard_size_bytes,
            is_dry_run=data.dry_run,
        )
        return states.volume_view(conductor.view(), volume)

    return Response(await once(make), status_code=200 if data.dry_run else 201)


@get("/v1/volumes/{reference:str}")
async def show_volume(conductor: Leader, reference: Reference) -> Response[VolumeView]:
    """Show a volume by name or id."""
    view = conductor.view()
    shown = states.volume_view(view, requests.find_volume(view, reference))
    return Response(shown, headers={"ETag": f'"{shown.version}"'})


@patch("/v1/volumes/{reference:str}")
async def change_volume(
    conductor: Leader,
    once: Once,
    reference: Reference,
    data: JSONBody[PatchVolume],
    if_match: IfMatch = None,
) -> VolumeView:
    """Let a volume grow."""
    version = parse_if_match(if_match)

    async def make() -> VolumeView:
        volume = await conductor.resize_volume(
            reference, size_bytes=data.size_bytes, if_version=version
        )
        return states.volume_view(conductor.view(), volume)

    return await once(make)


@delete("/v1/volumes/{reference:str}", status_code=202)
async def delete_volume(
    conductor: Leader, once: Once, reference: Reference, if_match: IfMatch = None
) -> JobView:
    """Delete a volume and its data; gives the job that does it."""
    version = parse_if_match(if_match)
    job = await once(lambda: conductor.delete_volume(reference, if_version=version))
    return states.job_view(job)


@post("/v1/volumes/{reference:str}/verify", status_code=202)
async def verify_volume(
    conductor: Leader,
    once: Once,
    reference: Reference,
    repair: Annotated[bool, QueryParameter(name="repair")] = True,
) -> JobView:
    """Compare all in-sync replicas of a volume, block by block; gives the job that does it.

    What one copy cannot read is mended where another one has it, unless `repair` is false.
    """
    job = await once(lambda: conductor.verify_volume(reference, is_repairing=repair))
    return states.job_view(job)


@post("/v1/volumes/{reference:str}/force-accept", status_code=200)
async def force_accept(
    conductor: Leader, once: Once, reference: Reference, data: JSONBody[ForceAccept]
) -> ForceAcceptView:
    """Let a copy count that lacks acknowledged writes, when no in-sync copy is left.

    The same again, after it was done, changes nothing and is answered with the first record.
    """
    return await once(lambda: conductor.forcing.force_accept(reference, data))


@post("/v1/conductor/recover-config", status_code=200)
async def recover_config(
    conductor: Leader, once: Once, data: JSONBody[RecoverConfig]
) -> RecoveryView:
    """Rebuild the records of a conductor that lost its memory from what the stores hold."""
    return await once(lambda: conductor.recovering.recover(data))


@get("/v1/volumes/{reference:str}/explain")
async def explain_volume(conductor: Leader, reference: Reference) -> Page[ExplainLine]:
    """Say why a volume is as it is, shard by shard."""
    view = conductor.view()
    return Page(items=explaining.explain(view, requests.find_volume(view, reference)))


@post("/v1/volumes/{reference:str}/attach", status_code=200)
async def attach_volume(
    conductor: Leader, once: Once, reference: Reference, data: JSONBody[AttachVolume]
) -> VolumeSpec:
    """Give what a client needs to do I/O on a volume directly."""
    return await once(lambda: conductor.attaching.attach(reference, is_read_only=data.is_read_only))


@post("/v1/volumes/{reference:str}/renew", status_code=200)
async def renew_attach(
    conductor: Leader, reference: Reference, data: JSONBody[RenewAttach]
) -> VolumeSpec:
    """Give what has become of an attached volume, with a young ticket of the same session.

    A reader's ticket follows the volume's attach epoch. A writer's does not: when the volume was
    attached for writing by somebody else, the stores refuse the writer of before with FENCED.
    """
    return conductor.attaching.renew(reference, ticket=data.ticket)


@get("/v1/stores")
async def list_stores(
    conductor: Leader, limit: Limit = PAGE_MAX, cursor: Cursor = 0
) -> Page[StoreView]:
    """List stores."""
    view = conductor.view()
    return page(
        list(view.stores.items()),
        cursor=cursor,
        limit=limit,
        show=lambda store: states.store_view(view, store),
    )


@get("/v1/stores/{reference:str}")
async def show_store(conductor: Leader, reference: Reference) -> StoreView:
    """Show a store by name or id."""
    view = conductor.view()
    return states.store_view(view, _find_store(view, reference))


@post("/v1/stores/{reference:str}/exited", status_code=204)
async def report_exit(
    conductor: Leader, once: Once, reference: Reference, data: JSONBody[ExitedStore]
) -> None:
    """Take a supervisor's word that a store's process has ended."""
    store = _find_store(conductor.view(), reference)
    await once(lambda: conductor.store_exited(store.id, incarnation=data.incarnation))


@get("/v1/disks")
async def list_disks(conductor: Leader) -> Page[DiskView]:
    """List the disks of all stores."""
    view = conductor.view()
    found = [disk for store in _by_id(view.stores.values()) for disk in disk_views(view, store)]
    return Page(items=found)


@get("/v1/exports")
async def list_exports(
    conductor: Leader, limit: Limit = PAGE_MAX, cursor: Cursor = 0
) -> Page[ExportView]:
    """List exports."""
    view = conductor.view()
    return page(
        list(view.exports.items()),
        cursor=cursor,
        limit=limit,
        show=lambda export: states.export_view(view, export),
    )


@post("/v1/exports", responses={200: ResponseSpec(ExportView, description="It was there")})
async def create_export(
    conductor: Leader, once: Once, data: JSONBody[CreateExport]
) -> Response[ExportView]:
    """Export a volume; the same export again is answered with the existing one and 200."""

    async def make() -> tuple[ExportView, bool]:
        export_id, is_new = await conductor.create_export(
            kind=data.kind,
            volume=data.volume,
            transport=data.transport,
            is_read_only=data.read_only,
            gateway=data.gateway,
        )
        view = conductor.view()
        return states.export_view(view, view.exports[export_id]), is_new

    shown, is_new = await once(make)
    return Response(shown, status_code=201 if is_new else 200)


@get("/v1/exports/{reference:str}")
async def show_export(conductor: Leader, reference: Reference) -> ExportView:
    """Show an export by its id or its volume's name."""
    view = conductor.view()
    return states.export_view(view, _find_export(view, reference))


@delete("/v1/exports/{reference:str}", status_code=204)
async def delete_export(conductor: Leader, once: Once, reference: Reference) -> None:
    """Take an export away, by its id or its volume's name."""

    async def make() -> None:
        await conductor.delete_export(_find_export(conductor.view(), reference).id)

    await once(make)


@get("/v1/jobs")
async def list_jobs(
    conductor: Leader, limit: Limit = PAGE_MAX, cursor: Cursor = 0
) -> Page[JobView]:
    """List jobs, also those that finished not long ago."""
    view = conductor.view()
    return page(list(view.jobs.items()), cursor=cursor, limit=limit, show=states.job_view)


# A text, and not the framework's number: that would also read `1_0` and digits of other scripts.
@get("/v1/jobs/{job_id:str}")
async def show_job(conductor: Leader, job_id: Reference) -> JobView:
    """Show a job."""
    job = conductor.view().jobs.get(read_id(job_id) or 0)
    if job is None:
        raise CallerError(
            Code.NOT_FOUND, f"there is no job {job_id[:96]!r}", next_step="see `pf job list`"
        )
    return states.job_view(job)


@get(
    "/v1/events",
    responses={200: ResponseSpec(EventView, description="Events", media_type="text/event-stream")},
)
async def follow_events(
    conductor: Leader,
    last_event_id: Annotated[str | None, HeaderParameter(name="Last-Event-ID")] = None,
) -> ServerSentEvent:
    """Stream events; with Last-Event-ID those after it that are still kept, else new ones."""
    after = conductor.events.newest_id if last_event_id is None else read_id(last_event_id)
    if after is None:
        raise CallerError(
            Code.INVALID,
            f"Last-Event-ID is {(last_event_id or '')[:32]!r}",
            next_step="send the id of an event, or no such header for new ones only",
        )

    async def stream() -> AsyncIterator[ServerSentEventMessage]:
        async for event in conductor.events.follow(after):
            data = msgspec.json.encode(event).decode()
            yield ServerSentEventMessage(event=event.kind, id=str(event.id), data=data)

    return ServerSentEvent(stream())


@get("/healthz")
async def show_liveness(conductor: Leader) -> Alive:
    """Answer, as long as the process does, and say whose conductor this is.

    Open to everybody: a client looks here before it shows its token to whoever has the port.
    """
    return Alive(status="alive", cluster_id=conductor.view().cluster.cluster_id)


@get("/readyz")
async def show_readiness(
    conductor: Leader, request: Request[Any, Any, Any]
) -> Response[dict[str, str]]:
    """Say whether the metastore answers."""
    await conductor.records.metastore.revision()
    return Response({"status": "ready", "request_id": request_id_of(request)})


def _find_store(view: View, reference: str) -> Store:
    store = view.find_store(reference)
    if store is None:
        raise CallerError(
            Code.NOT_FOUND,
            f"there is no store {reference[:96]!r}",
            next_step="see `pf store list`",
        )
    return store


def _find_export(view: View, reference: str) -> Export:
    if (found := view.exports.get(read_id(reference) or 0)) is not None:
        return found
    volume = view.find_volume(reference)
    for export in view.exports_of(volume.id) if volume else []:
        return export
    raise CallerError(
        Code.NOT_FOUND,
        f"there is no export of {reference[:96]!r}",
        next_step="see `pf export list`",
    )


def _by_id(stores: Any) -> list[Store]:
    return sorted(stores, key=lambda store: int(store.id))


HANDLERS: Final = (
    show_cluster,
    list_volumes,
    create_volume,
    show_volume,
    change_volume,
    delete_volume,
    verify_volume,
    explain_volume,
    force_accept,
    recover_config,
    attach_volume,
    renew_attach,
    list_stores,
    show_store,
    report_exit,
    list_disks,
    list_exports,
    create_export,
    show_export,
    delete_export,
    list_jobs,
    show_job,
    follow_events,
    show_liveness,
    show_readiness,
)
