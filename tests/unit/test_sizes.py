"""How long files, functions and lines are, and the list of those that may still be longer."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from tools import rust_text, sizes
from tools.sizes import Offender

TRAPS = r"""
fn one() { // a brace that is none: {
    let a = "{ \" {"; /* { /* nested { */ { */
    let b = '{';
    let c = '\'';
    let d = r#"{ " { "#;
    let e = br##"{"# {"##;
    let f: &'static str = "'";
    let g = '"'; let h = "}";
    let i = b'}'; let j = '\u{7b}'; let k = c"{";
    let r#fn = 'x'; 'outer: loop { break 'outer; }
}
fn two<'a, const N: usize>(x: &'a [u8; N], f: fn(u8) -> u8) -> [u8; 2] where u8: Copy {
    fn three() {
    }
    [1, 2]
}
trait T {
    fn declared(&self) -> [u8; 4];
    fn with_default(&self) {}
}
// fn four() { }
/// fn five() { "
const TEXT: &str = "fn six() {
}";
macro_rules! seven { ($name:ident) => { fn $name() {} }; }
fn eight() {}
"""


def test_functions_of_rust_are_found_among_what_looks_like_some() -> None:
    code = rust_text.blank(TRAPS)
    assert len(code) == len(TRAPS)
    assert code.count("\n") == TRAPS.count("\n")
    assert [(found.name, found.line, found.lines) for found in rust_text.functions(code)] == [
        ("one", 2, 11),
        ("two", 13, 5),
        ("three", 14, 2),
        ("with_default", 20, 1),
        ("eight", 27, 1),
    ]


@pytest.mark.parametrize("end", ['"', "/*", "'", 'r#"', "{", "fn x(", "fn x() {", "b'"])
def test_source_that_ends_in_the_middle_is_read_to_its_end(end: str) -> None:
    text = f"fn one() {{}}\n{end}"
    code = rust_text.blank(text)
    assert len(code) == len(text)
    assert next(rust_text.functions(code)).name == "one"
    assert rust_text.lines_without_tests(code) == 1


def test_every_brace_of_our_own_rust_has_its_partner() -> None:
    root = Path(__file__).resolve().parents[2]
    files = sorted((root / "crates").rglob("*.rs"))
    assert len(files) > 100
    for file in files:
        code = rust_text.blank(file.read_text())
        assert code.count("{") == code.count("}"), file
        words = re.findall(r"\bfn\s+\w+", code)
        assert len(list(rust_text.functions(code))) <= len(words)


def test_modules_of_tests_are_not_counted() -> None:
    code = "fn a() {}\n#[cfg(test)]\nmod tests {\n    fn b() {}\n}\n"
    assert rust_text.lines_without_tests(code) == 1
    several = "fn a() {}\n#[cfg(all(test, unix))]\n#[path = x]\nmod tests {\n    fn b() {}\n}\n" * 2
    assert rust_text.lines_without_tests(several) == 2
    assert rust_text.lines_without_tests("#[cfg(test)]\nmod tests;\n") == 2


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.py", "x\n" * 600, []),
        ("a.py", "x\n" * 601, [("file_lines", "a.py", 601)]),
        ("a.rs", "//\n" * 1000, []),
        ("a.rs", "//\n" * 1001, [("file_lines", "a.rs", 1001)]),
        ("a.rs", "//\n" * 999 + "#[cfg(test)]\nmod tests {\n" + "//\n" * 99 + "}\n", []),
        ("crates/a/src/tests.rs", "//\n" * 1001, []),
        ("crates/a/tests/b.rs", "//\n" * 1001, []),
        ("a.py", "def f() -> None:\n" + "    x\n" * 49, []),
        ("a.py", "@d\ndef f() -> None:\n" + "    x\n" * 50, [("function_lines", "a.py::f", 51)]),
        (
            "a.py",
            "class A:\n    async def f() -> None:\n" + "        x\n" * 60,
            [("function_lines", "a.py::f", 61)],
        ),
        ("a.rs", "fn f() {\n" + "\n" * 68 + "}\n", []),
        ("a.rs", "fn f() {\n" + "// x\n" * 69 + "}\n", [("function_lines", "a.rs::f", 71)]),
        ("a.rs", "x" * 100 + "\n" + "\u00e9" * 100, []),
        ("a.rs", "x" * 101 + "\n" + "x" * 200, [("wide_lines", "a.rs", 2)]),
        ("a.md", "x" * 101 + "\n" * 2000, []),
    ],
)
def test_what_is_longer_than_it_may_be_is_named_with_its_size(
    name: str, text: str, expected: list[tuple[str, str, int]]
) -> None:
    found = [(one.rule, one.name, one.size) for one in sizes.offenders(name, text)]
    assert found == expected


def test_of_functions_with_one_name_the_longest_counts() -> None:
    text = "".join("fn f() {\n" + "\n" * lines + "}\n" for lines in (80, 90, 3))
    assert [(one.name, one.size) for one in sizes.offenders("a.rs", text)] == [("a.rs::f", 92)]


def test_the_list_may_only_shrink() -> None:
    found = [Offender("file_lines", "a.py", 700, 600), Offender("file_lines", "b.py", 610, 600)]
    right = {"file_lines": {"a.py": 700, "b.py": 610}}
    assert list(sizes.judge(found, right)) == []
    (grown,) = sizes.judge(found, {"file_lines": {"a.py": 699, "b.py": 610}})
    assert grown.startswith("a.py: 700 file lines, and tools/tidy_allowed.toml allows 699")
    (missing,) = sizes.judge(found, {"file_lines": {"a.py": 700}})
    assert missing.startswith("b.py: 610 file lines, at most 600")
    (large,) = sizes.judge(found, {"file_lines": {"a.py": 701, "b.py": 610}})
    assert "less than tools/tidy_allowed.toml says" in large
    (gone,) = sizes.judge(found, {**right, "wide_lines": {"a.py": 1}})
    assert gone.startswith("a.py: there is nothing to allow in wide_lines")


def test_shrinking_adds_nothing_and_lets_nothing_grow() -> None:
    found = [
        Offender("file_lines", "a.py", 700, 600),
        Offender("file_lines", "b.py", 610, 600),
        Offender("wide_lines", "c.rs", 3, 0),
    ]
    allowed = {"file_lines": {"a.py": 650, "b.py": 800, "gone.py": 900}, "wide_lines": {}}
    shrunk = sizes.shrink(found, allowed)
    assert shrunk == {"file_lines": {"a.py": 650, "b.py": 610}, "wide_lines": {}}
    assert tomllib.loads(sizes.write_allowed(shrunk)) == shrunk
