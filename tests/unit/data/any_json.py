"""JSON and bytes as nobody would write them, for tests of what reads the files of others."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

from hypothesis import settings
from hypothesis import strategies as st

from retro_mcore.errors import RetroError

#: Few examples, always the same: the whole test run stays short.
few = settings(max_examples=60, deadline=None, derandomize=True)

#: Any JSON value; half of a surrogate pair is written as JSON can.
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.just("a\ud83d"),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["text", "title"]), inner)
    ),
    max_leaves=3,
)

#: Lines that are no JSON, or JSON that no sane writer makes.
odd_lines = st.binary(max_size=20) | st.sampled_from(
    [
        b"[" * 5000,
        b'{"a": ' * 5000,
        b"9" * 5000,
        b"\0" * 9,
        b"\xef\xbb\xbf{}",
        b"\xff\xfe{\0",
        b"[1",
    ]
)


def records(keys: Sequence[str]) -> st.SearchStrategy[dict]:
    """Objects of some of these keys, with any value under each."""
    return st.dictionaries(st.sampled_from(list(keys)), values, max_size=4)


def files(record: st.SearchStrategy) -> st.SearchStrategy[bytes]:
    """Files of JSON lines or of one list, perhaps with lines that are something else."""
    lines = st.lists(record.map(_line) | odd_lines, max_size=4)
    ends = st.sampled_from([b"\n", b"\r\n", b"\r"])
    listed = st.lists(record | values, max_size=3).map(_line)
    return st.tuples(lines, ends).map(lambda made: made[1].join(made[0])) | listed


def _line(value: object) -> bytes:
    return json.dumps(value).encode()


def outcome(function: Callable[[], object], error_type: type[RetroError]) -> object:
    """What a function returns, or the one kind of error that it may raise."""
    try:
        return function()
    except error_type as error:
        return error
