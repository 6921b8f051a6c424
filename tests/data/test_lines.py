"""Line tasks: the generators, lines as samples, the loss on answers alone, and eval.py's exact answers."""

import json
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, assert_user_error, run, train_here

from configurator import read_settings
from distrogpt.data.dataset import Dataset, evaluation_windows, open_dataset, step_windows
from distrogpt.data.preparation.writer import write_dataset
from distrogpt.data.tokenizer import CharTokenizer
from distrogpt.errors import UserError
from distrogpt.evaluation.evaluator import Evaluator
from distrogpt.runtime import Runtime
from distrogpt.settings import TrainConfig
from distrogpt.training.batches import step_batches
from eval import EvalConfig, measure
from model import GPT, GPTConfig
from train import training_step

CPU = Runtime(torch.device("cpu"), torch.float32)


def prepare(name: str, folder: Path, *flags: str) -> tuple[list[str], list[str]]:
    """The lines of train and val."""
    done = run(f"data/{name}/prepare.py", f"--output={folder}", *flags)
    assert done.returncode == 0, done.stderr
    chars = json.loads((folder / "meta.json").read_text())["tokenizer"]["chars"]
    texts = []
    for split in ("train", "val"):
        texts.append("".join(chars[i] for i in np.fromfile(folder / f"{split}.bin", "<u2")))
        assert texts[-1].endswith("\n")
    return texts[0].split("\n")[:-1], texts[1].split("\n")[:-1]


def roman_value(text: str) -> int:
    """What a numeral stands for, in another way than prepare.py writes it: smaller before larger is less."""
    values = [{"I": 1, "V": 5, "X": 10, "L": 50, "C": 100, "D": 500, "M": 1000}[letter] for letter in text]
    return sum(-v if v < max(values[i:]) else v for i, v in enumerate(values))


ROMAN = re.compile("M{0,3}(CM|CD|D?C{0,3})(XC|XL|L?X{0,3})(IX|IV|V?I{0,3})")  # each number has one such


def test_addition_has_each_pair_once(tmp_path):
    train, val = prepare("addition", tmp_path)
    assert (len(train), len(val)) == (9000, 1000)
    pairs = set()
    for line in train + val:
        a, b, c = map(int, re.fullmatch(r"(\d+)\+(\d+)=(\d+)", line).groups())
        assert a + b == c and line == f"{a}+{b}={c}"
        pairs.add((a, b))
    assert len(pairs) == 10_000 and max(map(max, pairs)) == 99
    assert train != sorted(train) and len({line[0] for line in val}) > 5


def test_addition_of_more_digits_draws_distinct_pairs_and_reverses(tmp_path):
    flags = ("--digits=6", "--lines=1000", "--val_fraction=0.25", "--reverse")
    train, val = prepare("addition", tmp_path, *flags)
    assert (len(train), len(val)) == (750, 250)
    assert len(set(train) | set(val)) == 1000
    for line in train + val:
        problem, answer = line.split("=")
        assert answer == str(sum(map(int, problem.split("+"))))[::-1]
    lengths = [len(line.split("+")[0]) for line in train + val]
    assert sum(length == 6 for length in lengths) == pytest.approx(900, abs=50)  # of uniform numbers
    assert prepare("addition", tmp_path, *flags) == (train, val)
    assert prepare("addition", tmp_path, *flags, "--seed=1", "--overwrite")[1] != val


def test_roman_both_ways_holds_numbers_out_in_both(tmp_path):
    train, val = prepare("roman", tmp_path, "--direction=both")
    assert (len(train), len(val)) == (2 * 3599, 2 * 400)
    found = []
    for lines in (train, val):
        numbers = []
        for line in lines:
            left, right = line.split("=")
            digits, letters = (left, right) if left[0].isdigit() else (right, left)
            assert ROMAN.fullmatch(letters) and roman_value(letters) == int(digits), line
            numbers.append(int(digits))
        assert all(numbers.count(number) == 2 for number in numbers[:50])
        neighbours = sum(a == b for a, b in pairwise(numbers))
        assert neighbours < 10  # a line's answer does not stand beside it
        found.append(set(numbers))
    assert found[0] | found[1] == set(range(1, 4000)) and not found[0] & found[1]


def test_sequences_continue_by_their_step(tmp_path):
    train, val = prepare("sequence", tmp_path, "--highest=99", "--steps=3")
    assert len(train) + len(val) == 300 and not set(train) & set(val)
    for line in train + val:
        numbers = [int(number) for number in re.split("[,=]", line)]
        assert len(numbers) == 6 and line.count("=") == 1 and line.split("=")[0].count(",") == 2
        assert len(set(np.diff(numbers))) == 1 and numbers[1] - numbers[0] in (1, 2, 3)


def test_mistakes_of_line_tasks(tmp_path):
    script = "data/addition/prepare.py"
    assert_user_error(run(script, f"--output={tmp_path}", "--val_fraction=1"), "--val_fraction 1.0")
    assert_user_error(run(script, f"--output={tmp_path}", "--lines=10001"), "--lines 10001", "10,000")


