"""The directory of a cluster on one machine: made once, read ever after.

`cluster.toml` is written last and by rename, so that a directory is a cluster or is not. Ports are
chosen at the first start, the next free of 20 from each default, and written down: after a stop or
a reboot the same cluster has the same addresses (`ports`: two first starts at once never choose the
same).
"""

from __future__ import annotations

import importlib
import json
import os
import re
import secrets
import shutil
import stat
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from pureflash.errors import CallerError, Code, MediaError, PureFlashError
from pureflash.model.cluster_file import DAMAGED_STEP, entry
from pureflash.model.layout import CONDUCTOR, GATEWAY, Layout, known_disk_file, store_name
from pureflash.process.known_disks import is_another, recall
from pureflash.process.lifecycle import write_whole
from pureflash.supervisor.ports import PORT_MAX, PortClaims
from pureflash.units import format_size, format_sizes

CONDUCTOR_PORT: Final = 7180
STORE_PORT: Final = 7162
NBD_PORT: Final = 10809
STORES_MAX: Final = 16
"""On one machine; the port ranges of stores and conductor would meet above it."""
FREE_PERCENT_MIN: Final = 10
DISK_BYTES_MIN: Final = 1 << 30
JOURNAL_BYTES_MIN: Final = 1 << 20
JOURNAL_BYTES_MAX: Final = 2 << 30
"""The format's own bound."""
JOURNALS_PER_DISK_MAX: Final = 16
"""So that the journals of four lanes take at most a quarter of a disk."""
CLUSTER_ID: Final = re.compile(r"[0-9a-f]{32}")
SIZE_MAX: Final = (1 << 63) - 1
"""Of a file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What `pf up` was asked for; None: not said."""

    stores: int | None = None
    disk_bytes: int | None = None
    journal_bytes: int | None = None
    conductor_port: int | None = None
    store_port: int | None = None
    """Of the first store; the others have the ones that follow."""
    nbd_port: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterFile:
    """The contents of `cluster.toml`. `journal_bytes` 0: the store chooses."""

    cluster_id: str
    conductor_port: int
    store_ports: tuple[int, ...]
    nbd_port: int
    disk_bytes: int
    journal_bytes: int

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all processes, in the order of starting."""
        stores = (store_name(number) for number in range(1, len(self.store_ports) + 1))
        return (CONDUCTOR, *stores, GATEWAY)


STORES_DEFAULT: Final = 3
DISK_BYTES_DEFAULT: Final = 10 << 30


async def open_cluster(
    layout: Layout, wish: Wish, *, ports: PortClaims
) -> tuple[ClusterFile, list[str]]:
    """Read the cluster of a directory, or make one; gives it with warnings for the user.

    Its ports are claimed in `ports` for as long as those live.

    Errors: CallerError INVALID for a wish that differs from what is there, IN_USE for a port;
    MediaError NO_SPACE; OSError where the directory cannot be written.
    """
    if not layout.cluster_file.exists():
        return _make_cluster(layout, wish, ports)
    before = read_cluster(layout)
    _check_wish(before, wish, layout)
    cluster, warnings = await _settle_ports(before, wish, ports)
    if cluster != before:
        write_whole(layout.cluster_file, _toml(_document(cluster)).encode())
    return cluster, warnings


async def _settle_ports(
    before: ClusterFile, wish: Wish, ports: PortClaims
) -> tuple[ClusterFile, list[str]]:
    """Claim the ports of before, those that a person asks for, or others where they are taken."""
    warnings: list[str] = []

    async def settled(port: int, wanted: int | None, flag: str, base: int, whose: str) -> int:
        if wanted is not None and wanted != port:
            return ports.exactly(wanted, flag=flag)
        now, why = await ports.settle(port, base=base)
        if why:
            warnings.append(f"port {now} is {whose} from now on: {why}")
        return now

    conductor = await settled(
        before.conductor_port,
        wish.conductor_port,
        "--conductor-port",
        CONDUCTOR_PORT,
        "the conductor's",
    )
    stores = [
        await settled(
            port,
            None if wish.store_port is None else wish.store_port + index,
            "--store-port",
            STORE_PORT,
            f"that of {store_name(index + 1)}",
        )
        for index, port in enumerate(before.store_ports)
    ]
    nbd = await settled(before.nbd_port, wish.nbd_port, "--nbd-port", NBD_PORT, "the gateway's")
    if nbd != before.nbd_port:
        warnings.append("exports over TCP have another URI now: pf export list")
    after = replace(before, conductor_port=conductor, store_ports=tuple(stores), nbd_port=nbd)
    return after, warnings


def _make_cluster(layout: Layout, wish: Wish, ports: PortClaims) -> tuple[ClusterFile, list[str]]:
    stores = STORES_DEFAULT if wish.stores is None else wish.stores
    disk_bytes = DISK_BYTES_DEFAULT if wish.disk_bytes is None else wish.disk_bytes
    if not 1 <= stores <= STORES_MAX:
        raise CallerError(
            Code.INVALID,
            f"--stores: {stores} stores cannot be on one machine",
            next_step=f"use 1 to {STORES_MAX}",
        )
    if disk_bytes < DISK_BYTES_MIN:
        raise CallerError(
            Code.INVALID,
            f"--disk: a disk of {format_size(disk_bytes)} is too small; the least is 1 GiB",
            next_step="use 1G or more",
        )
    _check_journal(wish.journal_bytes, disk_bytes)
    warnings = _check_space(layout, stores * disk_bytes)
    cluster = ClusterFile(
        cluster_id=secrets.token_hex(16),
        conductor_port=_first_port(ports, wish.conductor_port, "--conductor-port", CONDUCTOR_PORT),
        store_ports=tuple(
            _first_port(
                ports,
                None if wish.store_port is None else wish.store_port + index,
                "--store-port",
                STORE_PORT,
            )
            for index in range(stores)
        ),
        nbd_port=_first_port(ports, wish.nbd_port, "--nbd-port", NBD_PORT),
        disk_bytes=disk_bytes,
        journal_bytes=wish.journal_bytes or 0,
    )
    for folder in ("secret", "run", "log", "config", "conductor", "stores", "gateways"):
        (layout.directory / folder).mkdir(parents=True, exist_ok=True, mode=0o700)
    write_whole(layout.token, f"{secrets.token_urlsafe(32)}\n".encode())
    write_whole(layout.key, f"{secrets.token_hex(32)}\n".encode())
    write_whole(layout.cluster_file, _toml(_document(cluster)).encode())
    return cluster, warnings


def _first_port(ports: PortClaims, wanted: int | None, flag: str, base: int) -> int:
    return ports.next_free(base) if wanted is None else ports.exactly(wanted, flag=flag)


def read_cluster(layout: Layout) -> ClusterFile:
    """Read `cluster.toml`. Errors: CallerError INVALID for one that is damaged or not readable."""
    try:
        cluster = _described(tomllib.loads(layout.cluster_file.read_text()))
    except ValueError as cause:  # also what is no TOML, or no UTF-8
        raise CallerError(
            Code.INVALID,
            f"{layout.cluster_file} is damaged: {cause}",
            next_step=DAMAGED_STEP,
        ) from cause
    except OSError as cause:
        raise CallerError(
            Code.INVALID,
            f"cannot read {layout.cluster_file}: {cause.strerror}",
            next_step=DAMAGED_STEP,
        ) from cause
    return cluster


def _described(document: dict[str, Any]) -> ClusterFile:
    """Take the cluster out of a document. Errors: ValueError."""
    identity, stores = entry(document, "cluster", "id"), entry(document, "ports", "stores")
    if not isinstance(identity, str) or not CLUSTER_ID.fullmatch(identity):
        raise ValueError(f"the id of a cluster is not {str(identity)[:40]!r}")
    if not isinstance(stores, list) or not 1 <= len(stores) <= STORES_MAX:
        raise ValueError(f"ports.stores is no list of 1 to {STORES_MAX} ports")

    def number(value: object, name: str, most: int) -> int:
        if type(value) is not int or not 0 <= value <= most:
            raise ValueError(f"{name} cannot be {str(value)[:40]!r}")
        return value

    def port(value: object, name: str) -> int:
        return number(value, f"ports.{name}", PORT_MAX)

    def disk(key: str, most: int) -> int:
        return number(entry(document, "disk", key), f"disk.{key}", most)

    return ClusterFile(
        cluster_id=identity,
        conductor_port=port(entry(document, "ports", "conductor"), "conductor"),
        store_ports=tuple(port(one, "stores") for one in stores),
        nbd_port=port(entry(document, "ports", "nbd"), "nbd"),
        disk_bytes=disk("size_bytes", SIZE_MAX),
        journal_bytes=disk("journal_bytes", JOURNAL_BYTES_MAX),
    )


def write_settings(layout: Layout, cluster: ClusterFile, sockets: Path) -> None:
    """Write the settings file of every process."""
    for name in cluster.names:
        write_whole(layout.config(name), _toml(_settings(layout, cluster, sockets, name)).encode())


def forget_disks(
    layout: Layout, cluster: ClusterFile, names: Sequence[str], *, stamp: str
) -> list[str]:
    """Let these stores begin with empty disks: a person says that theirs are lost for good.

    What lies where a disk was is kept beside it, under a name with `stamp`, and told in the result.
    Errors: CallerError NOT_FOUND for what is no store; UNSAFE for one whose disk is there and can
    be read. Then nothing is changed.
    """
    for name in names:
        if name not in cluster.names or name in (CONDUCTOR, GATEWAY):
            raise CallerError(
                Code.NOT_FOUND,
                f"--new-disk: there is no store {name[:96]!r}",
                next_step=f"its stores are s1 to s{len(cluster.store_ports)}",
            )
        if _is_own_disk(layout, cluster, name):
            raise CallerError(
                Code.UNSAFE,
                f"--new-disk: the disk of {name} is there: {layout.disk(name)}",
                next_step="start without --new-disk; or move that file away first, if you are sure",
            )
    told: list[str] = []
    for name in names:
        disk = layout.disk(name)
        if disk.exists() or disk.is_symlink():
            aside = disk.with_name(f"{disk.name}.aside-{stamp}")
            if aside.exists():
                raise CallerError(Code.ALREADY_EXISTS, f"{aside} is there", next_step="try again")
            disk.rename(aside)
            told.append(f"what was there as the disk of {name} is kept as {aside}")
        known_disk_file(layout.store_data(name), 0).unlink(missing_ok=True)
    return told


def _is_own_disk(layout: Layout, cluster: ClusterFile, name: str) -> bool:
    """Whether the disk that a store had is where it was, and can be read."""
    core: Any = importlib.import_module("pureflash._core")
    try:
        found = core.inspect_disk(str(layout.disk(name)))
    except PureFlashError:
        return False
    known = recall(layout.store_data(name), 0)
    uuids = {name: found[name] for name in ("disk_uuid", "format_uuid")}
    return found["cluster_id"] == cluster.cluster_id and not is_another(known, **uuids)


def make_sockets_folder(path: Path) -> None:
    """Make the folder of the sockets, 0700 and ours, or refuse one that is not.

    Errors: CallerError INVALID when another user made it first, or when it cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.mkdir(exist_ok=True, mode=0o700)
    except OSError as cause:
        raise CallerError(
            Code.INVALID,
            f"cannot make {path} for the sockets: {cause.strerror}",
            next_step="let XDG_RUNTIME_DIR name a folder that you may write to",
        ) from cause
    for folder in (path.parent, path):
        found = folder.lstat()
        is_ours = found.st_uid == os.getuid() and stat.S_ISDIR(found.st_mode)
        if not is_ours or stat.S_IMODE(found.st_mode) & 0o077:
            raise CallerError(
                Code.INVALID,
                f"{folder} is not a private folder of this user",
                next_step="remove it, or set XDG_RUNTIME_DIR to a folder of your own",
            )


