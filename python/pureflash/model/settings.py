"""Settings of a process: flag > `PF_*` environment > file > default, with the source of each.

Theory of operation. A `Setting` says name, type, default and meaning; a table of them is a
schema. The file is TOML; `[node] id` is the setting `node.id` and the variable `PF_NODE_ID`.
`[[disk]]` is a list and comes from the file only. An unknown key is an error that names the
nearest known one, and a value of the wrong type says what was expected: a typo must never become
a default.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pureflash.errors import CallerError, Code
from pureflash.units import parse_size

FILE_CHARS_MAX: Final = 1 << 20
Value = str | int | float | bool


@dataclass(frozen=True, slots=True)
class Setting:
    """One key. `default` None: it must be given."""

    name: str
    kind: type[str | int | float | bool]
    default: Value | None
    meaning: str

    @property
    def variable(self) -> str:
        """Name of its environment variable."""
        return "PF_" + self.name.upper().replace(".", "_")


@dataclass(frozen=True, slots=True)
class Chosen:
    """A value and where it came from."""

    value: Value
    source: str


ENGINES = ("auto", "uring", "aio", "threads")
"""How a store does the I/O of a disk; `auto` takes the first that works, in this order."""


@dataclass(frozen=True, slots=True)
class DiskSetting:
    """One `[[disk]]`. Bytes; `journal_bytes` None: the store chooses."""

    path: Path
    size_bytes: int | None = None
    engine: str = "auto"
    durability: str = "auto"
    journal_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Settings:
    """All values of a schema."""

    values: Mapping[str, Chosen]
    disks: tuple[DiskSetting, ...] = ()

    def text(self, name: str) -> str:
        """Give a text value."""
        return str(self.values[name].value)

    def number(self, name: str) -> int:
        """Give a whole number."""
        value = self.values[name].value
        assert isinstance(value, int), name
        return value

    def ratio(self, name: str) -> float:
        """Give a number."""
        return float(self.values[name].value)

    def path(self, name: str) -> Path | None:
        """Give a path; None for an empty one."""
        text = self.text(name)
        return Path(text) if text else None


_COMMON: Final = (
    Setting("node.id", str, None, "name of this process in the cluster"),
    Setting("node.data", str, None, "directory for what it keeps"),
    Setting("node.ready", str, "", "file that announces readiness; empty: none"),
    Setting("log.file", str, "", "log file; empty: standard error"),
    Setting("log.level", str, "info", "least level that is logged: info, warning, error"),
)
_AGENT: Final = (
    Setting("node.conductors", str, "127.0.0.1:7180", "host:port of the conductor"),
    Setting("node.token_file", str, None, "file with the token for the conductor"),
)
CONDUCTOR: Final = (
    *_COMMON,
    Setting("node.listen", str, "127.0.0.1:7180", "address of the API; port 0: any free one"),
    Setting("node.token_file", str, None, "file with the token that callers must show"),
    Setting("node.key_file", str, None, "file with the cluster key"),
    Setting("cluster.id", str, None, "32 hexadecimal digits that name the cluster"),
    Setting("node.stores", int, 0, "stores s1 to sN that are started beside this conductor"),
    Setting("node.gateway", str, "", "name of the gateway that is started beside it; empty: none"),
    Setting("limits.overcommit_ratio", float, 1.0, "promised space / usable space, at most"),
    Setting(
        "limits.balance_after_s",
        float,
        30.0,
        "calm after which primaries are spread over the stores; 0: never",
    ),
    Setting(
        "limits.slow_disk_us",
        int,
        20_000,
        "latency in us below which no disk is slow, whatever others take; 0: none ever is",
    ),
)
STORE: Final = (
    *_COMMON,
    *_AGENT,
    Setting("node.number", int, None, "id of the store, from 1"),
    Setting("node.listen", str, "127.0.0.1:7162", "address of the data port; port 0: any free one"),
    Setting("node.advertise", str, "", "address that is told to clients; empty: where it listens"),
    Setting("node.key_file", str, None, "file with the cluster key"),
    Setting("cluster.id", str, None, "32 hexadecimal digits that name the cluster"),
)
GATEWAY: Final = (
    *_COMMON,
    *_AGENT,
    Setting("cluster.id", str, None, "32 hexadecimal digits that name the cluster"),
    Setting("nbd.socket", str, None, "path of the NBD unix socket, at most 107 bytes"),
    Setting("nbd.listen", str, "127.0.0.1:10809", "address for exports over TCP"),
)
SCHEMAS: Final = {"conductor": CONDUCTOR, "store": STORE, "gateway": GATEWAY}


def load_settings(
    schema: Sequence[Setting],
    *,
    text: str,
    source: str,
    environment: Mapping[str, str],
    flags: Mapping[str, str] | None = None,
) -> Settings:
    """Merge all sources; `text` is the file's contents and `source` its name.

    Errors: CallerError INVALID for a missing, unreadable, unknown or wrong value.
    """
    document = _read(text, source)
    disks = _disks(document.pop("disk", []), source)
    flat = _flatten(document, schema, source)
    values: dict[str, Chosen] = {}
    for setting in schema:
        if flags and setting.name in flags:
            flag = f"--{setting.name.rpartition('.')[2].replace('_', '-')}"
            values[setting.name] = Chosen(_parse(setting, flags[setting.name], flag), flag)
        elif setting.variable in environment:
            given = environment[setting.variable]
            values[setting.name] = Chosen(
                _parse(setting, given, setting.variable), setting.variable
            )
        elif setting.name in flat:
            values[setting.name] = Chosen(_check(setting, flat[setting.name], source), source)
        elif setting.default is not None:
            values[setting.name] = Chosen(setting.default, "default")
        else:
            raise _invalid(f"{setting.name} is not set ({setting.meaning})", source)
    return Settings(values, disks)


def _read(text: str, source: str) -> dict[str, object]:
    if len(text) > FILE_CHARS_MAX:
        raise _invalid(f"it has {len(text)} characters", source)
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as cause:
        raise _invalid(f"it is not TOML: {cause}", source) from cause


def _flatten(
    document: Mapping[str, object], schema: Sequence[Setting], source: str
) -> dict[str, object]:
    known = [setting.name for setting in schema]
    flat: dict[str, object] = {}
    for section, content in document.items():
        if not isinstance(content, dict):
            raise _unknown(section, known, source)
        for key, value in content.items():
            name = f"{section}.{key}"
            if name not in known:
                raise _unknown(name, known, source)
            flat[name] = value
    return flat


def _disks(tables: object, source: str) -> tuple[DiskSetting, ...]:
    if not isinstance(tables, list):
        raise _invalid("disk is a list of tables: write [[disk]]", source)
    known = ["path", "size", "engine", "durability", "journal"]
    disks: list[DiskSetting] = []
    for table in tables:
        for key in table:
            if key not in known:
                raise _unknown(f"disk.{key}", [f"disk.{name}" for name in known], source)
        if not isinstance(table.get("path"), str):
            raise _invalid("a [[disk]] needs a path", source)
        engine = str(table.get("engine", "auto"))
        if engine not in ENGINES:
            step = f"use one of {', '.join(ENGINES)}"
            raise _invalid(f"disk.engine is {engine!r}", source, step)
        sizes = {
            key: _size(table[key], f"disk.{key}", source) if key in table else None
            for key in ("size", "journal")
        }
        disks.append(
            DiskSetting(
                path=Path(table["path"]),
                size_bytes=sizes["size"],
                engine=engine,
                durability=str(table.get("durability", "auto")),
                journal_bytes=sizes["journal"],
            )
        )
    return tuple(disks)


def _size(value: object, name: str, source: str) -> int:
    try:
        return parse_size(str(value)).size_bytes
    except ValueError as cause:
        raise _invalid(f"{name}: {cause}", source) from cause


def _parse(setting: Setting, text: str, source: str) -> Value:
    try:
        if setting.kind is bool:
            return {"true": True, "false": False}[text.lower()]
        return setting.kind(text)
    except (ValueError, KeyError) as cause:
        raise _wrong(setting, text, source) from cause


def _check(setting: Setting, value: object, source: str) -> Value:
    if setting.kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not setting.kind:
        raise _wrong(setting, value, source)
    assert isinstance(value, str | int | float | bool), "the kinds are these"
    return value


def _wrong(setting: Setting, value: object, source: str) -> CallerError:
    kinds = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}
    return _invalid(f"{setting.name} is {value!r}; it must be {kinds[setting.kind]}", source)


def _unknown(name: str, known: Sequence[str], source: str) -> CallerError:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0)
    return _invalid(f"unknown key {name}", source, f"did you mean {near[0]}?" if near else None)


def _invalid(message: str, source: str, next_step: str | None = None) -> CallerError:
    step = next_step or "correct the value; `pf config show` prints all with their sources"
    return CallerError(Code.INVALID, f"{source}: {message}", next_step=step)
