"""Settings: which source wins, and that no mistake becomes a default."""

from __future__ import annotations

import pytest

from pureflash.errors import CallerError
from pureflash.model.settings import SCHEMAS, STORE, Settings, load_settings

STORE_FILE = """
[cluster]
id = "ab"
[node]
id = "s1"
number = 1
data = "/srv/s1"
token_file = "/srv/token"
key_file = "/srv/key"
listen = "127.0.0.1:1"
[[disk]]
path = "/srv/d0"
size = "10G"
"""


def load(text: str = STORE_FILE, **more: dict[str, str]) -> Settings:
    sources: dict[str, dict[str, str]] = {"environment": {}, "flags": {}, **more}
    return load_settings(
        STORE,
        text=text,
        source="s1.toml",
        environment=sources["environment"],
        flags=sources["flags"],
    )


def test_flag_beats_environment_beats_file_beats_default() -> None:
    def chosen(**more: dict[str, str]) -> tuple[object, str]:
        found = load(STORE_FILE, **more).values["node.listen"]
        return found.value, found.source

    environment = {"PF_NODE_LISTEN": "127.0.0.1:2"}
    flags = {"node.listen": "127.0.0.1:3"}
    assert chosen() == ("127.0.0.1:1", "s1.toml")
    assert chosen(environment=environment) == ("127.0.0.1:2", "PF_NODE_LISTEN")
    assert chosen(environment=environment, flags=flags) == ("127.0.0.1:3", "--listen")
    level = load().values["log.level"]
    assert (level.value, level.source) == ("info", "default")


def test_disks_are_a_list_with_sizes() -> None:
    (disk,) = load().disks
    assert (str(disk.path), disk.size_bytes, disk.engine) == ("/srv/d0", 10 << 30, "auto")
    assert disk.journal_bytes is None


@pytest.mark.parametrize(
    ("old", "new", "message", "step"),
    [
        ("listen =", "lisen =", "unknown key node.lisen", "did you mean node.listen?"),
        ("[cluster]", "[clutser]", "unknown key clutser.id", "did you mean cluster.id?"),
        ("size =", "sise =", "unknown key disk.sise", "did you mean disk.size?"),
        (
            'size = "10G"',
            'engine = "libaio"',
            "disk.engine is 'libaio'",
            "auto, uring, aio, threads",
        ),
        ('id = "ab"', "id = 7", "cluster.id is 7; it must be a text", "config show"),
        ("number = 1", "number = true", "node.number is True; it must be a whole", "config show"),
        ('"10G"', '"10"', "10 has no unit", "config show"),
        ('path = "/srv/d0"\n', "", "a [[disk]] needs a path", "config show"),
        ("number = 1\n", "", "node.number is not set (id of the store", "config show"),
        ("[cluster]", "[cluster", "it is not TOML", "config show"),
        ("[[disk]]", "[disk]", "write [[disk]]", "config show"),
    ],
)
def test_a_mistake_is_an_error_that_names_the_file_and_helps(
    old: str, new: str, message: str, step: str
) -> None:
    assert old in STORE_FILE
    with pytest.raises(CallerError) as caught:
        load(STORE_FILE.replace(old, new, 1))
    assert "s1.toml" in caught.value.message
    assert message in caught.value.message
    assert step in caught.value.next_step


def test_a_wrong_value_in_the_environment_names_the_variable() -> None:
    with pytest.raises(CallerError, match=r"PF_NODE_NUMBER: node\.number is 'one'"):
        load(environment={"PF_NODE_NUMBER": "one"})


def test_every_schema_has_distinct_names_with_a_section_and_a_meaning() -> None:
    for schema in SCHEMAS.values():
        names = [setting.name for setting in schema]
        assert len(set(names)) == len(names)
        assert all(name.count(".") == 1 for name in names)
        assert all(setting.meaning for setting in schema)
