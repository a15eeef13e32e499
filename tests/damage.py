"""Damaged and hostile inputs: what hypothesis makes of a file that was whole, and what a reader may do with it."""
from __future__ import annotations

import contextlib
import copy
import json
import resource
import signal
import struct

from hypothesis import strategies as st

from fairseq_earm.errors import UsageError

# What is put into a file at any place: claims of size, numbers that are none, encodings, ends of lines, keys met twice.
PIECES = [
    struct.pack("<Q", 2**60), struct.pack(">Q", 2**60), struct.pack("<I", 2**31 - 1), b"\xff" * 8, b"\0" * 8, b"NaN", b"-Infinity",
    b"1e999", b"9" * 400, b"9" * 5000, b"[" * 3000, b'{"a":' * 3000, b"\\ud800", b'"\\u0000"', b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80",
    b"\n", b"\r", b"\t", b"\x1b[2J", b"null", b"-1", b"true", b'""', b"{}", b"[]", b"<script>", "\u202e\u0665".encode(), b"D-0\t1\tx\n",
    b"T-99999999999999999\tx\n", b"P-0\tx\n", b'energy reranking: {"energy_weight": "x", "lenpen": null}\n', b", ", b" = ", b"epoch 1:  0 / 0 loss=1",
]
VALUES = [
    None, True, False, -1, 0, 1, 2**31, 2**60, 2**62, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", "x", "0" * 64, "\ud800", "</script>",
    "__import__('os').system('true')", [], {}, [[]], [None], {"": None}, {"a": {"a": {}}},
]


@st.composite
def damaged_bytes(draw, whole: bytes) -> bytes:
    """One to four changes, at places drawn at random; the whole in one case of some hundred."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        size = draw(st.integers(1, 40))
        kind = draw(st.sampled_from(["flip", "flip", "cut", "delete", "twice", "put", "over", "random", "nothing left"]))
        if kind == "flip" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del data[at:]
        elif kind == "delete":
            del data[at : at + size]
        elif kind == "twice":
            data[at:at] = data[at : at + size]
        elif kind == "put":
            data[at:at] = draw(st.sampled_from(PIECES))
        elif kind == "over":
            piece = draw(st.sampled_from(PIECES))
            data[at : at + len(piece)] = piece
        elif kind == "random":
            data[at : at + size] = draw(st.binary(max_size=40))
        elif kind == "nothing left" and draw(st.integers(0, 9)) == 0:
            data = bytearray(draw(st.binary(max_size=60)))
    return bytes(data)


@st.composite
def damaged_json(draw, whole: object) -> bytes:
    """JSON with one to three values changed, left out or renamed, wherever they are; at times its bytes too."""
    content = json.loads(json.dumps(whole))
    for _ in range(draw(st.integers(1, 3))):
        parents = [(None, None), *_places(content)]
        parent, key = parents[draw(st.integers(0, len(parents) - 1))]
        value = copy.deepcopy(draw(st.sampled_from(VALUES)))
        kind = draw(st.sampled_from(["value", "value", "value", "leave out", "rename"]))
        if parent is None:
            content = value if draw(st.integers(0, 9)) == 0 else content
        elif kind == "value":
            parent[key] = value
        elif kind == "leave out":
            del parent[key]
        elif isinstance(parent, dict):
            parent[draw(st.sampled_from(["x", "", "crc32", "format"]))] = parent.pop(key)
    text = json.dumps(content).encode()
    return draw(damaged_bytes(text)) if draw(st.integers(0, 9)) == 0 else text


def _places(content):
    """(container, key) of every value in a value of JSON."""
    keys = content if isinstance(content, dict) else range(len(content)) if isinstance(content, list) else ()
    for key in list(keys):
        yield content, key
        yield from _places(content[key])


class Hangs(BaseException):
    """An input took longer than any may."""


@contextlib.contextmanager
def limits(megabytes: int = 1024, seconds: int = 30):
    """Meanwhile no more memory than now and so much more, and so many seconds of computing (a machine may stand still)."""
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)

    def stop(*_):
        raise Hangs(f"{seconds} s")

    before = signal.signal(signal.SIGPROF, stop)
    resource.setrlimit(resource.RLIMIT_AS, (used + (megabytes << 20), hard))
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def read_or_refuse(read, *arguments):
    """What a reader returns; None where it refuses the input in one line. Any other error passes."""
    try:
        return read(*arguments)
    except UsageError as error:
        line = str(error)
        assert line.startswith("fairseq-earm: error: ") and "\n" not in line and len(line) < 2000, line
        return None
