"""Names of volumes, stores and gateways: one rule, one message.

`[a-z0-9][a-z0-9._-]{0,95}`, so that a name is safe in a path, a URL, an NBD export and a shell. A
name of digits alone is refused: wherever a name is accepted an id is too, and `7` must mean one.
"""

from __future__ import annotations

import re

from pureflash.errors import CallerError, Code

NAME_CHARS_MAX = 96
ID_CHARS_MAX = 16
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,95}")


def check_name(name: str, *, what: str = "volume") -> str:
    """Give `name` back when it is one.

    Errors: CallerError INVALID, which shows the rule.
    """
    if not _NAME.fullmatch(name):
        raise CallerError(
            Code.INVALID,
            f"{name[:NAME_CHARS_MAX]!r} is not a name of a {what}",
            next_step="use 1 to 96 of a-z 0-9 . _ - and start with a letter or digit",
        )
    if name.isdigit():
        raise CallerError(
            Code.INVALID,
            f"{name!r} would be read as the id of a {what}",
            next_step="put a letter into the name",
        )
    return name


def read_id(text: str) -> int | None:
    """Give the id that a text is, None when it is none: then it can only be a name.

    Ids are below 2^53, so a longer run of digits is none; Python refuses to read one of thousands.
    """
    is_id = text.isascii() and text.isdecimal() and len(text) <= ID_CHARS_MAX
    return int(text) if is_id else None


def check_person(text: str) -> str:
    """Give back how somebody who decides calls himself, for the record.

    Errors: CallerError INVALID for nothing, and for what would not be one line of a record.
    """
    name = text.strip()
    if not name or len(name) > NAME_CHARS_MAX or not name.isprintable():
        raise CallerError(
            Code.INVALID,
            "the record of the decision needs to say who made it",
            next_step=f"give a name of 1 to {NAME_CHARS_MAX} printable characters",
        )
    return name
