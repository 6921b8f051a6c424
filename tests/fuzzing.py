"""Shared by the fuzz tests: the number of inputs, their mutations, and what code may do with them."""

import copy
import faulthandler
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hypothesis
from hypothesis import strategies as st

from distrogpt.errors import UserError

TESTS = 8  # tests that share the inputs
INPUTS = os.environ.get("FUZZ_INPUTS")
fuzz = hypothesis.settings(
    max_examples=max(1, int(INPUTS or 480) // TESTS),
    derandomize=INPUTS is None,
    deadline=None,  # succeeds_or_reports ends a test that hangs
    database=None,
    print_blob=True,
    suppress_health_check=list(hypothesis.HealthCheck),
)
CHARS = "\n abcdefghijklmno"
META = {"tokenizer": {"kind": "char", "chars": CHARS}, "vocab_size": len(CHARS), "dtype": "uint16"}


@contextmanager
def succeeds_or_reports() -> Iterator[None]:
    """The code in this context succeeds, or raises a UserError of one line that says what to do."""
    faulthandler.dump_traceback_later(60, exit=True)  # even if C code hangs
    try:
        yield
    except UserError as error:
        line = " ".join(str(error).split())
        assert "; " in line and len(line) < 1000, line[:2000]
    finally:
        faulthandler.cancel_dump_traceback_later()
    assert not Path("trap").exists(), "code was run"


HUGE = [2**31, 2**63, 2**64, 10**12, 10**30, 10**400]
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(0, 70)
    | st.sampled_from([0, -1, *HUGE, "", "gpt2", "char", "a\0b", "\ud800", "x" * 5000])
    | st.floats()
    | st.text(max_size=9)
)
plain = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9) | st.integers(), inner),
    max_leaves=6,
)


@st.composite
def mutated(draw: st.DrawFn, data: bytes) -> bytes:
    """`data` with bits flipped, and parts removed, repeated, overwritten or swapped; or its beginning."""
    for _ in range(draw(st.integers(1, 3))):
        a, b = sorted(draw(st.tuples(st.integers(0, len(data)), st.integers(0, len(data)))))
        c = min(b, a + draw(st.integers(1, 40)))
        flipped = bytes(byte ^ 1 << draw(st.integers(0, 7)) for byte in data[a : a + 1])
        variants = {
            "flip": data[:a] + flipped + data[a + 1 :],
            "cut": data[:a],
            "drop": data[:a] + data[c:],
            "double": data[:b] + data[a:],
            "overwrite": data[:a] + draw(st.binary(max_size=9)) + data[c:],
            "swap": data[b:] + data[:b],
        }
        data = draw(st.sampled_from(list(variants.values())))
    return data


class Hostile:
    """Its pickle calls a function."""

    def __init__(self, call: Any, *args: Any) -> None:
        self.call, self.args = call, args

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call, self.args


def laughs(depth: int, pair: type = list) -> Any:
    """A pickle of size O(depth), which takes 2^depth steps to print, hash or compare (billion laughs)."""
    value: Any = pair()
    for _ in range(depth):
        value = pair((value, value))
    return value


hostile = st.sampled_from(
    [
        Hostile(os.system, "touch trap"),
        Hostile(open, "trap", "w"),
        Hostile(eval, "open('trap', 'w')"),
        Hostile(exec, "open('trap', 'w')"),
        Hostile(Path.touch, Path("trap")),
        laughs(40),
    ]
)
bombs = [
    b"\x80\x04}r\xff\xff\xff\x7f.",  # memo number 2^31: 64 GB
    b"\x80\x04}\x8e" + b"\xff" * 7 + b"\x7f.",  # bytes of 2^63
    b"\x80\x04}\x8b\xff\xff\xff\x7f.",  # a number of 2^31 bytes
    b"\x80\x04\x95" + b"\xff" * 7 + b"\x7f}.",  # a frame of 2^63
    b"\x80\x04})" + b"2\x86" * 60 + b"K\x01s.",  # a key that takes 2^60 steps to hash
    b"cos\nsystem\n(S'touch trap'\ntR.",
    b"(S'touch trap'\nios\nsystem\n.",
    b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\ntouch trap\x85R.",
    b"Ptrap\n.",
    b"\x80\x02\x82\x01.",
    b"]" * 20_000 + b"a" * 19_999 + b".",  # nested
    b"L" + b"9" * 100_000 + b"L\n.",
    b"0.",
    b"",
]


@st.composite
def changed(draw: st.DrawFn, tree: Any, odd: st.SearchStrategy = plain) -> Any:
    """A copy of nested dicts and lists in which one value, at any depth, is replaced or missing."""
    keys = list(tree if isinstance(tree, dict) else range(len(tree)))
    key = draw(st.sampled_from(keys))
    out = copy.copy(tree)
    if isinstance(out[key], (dict, list)) and out[key] and draw(st.integers(0, 3)):
        out[key] = draw(changed(out[key], odd))
    elif draw(st.integers(0, 5)):
        out[key] = draw(odd)
    else:
        del out[key]
    return out
