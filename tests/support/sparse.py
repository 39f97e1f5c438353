"""A volume as one would like it to be: sparse bytes in memory. The slow and obvious oracle."""

from __future__ import annotations

from typing import Final

PAGE_BYTES: Final = 1 << 16


class SparseBytes:
    """Bytes that are zero where nothing was written."""

    def __init__(self) -> None:
        """Begin with zeros everywhere."""
        self._pages: dict[int, bytearray] = {}
        self.touched: set[int] = set()
        """Pages that were ever written, also those that were zeroed since."""

    def write(self, offset: int, data: bytes) -> None:
        """Put bytes down."""
        done = 0
        while done < len(data):
            number, start = divmod(offset + done, PAGE_BYTES)
            count = min(len(data) - done, PAGE_BYTES - start)
            page = self._pages.setdefault(number, bytearray(PAGE_BYTES))
            page[start : start + count] = data[done : done + count]
            self.touched.add(number)
            done += count

    def zero(self, offset: int, length: int) -> None:
        """Make a range zero; costs what was written, not what the range spans."""
        end = offset + length
        for number in [number for number in self._pages if self._meets(number, offset, end)]:
            base = number * PAGE_BYTES
            start, stop = max(0, offset - base), min(PAGE_BYTES, end - base)
            if stop - start == PAGE_BYTES:
                del self._pages[number]
            else:
                self._pages[number][start:stop] = bytes(stop - start)

    def read(self, offset: int, length: int) -> bytes:
        """Give a range."""
        found = bytearray()
        while len(found) < length:
            number, start = divmod(offset + len(found), PAGE_BYTES)
            count = min(length - len(found), PAGE_BYTES - start)
            page = self._pages.get(number)
            found += page[start : start + count] if page else bytes(count)
        return bytes(found)

    @staticmethod
    def _meets(number: int, offset: int, end: int) -> bool:
        return number * PAGE_BYTES < end and (number + 1) * PAGE_BYTES > offset