LINES = ["1+1=2", "20+3=23", "7=7=7", "nothing", "0+0=0", "", "5+5=10", "999+1=1000"]


@pytest.fixture
def lines(tmp_path) -> Path:
    """A small dataset of lines of all kinds; 80 in train, where one of the 8 in val is missing."""
    text = "".join(line + "\n" for line in LINES)
    tokenizer = CharTokenizer("".join(sorted(set(text))))
    with write_dataset(tmp_path / "lines", tokenizer) as add:
        add("train", tokenizer.encode(text.replace("999+1=1000", "9+1=10") * 10), 1)
        add("val", tokenizer.encode(text), 1)
    return tmp_path / "lines"


def config_of(folder, *flags) -> TrainConfig:
    where = ("--sampling=lines", "--loss_after==", f"--dataset={folder}")
    return read_settings(TrainConfig, [*TINY, *where, *flags])


def naive_mask(text: str) -> list[bool]:
    """Which characters after the first one stand after a = on their line, character by character."""
    seen, mask = False, []
    for char in text[:-1]:
        seen = char != "\n" and (seen or char == "=")
        mask.append(seen)
    return mask


def test_loss_mask_equals_a_loop_over_characters(lines):
    data = open_dataset(config_of(lines))
    chars = data.meta["tokenizer"]["chars"]
    windows = data.parts[0].streams["train"].windows(np.arange(300), 40)
    expected = [naive_mask("".join(chars[i] for i in window)) for window in windows]
    assert data.loss_mask(windows).tolist() == expected
    data = Dataset([], newline=0, separator=1)
    assert data.loss_mask(np.array([[5, 1, 6, 0, 7, 1, 1, 0]])).astype(int).tolist() == [
        [0, 1, 1, 0, 0, 1, 1]
    ]


def test_each_line_starts_one_sample_per_epoch_on_any_number_of_ranks(lines):
    flags = ("--batch_size=5", "--gradient_accumulation_steps=4", "--block_size=24")
    data, config = open_dataset(config_of(lines)), config_of(lines, *flags)
    stream, begins = data.parts[0].streams["train"], data.parts[0].line_starts["train"]
    text = "".join(data.meta["tokenizer"]["chars"][i] for i in stream.windows(np.array([0]), len(stream))[0])
    assert begins.tolist() == [0, *(i + 1 for i, char in enumerate(text[:-1]) if char == "\n")]
    epochs = [
        np.concatenate([step_windows(data, config, step)[1] for step in range(first, first + 4)])
        for first in (0, 4)
    ]
    assert all(sorted(starts.tolist()) == begins.tolist() for starts in epochs)
    assert epochs[0].tolist() != epochs[1].tolist() != begins.tolist()

    def rows(batch_size: int, micro_steps: int, ranks: int) -> list:
        flags = (f"--batch_size={batch_size}", f"--gradient_accumulation_steps={micro_steps}")
        config = config_of(lines, *flags)
        places = [Runtime(torch.device("cpu"), torch.float32, rank, ranks) for rank in range(ranks)]
        batches = [batch for place in places for batch in step_batches(data, config, place, 2)]
        assert sum(batch.weight for batch in batches) == pytest.approx(micro_steps)
        counts = [int((batch.y >= 0).sum()) for batch in batches]
        for batch, count in zip(batches, counts, strict=True):
            assert batch.weight == pytest.approx(count / sum(counts) * micro_steps)
        return sorted(torch.cat([torch.cat([batch.x, batch.y], 1) for batch in batches]).tolist())

    assert rows(20, 1, 1) == rows(10, 2, 1) == rows(5, 4, 2) == rows(5, 4, 4)


def test_a_step_does_not_depend_on_the_micro_steps(lines):
    """The mean over all targets that count, though micro-steps have more of them or fewer."""
    losses, weights = [], []
    data = open_dataset(config_of(lines))
    for flags in (("--batch_size=12",), ("--batch_size=3", "--gradient_accumulation_steps=4")):
        torch.manual_seed(1)
        model = GPT(
            GPTConfig(block_size=16, vocab_size=data.meta["vocab_size"], n_layer=1, n_head=2, n_embd=8)
        )
        sgd = [torch.optim.SGD(model.parameters(), lr=1.0)]
        batches = step_batches(data, config_of(lines, *flags), CPU, 3)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        losses.append(training_step(model, sgd, scaler, batches, 0.0, CPU).loss)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    torch.testing.assert_close(weights[0], weights[1], atol=1e-6, rtol=0)


