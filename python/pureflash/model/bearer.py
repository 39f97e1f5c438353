"""What a token of the API looks like: one rule for who reads one and who is shown one. Pure.

A token goes into a header of HTTP. Whatever is no token, a damaged file or another file that a link
leads to, is never sent, and never shown in a message.
"""

from __future__ import annotations

import re
from typing import Final

TOKEN_BYTES_MAX: Final = 4_096
"""Of a token with the blanks around it; ours have 44 with the end of their line."""
_TOKEN: Final = re.compile(rb"\s*([\x21-\x7e]+)\s*")


def token_in(text: bytes) -> str | None:
    """Give the token of a file or variable: one word of printable ASCII; None when it is not."""
    found = _TOKEN.fullmatch(text) if len(text) <= TOKEN_BYTES_MAX else None
    return None if found is None else found[1].decode("ascii")