def _check_wish(cluster: ClusterFile, wish: Wish, layout: Layout) -> None:
    pairs = (
        ("--stores", wish.stores, len(cluster.store_ports)),
        ("--disk", wish.disk_bytes, cluster.disk_bytes),
        ("--journal", wish.journal_bytes, cluster.journal_bytes),
    )
    for flag, wanted, there in pairs:
        if wanted is not None and wanted != there:
            was, now = (
                str(one) if flag == "--stores" else f"{format_size(one)} ({one:,} bytes)"
                for one in (there, wanted)
            )
            raise CallerError(
                Code.INVALID,
                f"{flag}: the cluster in {layout.directory} was made with {was}, not {now}",
                next_step=f"leave {flag} out, or make another cluster with --data",
            )


def check_running(layout: Layout, wish: Wish) -> None:
    """Refuse a wish that differs from the cluster that runs: nothing of it would be done.

    Errors: CallerError INVALID, which names each; also when `cluster.toml` cannot be read.
    """
    if wish == Wish():
        return
    cluster = read_cluster(layout)
    differing: list[tuple[str, str]] = []

    def compare(flag: str, wanted: int | None, there: int, text: str) -> None:
        if wanted is None or wanted == there:
            return
        is_size = flag in ("--disk", "--journal")
        was, asked = format_sizes(there, wanted) if is_size else (str(there), str(wanted))
        differing.append((text.format(was), f"{flag} {asked}"))

    count = len(cluster.store_ports)
    journals = "journals of {}" if cluster.journal_bytes else "journals that the stores chose"
    compare("--stores", wish.stores, count, "{} stores" if count > 1 else "{} store")
    compare("--disk", wish.disk_bytes, cluster.disk_bytes, "disks of {}")
    compare("--journal", wish.journal_bytes, cluster.journal_bytes, journals)
    compare("--conductor-port", wish.conductor_port, cluster.conductor_port, "its API at port {}")
    compare("--store-port", wish.store_port, cluster.store_ports[0], "stores from port {}")
    compare("--nbd-port", wish.nbd_port, cluster.nbd_port, "NBD at port {}")
    if differing:
        flags = ", ".join(asked.partition(" ")[0] for _, asked in differing)
        raise CallerError(
            Code.INVALID,
            f"already running with {', '.join(there for there, _ in differing)};"
            f" {', '.join(asked for _, asked in differing)}"
            f" {'is' if len(differing) == 1 else 'are'} not applied",
            next_step=f"leave {flags} out, or make another cluster with --data; a port can be"
            " changed after `pf down`",
        )