def test_evaluation_has_a_window_for_each_line_and_counts_answers_only(lines):
    config = config_of(lines, "--eval_iters=0", "--batch_size=3")
    data = open_dataset(config)
    part = data.parts[0]
    starts, skip = evaluation_windows(part, 0, "val", config)
    assert (
        starts[:8].tolist() == part.line_starts["val"].tolist()
        and (skip[8:] == 16).all()
        and len(starts) == 9
    )
    drawn, _ = evaluation_windows(part, 0, "val", config_of(lines, "--eval_iters=5"))
    assert len(drawn) == 20 and set(drawn) <= set(part.line_starts["val"])
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=data.meta["vocab_size"], n_layer=1, n_head=2, n_embd=8))
    with torch.no_grad():
        model.lm_head.weight *= 30
    chars = data.meta["tokenizer"]["chars"]
    text = "".join(line + "\n" for line in LINES)
    total = count = 0
    for line in range(8):
        begin = sum(len(before) + 1 for before in LINES[:line])
        window = (text + text)[begin : begin + 17]  # after the last line comes the first one
        ids = torch.tensor([[chars.index(char) for char in window]])
        with torch.no_grad():
            scores = torch.log_softmax(model.eval()(ids[:, :-1], ids[:, 1:])[0][0].double(), -1)
        for place, counts in enumerate(naive_mask(window)):
            if counts:
                total, count = total - float(scores[place, ids[0, place + 1]]), count + 1
    found = Evaluator(config, data, CPU).evaluate(model)
    assert found["val"] == pytest.approx(total / count, abs=1e-5)
    assert "bits_per_byte" not in found  # of some of the bytes


def test_eval_counts_what_a_plain_loop_counts(lines, tmp_path, capsys):
    flags = ["--sampling=lines", "--loss_after==", f"--dataset={lines}", f"--out_dir={tmp_path / 'out'}"]
    flags += ["--max_iters=150", "--eval_interval=150", "--always_save_checkpoint=True"]
    assert train_here(*TINY, *flags).endswith(f"; python eval.py --out_dir={tmp_path / 'out'}\n")
    capsys.readouterr()
    where = {"out_dir": str(tmp_path / "out"), "device": "cpu", "dtype": "float32"}
    found = measure(EvalConfig(**where, batch_size=3))["accuracy"]
    printed = capsys.readouterr().out.splitlines()

    from distrogpt.checkpoint import load_checkpoint, restore_model

    contents = load_checkpoint(tmp_path / "out" / "ckpt.pt")
    model, chars = restore_model(contents, tmp_path).eval(), contents["meta"]["tokenizer"]["chars"]
    exact, wrong = 0, []
    for line in LINES:
        prompt, equals, right = line.partition("=")
        if equals:
            ids = torch.tensor([[chars.index(char) for char in prompt + equals]])
            given = ""
            while not given.endswith("\n") and len(given) < 9:
                logits, _ = model(ids[:, -16:])
                ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
                given += chars[ids[0, -1]]
            exact += given == right + "\n"
            wrong += [] if given == right + "\n" else [prompt]
    assert printed[0].split(maxsplit=2) == ["accuracy", "exact", f"{100 * exact / 6:.1f} % ({exact} of 6)"]
    assert 0 < exact < 6  # the test sees both kinds
    assert sorted(line.split()[2].split("=")[0] for line in printed[1:]) == sorted(wrong)
    first = found["wrong"][0]
    answers = f"{first['prompt']} got {first['given'] or 'nothing'}, expected {first['right']}"
    assert printed[1].endswith(f" {answers}")
    assert (found["right"], found["lines"]) == (exact, 6)

    for more, says in (
        ({"separator": "+="}, "is 2"),
        ({"separator": "z"}, "'z' at position 0"),
        ({"dataset": "none"}, "no dataset none"),
        ({"tasks": "loss", "stride": 4}, "stride has no meaning"),
    ):
        with pytest.raises(UserError, match=re.escape(says)):
            measure(EvalConfig(**where, **more))
    tokenizer = CharTokenizer(chars)
    with write_dataset(tmp_path / "long", tokenizer) as add:
        add("train", tokenizer.encode("1=1\n" * 9), 36)
        add("val", tokenizer.encode("1" * 16 + "=1\n"), 19)
    with pytest.raises(UserError, match="a prompt has 17 tokens, but block_size is 16"):
        measure(EvalConfig(**where, dataset=str(tmp_path / "long")))
    with pytest.raises(UserError, match="no line of val contains the separator"):
        measure(EvalConfig(**where, dataset=str(tmp_path / "long"), separator="+"))
    with pytest.raises(UserError, match="is the newline"):
        measure(EvalConfig(**where, separator="\n"))


def test_mistakes_of_lines_as_samples(lines, copy):
    with pytest.raises(UserError, match="'=\\+' is 2"):
        open_dataset(config_of(lines, "--loss_after==+"))
    with pytest.raises(UserError, match="a micro-batch has no tokens after loss_after=h"):
        train_here(*TINY, f"--dataset={lines}", "--loss_after=h", "--batch_size=1", "--block_size=4")
    (copy / "meta.json").write_text('{"tokenizer": null, "vocab_size": 200, "dtype": "uint16"}')
    with pytest.raises(UserError, match="the dataset has no tokenizer"):
        open_dataset(config_of(copy))
