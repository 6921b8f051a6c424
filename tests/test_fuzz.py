"""Arbitrary and hostile settings and datasets: each works, or ends in a UserError of one line.

By default few, the same each time; FUZZ_INPUTS=2000 tries that many, at random, in all test_fuzz files.
"""

import json
import pickle
from pathlib import Path

import numpy as np
from fuzzing import CHARS, META, bombs, changed, fuzz, hostile, mutated, plain, succeeds_or_reports
from hypothesis import example, given
from hypothesis import strategies as st

from configurator import broken_limit, read_settings, setting_types
from distrogpt.data.meta import read_meta
from distrogpt.data.token_stream import TokenStream
from distrogpt.loading import find_tokenizer
from distrogpt.settings import BenchConfig, EvalConfig, SampleConfig, TrainConfig

# settings

NUMBERS = ["9" * 400, "9" * 5000, "1e400", "nan", "-inf", "1_0", "0x10", "1e", "\u0663", "-0.0", "None"]
CLASSES = (TrainConfig, SampleConfig, BenchConfig, EvalConfig)
ODD_WORDS = ["-", "--", "--=", "", ".", "a\0b", "x" * 5000, "--" + "y" * 5000, "/root/x", "--compile"]
texts = st.text() | st.sampled_from(NUMBERS) | (st.integers(0, 70) | st.floats() | st.booleans()).map(str)


@st.composite
def assignments(draw: st.DrawFn, form: str, values: st.SearchStrategy) -> tuple[type, list[str]]:
    """A class of settings, and some of its settings with values, in a form as "{}={}"; some misspelt."""
    cls = draw(st.sampled_from(CLASSES))
    name = st.sampled_from(sorted(setting_types(cls)))
    misspelt = st.builds(
        lambda name, at, more: name[:at] + more + name[at:], name, st.integers(0, 9), st.text()
    )
    usual = name.flatmap(lambda name: st.tuples(st.just(name), st.just(getattr(cls, name))))
    pairs = st.lists(usual | usual | st.tuples(name | name | misspelt, values), min_size=1, max_size=4)
    return cls, [form.format(name, value) for name, value in draw(pairs)]


CODE = [
    "import sys; sys.exit()",
    "exit(3)",
    "batch_size = 10**5000",
    "learning_rate = 10**400",
    "x = " + "-" * 100_000 + "1",
    "x = " + "1+" * 20_000 + "1",
    "x = " + "(" * 5000,
    "x = " + "9" * 5000,
    "def f(): f()\nf()",
    "class E:\n    def __repr__(self): 1 / 0\nbatch_size = E()",
    "class E(Exception):\n    def __str__(self): 1 / 0\nraise E",
    "globals()[5] = 1",
    "globals().clear()",
    "del batch_size",
    "raise MemoryError",
    "raise Exception('two\\nlines')",
    "batch_size = [0] * 10**6",
    "out_dir = 'a\\0b'",
    "import numpy\nlearning_rate = numpy.float64(3)\nbatch_size = compile = numpy.arange(3)",
    "# coding: nothing",
    "x = 1\0",
]


def check_settings(cls: type, argv: list[str]) -> None:
    with succeeds_or_reports():
        config = read_settings(cls, argv)
        for field in config.__dataclass_fields__.values():
            value = getattr(config, field.name)
            assert type(value) in setting_types(cls)[field.name]
            assert broken_limit(value, field.metadata) is None


@fuzz
@given(assignments("--{}={}", texts), st.sampled_from([[], [], [], *([word] for word in ODD_WORDS)]))
@example((TrainConfig, ["--batch_size=" + "9" * 400]), [])
@example((TrainConfig, ["--grad_clip=" + "9" * 400]), [])
@example((SampleConfig, ["--out_dir=\ud800"]), [])
@example((BenchConfig, []), ["x" * 5000])
def test_flags(fuzz_folder, flags, more):
    check_settings(flags[0], flags[1] + more)


sources = st.sampled_from(CODE) | st.text(max_size=30)


@fuzz
@given(
    assignments("{} = {!r}", plain | st.integers(0, 70) | st.booleans()),
    st.just(b"") | sources | st.binary(max_size=30),
)
def test_config_files(fuzz_folder, lines, more):
    more = more.encode("utf-8", "surrogatepass") if isinstance(more, str) else more
    (fuzz_folder / "mine.py").write_bytes("\n".join([*lines[1], ""]).encode("utf-8", "surrogatepass") + more)
    check_settings(lines[0], ["mine.py"])


# datasets


def use_dataset(folder: Path, files: dict[str, bytes]) -> None:
    """All that train.py and sample.py do with the files of a dataset."""
    for name in ("meta.json", "meta.pkl", "train.bin"):
        (folder / name).unlink(missing_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    with succeeds_or_reports():
        meta = read_meta(folder)
        ids = TokenStream(folder, "train", meta, 8).windows(np.arange(3), 9)
        assert ids.shape == (3, 9) and 0 <= ids.min() and ids.max() < meta["vocab_size"]
        tokenizer = find_tokenizer({"meta": meta}, meta["vocab_size"], "the dataset")
        assert max(tokenizer.encode("abba\n"), default=0) < meta["vocab_size"]
        assert isinstance(tokenizer.decode([0, tokenizer.vocab_size - 1]), str)


IDS = np.arange(60, dtype="<u2") % len(CHARS)
JSON = json.dumps({"version": 1, **META, "tokens": {"train": len(IDS)}, "bytes": {"val": 9}}).encode()
NANOGPT = {
    "vocab_size": len(CHARS),
    "itos": dict(enumerate(CHARS)),
    "stoi": {c: i for i, c in enumerate(CHARS)},
}
PICKLE = pickle.dumps(NANOGPT)


@fuzz
@given(st.binary(max_size=99) | mutated(IDS.tobytes()), st.sampled_from([JSON] * 9) | mutated(JSON))
def test_token_files(fuzz_folder, tokens, meta):
    use_dataset(fuzz_folder, {"train.bin": tokens, "meta.json": meta})


@fuzz
@given(changed(json.loads(JSON)) | plain)
@example({**META, "tokens": {}, "vocab_size": 5})
@example({**META, "tokens": {}, "tokenizer": {"kind": "gpt2"}})
@example({**META, "tokens": {}, "vocab_size": 10**400})
def test_any_structure_in_meta(fuzz_folder, meta):
    use_dataset(fuzz_folder, {"train.bin": IDS.tobytes(), "meta.json": json.dumps(meta).encode()})
    use_dataset(fuzz_folder, {"train.bin": IDS.tobytes(), "meta.pkl": pickle.dumps(meta)})


pickles = (
    mutated(PICKLE)
    | st.binary(max_size=40)
    | st.sampled_from(bombs)
    | st.builds(pickle.dumps, changed(NANOGPT, plain | hostile), st.integers(0, 5))
    | hostile.map(pickle.dumps)
)


@fuzz
@given(pickles)
def test_pickled_vocabularies(fuzz_folder, data):
    use_dataset(fuzz_folder, {"train.bin": IDS.tobytes(), "meta.pkl": data})