def _check_journal(journal_bytes: int | None, disk_bytes: int) -> None:
    """Refuse what no store could format, before there is a cluster that cannot start."""
    if journal_bytes is None:
        return
    most = min(JOURNAL_BYTES_MAX, disk_bytes // JOURNALS_PER_DISK_MAX)
    if not JOURNAL_BYTES_MIN <= journal_bytes <= most:
        raise CallerError(
            Code.INVALID,
            f"a journal of {journal_bytes >> 10} KiB per lane",
            next_step=f"use 1M to {most >> 20}M with disks of {format_size(disk_bytes)}",
        )


def _check_space(layout: Layout, disks_bytes: int) -> list[str]:
    above = (layout.directory, *layout.directory.parents)
    free = shutil.disk_usage(next(folder for folder in above if folder.is_dir())).free
    least = disks_bytes * FREE_PERCENT_MIN // 100
    if free < least:
        there, needed = format_sizes(free, least)
        raise MediaError(
            Code.NO_SPACE,
            f"{there} free in {layout.directory}, {needed} needed"
            f" ({FREE_PERCENT_MIN} % of all disks)",
            next_step="free space, use a smaller --disk, or another --data",
        )
    if free < disks_bytes:
        there, most = format_sizes(free, disks_bytes)
        return [
            (
                f"{layout.directory} has {there} free and the disks may grow to"
                f" {most}: they will be full before they look it"
            )
        ]
    return []


Document = Mapping[str, Mapping[str, object] | list[Mapping[str, object]]]


def _document(cluster: ClusterFile) -> Document:
    return {
        "cluster": {"id": cluster.cluster_id},
        "ports": {
            "conductor": cluster.conductor_port,
            "stores": list(cluster.store_ports),
            "nbd": cluster.nbd_port,
        },
        "disk": {"size_bytes": cluster.disk_bytes, "journal_bytes": cluster.journal_bytes},
    }


def _settings(layout: Layout, cluster: ClusterFile, sockets: Path, name: str) -> Document:
    node: dict[str, object] = {
        "id": name,
        "ready": str(layout.ready(name)),
        "token_file": str(layout.token),
    }
    common: dict[str, Mapping[str, object] | list[Mapping[str, object]]] = {
        "cluster": {"id": cluster.cluster_id},
        "log": {"file": str(layout.log(name))},
        "node": node,
    }
    conductor = f"127.0.0.1:{cluster.conductor_port}"
    if name == CONDUCTOR:
        node |= {
            "data": str(layout.conductor_data),
            "listen": conductor,
            "key_file": str(layout.key),
            "stores": len(cluster.store_ports),
            "gateway": GATEWAY,
        }
    elif name == GATEWAY:
        node |= {"data": str(layout.gateway_data(name)), "conductors": conductor}
        common["nbd"] = {
            "socket": str(sockets / f"{name}.nbd"),
            "listen": f"127.0.0.1:{cluster.nbd_port}",
        }
    else:
        number = int(name[1:])
        node |= {
            "data": str(layout.store_data(name)),
            "number": number,
            "listen": f"127.0.0.1:{cluster.store_ports[number - 1]}",
            "conductors": conductor,
            "key_file": str(layout.key),
        }
        disk: dict[str, object] = {
            "path": str(layout.disk(name)),
            "size": f"{cluster.disk_bytes}B",
        }
        if cluster.journal_bytes:
            disk["journal"] = f"{cluster.journal_bytes}B"
        common["disk"] = [disk]
    return common


def _toml(document: Document) -> str:
    """Write what we write: sections of texts, numbers and lists, whose JSON is their TOML."""
    lines: list[str] = []
    for name, content in document.items():
        tables = content if isinstance(content, list) else [content]
        head = f"[[{name}]]" if isinstance(content, list) else f"[{name}]"
        for table in tables:
            lines.append(head)
            lines += [f"{key} = {json.dumps(value)}" for key, value in table.items()]
            lines.append("")
    return "\n".join(lines)
