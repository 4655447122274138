"""One encoded HdrHistogram (version 2) as counts of values.

The format, big-endian, in base64: cookie 0x1c849314 and a length, then, deflated, a head of 40 bytes and the counts.
Head: cookie 0x1c849313, length of the counts, normalizing index offset, significant digits, lowest and highest value
that can be told, conversion ratio. Each count is a ZigZag LEB128 number of at most 9 bytes; a negative one stands for
so many empty slots. Slot i covers the values from `low` to `low + size - 1`:

    bucket = (i >> (m - 1)) - 1, sub = (i & (2^(m-1) - 1)) + 2^(m-1); for a negative bucket, bucket = 0 and sub = i
    low = sub << (bucket + u), size = 1 << (bucket + u)

Where: m = ceil(log2(2 * 10^digits)), u = floor(log2(lowest)). Source: Gil Tene's HdrHistogram, `AbstractHistogram`.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import math
import struct
import zlib
from collections.abc import Iterator

from harness.importers.source import Unusable

WORD_BITS = 0xF0  # of a cookie: the size of a count, which version 2 does not use
PLAIN_COOKIE, PACKED_COOKIE = 0x1C849303, 0x1C849304  # without their word bits
OLD_COOKIES = {0x1C849301: 1, 0x1C849302: 1, 0x1C849308: 0, 0x1C849309: 0}
DOUBLE_COOKIES = frozenset({0x0C72124E, 0x0C72124F})
HEAD = struct.Struct(">iiiiqqd")
PACKED_HEAD = struct.Struct(">ii")
PAYLOAD_BYTES_MAX = 64 * 1024 * 1024
LEB_BYTES_MAX = 9
COUNT_MAX = 2**40  # of one slot; more is a damaged number

COLUMN = "Interval_Compressed_Histogram"


@dataclasses.dataclass(frozen=True, slots=True)
class Histogram:
    """One decoded histogram."""

    digits: int  # significant ones of each value
    step: int  # below this, values are not told apart either
    highest: int  # no value is beyond it
    counts: bytes  # encoded

    def slots(self) -> Iterator[tuple[int, int, int]]:
        """Yield (lowest value, highest value, count) of each slot that is not empty. Raises Unusable."""
        magnitude, unit = math.ceil(math.log2(2 * 10**self.digits)), self.step.bit_length() - 1
        for slot, count in _counts(self.counts):
            low, high = slot_bounds(slot, magnitude, unit)
            if low > self.highest:
                raise _fault(f"counts values beyond its highest, {self.highest}")
            yield low, high, count


def decode(text: str) -> Histogram:
    """Return the histogram of one encoded text. Raises Unusable."""
    try:
        encoded = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise _fault("is no base64: the line is cut off or damaged") from None
    payload = _payload(encoded)
    if len(payload) < HEAD.size:
        raise _fault("is too short for a histogram")
    _, length, offset, digits, lowest, highest, ratio = HEAD.unpack_from(payload)
    if not 0 <= digits <= 5 or not 1 <= lowest <= highest // 2:
        raise _fault(f"has a head that cannot be: {digits} digits from {lowest} to {highest}")
    if offset or ratio != 1.0:
        raise _fault("is a shifted or scaled histogram (DoubleHistogram), whose values are no integers: not read")
    if length != len(payload) - HEAD.size:
        raise _fault(f"has {len(payload) - HEAD.size} bytes of counts, its head says {length}")
    return Histogram(digits, 1 << (lowest.bit_length() - 1), highest, payload[HEAD.size :])


def slot_bounds(slot: int, magnitude: int, unit: int) -> tuple[int, int]:
    """Return the lowest and the highest value that a slot counts."""
    half = 1 << (magnitude - 1)
    bucket, sub = (slot >> (magnitude - 1)) - 1, (slot & (half - 1)) + half
    if bucket < 0:
        bucket, sub = 0, slot
    low = sub << (bucket + unit)
    return low, low + (1 << (bucket + unit)) - 1


def _payload(encoded: bytes) -> bytes:
    """Return head and counts, inflated."""
    if len(encoded) < PACKED_HEAD.size:
        raise _fault("is too short for a histogram")
    cookie, length = PACKED_HEAD.unpack_from(encoded)
    base = cookie & ~WORD_BITS
    if base in OLD_COOKIES:
        raise _fault(f"is in version {OLD_COOKIES[base]} of the encoding: write it with HdrHistogram 2.1.6 or later")
    if cookie in DOUBLE_COOKIES:
        raise _fault("is a DoubleHistogram: only histograms of integers are read")
    if base == PLAIN_COOKIE:
        return encoded
    if base != PACKED_COOKIE:
        raise _fault("does not begin as an HdrHistogram")
    if length != len(encoded) - PACKED_HEAD.size:
        raise _fault("is shorter or longer than it says: the line is cut off or damaged")
    inflater = zlib.decompressobj()
    try:
        payload = inflater.decompress(encoded[PACKED_HEAD.size :], PAYLOAD_BYTES_MAX)
    except zlib.error:
        raise _fault("cannot be inflated: the line is damaged") from None
    if not inflater.eof:
        raise _fault(f"is cut off, or larger than {PAYLOAD_BYTES_MAX:,} bytes")
    if len(payload) < HEAD.size or PACKED_HEAD.unpack_from(payload)[0] & ~WORD_BITS != PLAIN_COOKIE:
        raise _fault("holds no histogram of version 2")
    return payload


def _counts(payload: bytes) -> Iterator[tuple[int, int]]:
    """Yield each slot that is not empty with its count."""
    place, slot = 0, 0
    while place < len(payload):
        value, shift = 0, 0
        for used in range(1, LEB_BYTES_MAX + 1):
            if place >= len(payload):
                raise _fault("ends within a count")
            byte = payload[place]
            place += 1
            if used == LEB_BYTES_MAX:  # the ninth byte has eight bits of the number
                value |= byte << shift
                break
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        count = (value >> 1) ^ -(value & 1)
        if count < 0:
            slot -= count
            continue
        if count > COUNT_MAX:
            raise _fault(f"counts {count:,} equal values, which cannot be")
        if count:
            yield slot, count
        slot += 1


def _fault(text: str) -> Unusable:
    return Unusable(text, COLUMN)
