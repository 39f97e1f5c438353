"""The walker of documentation pages: what it runs, and that it finds what is not true."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.walk import Command, check, commands_of, matches

PAGE = """
# A page

```console
$ echo one; echo two
one
...
$ seq 1 3 |
> tail -n 1
3
```

<!-- not run: it would need a network -->
```console
$ curl example
```

```
no console
```

```console
$ X=7
$ echo "x  is $X now"
x is ... now
```
"""
ENVIRONMENT = {"PATH": "/usr/bin:/bin"}


def test_commands_are_taken_from_the_blocks_that_are_run() -> None:
    assert commands_of(PAGE) == [
        Command("echo one; echo two", ("one", "...")),
        Command("seq 1 3 |\ntail -n 1", ("3",)),
        Command("X=7", ()),
        Command('echo "x  is $X now"', ("x is ... now",)),
    ]


def test_a_page_that_is_true_is_walked(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    assert check(page, environment=ENVIRONMENT, folder=tmp_path) == 4


@pytest.mark.parametrize(
    "wrong",
    [
        "$ echo one\ntwo",
        "$ echo one",
        "$ true\none",
        "$ false",
        "$ echo one; echo two\none",
        "$ echo one; echo two\n...\none",
        "$ exit 0\n$ true",
    ],
)
def test_a_page_that_is_not_true_is_found_out(tmp_path: Path, wrong: str) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"```console\n{wrong}\n```\n")
    with pytest.raises(AssertionError):
        check(page, environment=ENVIRONMENT, folder=tmp_path)


@pytest.mark.parametrize(
    ("expected", "printed", "is_so"),
    [
        (("a ... c",), ("a   b c",), True),
        (("a...c",), ("ac",), True),
        (("a.c",), ("abc",), False),
        (("...", "z"), ("a", "b", "z"), True),
        (("...", "z"), ("z", "a"), False),
        (("...",), (), True),
        ((), ("a",), False),
    ],
)
def test_dots_stand_for_anything_and_nothing_else_does(
    expected: tuple[str, ...], printed: tuple[str, ...], is_so: bool
) -> None:
    assert matches(expected, printed) == is_so
