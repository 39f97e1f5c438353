"""What decoding bytes from outside can raise: from a network, a file, another version of us.

`msgspec` has one error of its own, and lets two others through: bytes inside a JSON string that are
no UTF-8, and values that are nested deeper than the interpreter goes. Whoever catches only the
first crashes on the others.
"""

from __future__ import annotations

from typing import Final

import msgspec

UNREADABLE: Final = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""Errors of `msgspec.json.decode` that are the fault of what was decoded."""
