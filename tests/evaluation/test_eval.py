"""eval.py and what training asks beside its losses: strided losses, multiple choice, next tokens."""

import hashlib
import json
import math
import random

import numpy as np
import pytest
import torch
from conftest import (
    MODERN,
    TINY,
    assert_user_error,
    losses_of,
    ranks,
    run,
    train_here,
    write_lines,
)

from configurator import read_settings
from distrogpt.checkpoint import load_checkpoint, restore_model, training_state
from distrogpt.data.dataset import strided_windows
from distrogpt.data.tokenizer import ByteTokenizer, from_description
from distrogpt.errors import UserError
from distrogpt.evaluation import questions
from distrogpt.evaluation.introspection import attention_weights, next_tokens
from distrogpt.evaluation.questions import Question, read_questions
from distrogpt.evaluation.tasks import choices, ending_scores
from distrogpt.runtime import Runtime
from eval import EvalConfig, measure
from model import GPT, GPTConfig

LONGER = ("--block_size=24", "--max_iters=60", "--eval_interval=30")
CPU = Runtime(torch.device("cpu"), torch.float32)
MODERN_SHAPE = {
    "norm": "rmsnorm", "rotary": True, "qk_norm": True, "n_kv_head": 1, "tied": False, "logit_softcap": 15.0,
    "embedding_skip": True, "activation": "relu2",
}  # fmt: skip


def lively(**settings) -> GPT:
    """A network whose scores differ: weights three times as large as at a start."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, vocab_size=257, n_layer=2, n_head=2, n_embd=16, **settings)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3) if p.dim() > 1 else None
    return model


def made_up(count: int, longest: int = 25) -> list[Question]:
    """Questions of all lengths; endings of one token too."""
    rng = random.Random(0)

    def ids(low: int, high: int) -> list[int]:
        return [rng.randrange(257) for _ in range(rng.randint(low, high))]

    return [
        Question(ids(1, longest), [ids(1, 33 - longest) for _ in range(rng.randint(2, 5))], 0)
        for _ in range(count)
    ]


def one_by_one(model: GPT, question: Question) -> list[list[float]]:
    """The logarithms of an ending's chances, each ending alone after its context, in float64."""
    scores = []
    for ending in question.endings:
        ids = torch.tensor([question.context + ending])
        with torch.no_grad():
            logits = model(ids[:, :-1], ids[:, 1:])[0][0]
        chances = torch.log_softmax(logits.double(), -1)
        first = len(question.context) - 1
        scores.append([float(chances[first + n, token]) for n, token in enumerate(ending)])
    return scores


@pytest.mark.parametrize("shape", [{}, MODERN_SHAPE])
def test_endings_read_together_score_as_each_alone(shape):
    model, questions = lively(**shape), made_up(40)
    expected = [one_by_one(model, question) for question in questions]
    for question, wanted in zip(questions, expected, strict=True):
        (found,) = ending_scores(model, [question], CPU)
        assert [len(ending) for ending in found] == [len(ending) for ending in question.endings]
        for ours, theirs in zip(found, wanted, strict=True):
            assert ours == pytest.approx(theirs, abs=2e-5)
    by_sum = [int(np.argmax([sum(ending) for ending in scores])) for scores in expected]
    by_mean = [int(np.argmax([sum(ending) / len(ending) for ending in scores])) for scores in expected]
    assert by_sum != by_mean  # they are two measures
    for batch_size in (1, 7, 64):
        assert choices(model, questions, CPU, batch_size).tolist() == list(
            map(list, zip(by_sum, by_mean, strict=True))
        )
    assert choices(model, questions, CPU, 7, lambda: True) is None


@pytest.fixture(scope="module")
def learner(tmp_path_factory, dataset, questions_file):
    """The out_dir of a run that asks at each evaluation, and what it printed."""
    out_dir = tmp_path_factory.mktemp("learner")
    flags = ["--eval_hellaswag=True", f"--hellaswag_input={questions_file}", "--eval_samples=2"]
    more = [
        "--sample_start=def ",
        "--sample_tokens=30",
        "--block_size=24",
        "--max_iters=60",
        "--eval_interval=30",
    ]
    printed = train_here(*TINY, *flags, *more, f"--dataset={dataset}", f"--out_dir={out_dir}")
    return out_dir, printed


def plain_choices(out_dir, path) -> tuple[float, float]:
    """acc and acc_norm, by a loop over single sequences and full logits."""
    contents = load_checkpoint(out_dir / "ckpt.pt")
    model = restore_model(contents, out_dir).eval()
    tokenizer = from_description(contents["meta"]["tokenizer"])
    right = np.zeros(2)
    entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for entry in entries:
        context = tokenizer.encode(entry["ctx"]).tolist()
        endings = [tokenizer.encode(" " + ending).tolist() for ending in entry["endings"]]
        scores = one_by_one(model, Question(context, endings, 0))
        right[0] += np.argmax([sum(ending) for ending in scores]) == entry["label"]
        right[1] += np.argmax([np.mean(ending) for ending in scores]) == entry["label"]
    return tuple(right / len(entries))


def test_training_asks_at_evaluations_and_eval_afterwards(learner, questions_file, tmp_path, capsys):
    out_dir, printed = learner
    evaluations = [line for line in printed.splitlines() if "val loss" in line and line.startswith("step")]
    assert len(evaluations) == 3 and all("hellaswag " in line for line in evaluations)
    assert printed.count("sample 1: def ") == printed.count("sample 2: def ") == 3
    acc, acc_norm = plain_choices(out_dir, questions_file)
    assert f"hellaswag {100 * acc_norm:.2f} %" in evaluations[-1]
    assert losses_of(out_dir)[0][-2:] == ["hellaswag", "accuracy"]
    assert float(losses_of(out_dir)[-1][-2]) == acc_norm

    where = {"out_dir": str(out_dir), "device": "cpu", "dtype": "float32"}
    found = measure(
        EvalConfig(
            **where,
            tasks="choice, next",
            input=str(questions_file),
            start="impor",
            show=3,
            json=str(tmp_path / "r.json"),
        )
    )
    assert (found["choice"]["acc"], found["choice"]["acc_norm"]) == (acc, acc_norm)
    rows = capsys.readouterr().out.splitlines()
    assert rows[0].split() == ["choice", "acc", f"{acc:.4f}"] and len(rows) == 3 + 3
    kept = json.loads((tmp_path / "r.json").read_text())
    assert kept["choice"] == found["choice"] and kept["source"].startswith(f"{out_dir}/ckpt.pt, step 60")
    model = restore_model(load_checkpoint(out_dir / "ckpt.pt"), out_dir).eval()
    tokenizer = from_description(load_checkpoint(out_dir / "ckpt.pt")["meta"]["tokenizer"])
    with torch.no_grad():
        chances = model(torch.tensor([tokenizer.encode("impor").tolist()]))[0][0, 0].double().softmax(-1)
    told = found["next"]["tokens"]
    assert [row["id"] for row in told] == chances.argsort(descending=True)[:3].tolist()
    assert [row["probability"] for row in told] == pytest.approx(
        chances.sort(descending=True)[0][:3].tolist(), rel=1e-4
    )
    assert [tokenizer.decode([row["id"]]) for row in told] == [row["token"] for row in told]


def test_asking_changes_nothing_of_the_training(learner, dataset, tmp_path):
    train_here(*TINY, *LONGER, f"--dataset={dataset}", f"--out_dir={tmp_path}")
    asked, plain = (load_checkpoint(folder / "last.pt")["model"] for folder in (learner[0], tmp_path))
    assert all(torch.equal(plain[name], tensor) for name, tensor in asked.items())


def test_ranks_share_the_questions(learner, questions_file, tmp_path):
    flags = [f"--out_dir={learner[0]}", "--tasks=choice,loss", f"--input={questions_file}", "--batch_size=7"]
    flags += ["--device=cpu", "--dtype=float32"]
    done = ranks(*[("eval.py", *flags, f"--json={tmp_path / 'two.json'}")] * 2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("acc_norm") == 1
    two = json.loads((tmp_path / "two.json").read_text())
    one = measure(read_settings(EvalConfig, flags))
    assert (
        two["choice"]["acc_norm"] == one["choice"]["acc_norm"]
        and two["choice"]["acc"] == one["choice"]["acc"]
    )
    assert two["loss"]["loss"] == pytest.approx(one["loss"]["loss"], rel=1e-6)
    assert two["loss"]["tokens"] == one["loss"]["tokens"]


@pytest.mark.parametrize("stride", [None, 24, 7, 1])
def test_strided_loss_is_a_plain_loops(stride, learner, copy):
    """Each token of val once, told from as many before it as its window has."""
    ids = np.fromfile(copy / "val.bin", "<u2")[:300]
    ids.tofile(copy / "val.bin")
    meta = json.loads((copy / "meta.json").read_text())
    meta["tokens"]["val"] = len(ids)
    meta["bytes"]["val"] = 450
    (copy / "meta.json").write_text(json.dumps(meta))
    model = restore_model(load_checkpoint(learner[0] / "ckpt.pt"), copy).eval()
    T, total = 24, 0.0
    for target in range(1, len(ids)):
        if target <= T:
            begin = 0
        else:  # the first window that reaches it
            step = stride or T
            begin = min(math.ceil((target - T) / step) * step, len(ids) - 1 - T)
        window = torch.from_numpy(ids[begin:target].astype(np.int64))[None]
        with torch.no_grad():
            total -= float(torch.log_softmax(model(window)[0][0, 0].double(), -1)[ids[target]])
    mean = total / (len(ids) - 1)
    where = {"out_dir": str(learner[0]), "device": "cpu", "dtype": "float32", "dataset": str(copy)}
    found = measure(EvalConfig(**where, stride=stride, batch_size=5))["loss"]
    assert found["loss"] == pytest.approx(mean, rel=1e-5) and found["tokens"] == 299
    assert found["perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(mean * 300 / 450 / math.log(2), rel=1e-5)


def test_strided_windows_count_each_target_once():
    for length, T, stride in ((100, 10, 3), (101, 10, 10), (11, 10, 4), (57, 8, 1), (64, 8, 7)):
        starts, skip = strided_windows(length, T, stride)
        targets = [
            start + 1 + n for start, skipped in zip(starts, skip, strict=True) for n in range(skipped, T)
        ]
        assert targets == list(range(1, length)), (length, T, stride)
        assert (np.diff(starts) <= stride).all()


def test_eval_tells_the_val_loss_that_training_told(dataset, tmp_path):
    flags = [*TINY, *MODERN, "--eval_iters=0", "--max_iters=10", "--always_save_checkpoint=True"]
    train_here(*flags, f"--dataset={dataset}", f"--out_dir={tmp_path}")
    told = float(losses_of(tmp_path)[-1][losses_of(tmp_path)[0].index("val_loss")])
    where = {"out_dir": str(tmp_path), "device": "cpu", "dtype": "float32"}
    assert measure(EvalConfig(**where))["loss"]["loss"] == pytest.approx(told, rel=1e-6)
    whole = measure(EvalConfig(**where, split="train", block_size=8))["loss"]
    assert whole["tokens"] == json.loads((dataset / "meta.json").read_text())["tokens"]["train"] - 1


def test_gpt2s_hellaswag_is_told_beside(tmp_path, gpt2_bpe, monkeypatch, capsys):
    """With transformers' own GPT-2 as the reference, and its tokenizer's ids; the weights are random."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    shape = {"n_positions": 64, "n_layer": 1, "n_head": 2, "n_embd": 8, "initializer_range": 0.5}
    theirs = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=None, eos_token_id=None)).eval()
    theirs.save_pretrained(tmp_path / "gpt2")
    rng, words = random.Random(0), "A man sits on the roof and begins to pull up shingles with a tool".split()
    entries = [
        {
            "ctx": " ".join(rng.choices(words, k=9)),
            "endings": [" ".join(rng.choices(words, k=rng.randint(1, 6))) for _ in range(4)],
            "label": str(n % 4),
        }
        for n in range(30)
    ]
    write_lines(tmp_path / "q.jsonl", entries)
    bpe, right = from_description({"kind": "gpt2"}).bpe, [0, 0]
    for entry in entries:
        sums, means = [], []
        for ending in entry["endings"]:
            context, more = bpe.encode(entry["ctx"]), bpe.encode(" " + ending)
            with torch.no_grad():
                scores = theirs(torch.tensor([context + more])).logits[0].double().log_softmax(-1)
            found = [float(scores[len(context) - 1 + n, token]) for n, token in enumerate(more)]
            sums.append(sum(found))
            means.append(sum(found) / len(found))
        right[0] += int(np.argmax(sums)) == int(entry["label"])
        right[1] += int(np.argmax(means)) == int(entry["label"])
    monkeypatch.setattr("eval.GPT2_HELLASWAG", {str(tmp_path / "gpt2"): (0.25, 0.5)})
    asked = EvalConfig(
        init_from=str(tmp_path / "gpt2"),
        tasks="hellaswag",
        input=str(tmp_path / "q.jsonl"),
        device="cpu",
        dtype="float32",
    )
    found = measure(asked)["hellaswag"]
    assert (found["acc"], found["acc_norm"]) == (right[0] / 30, right[1] / 30)
    assert "published acc_norm  0.5000" in capsys.readouterr().out


def test_a_long_context_keeps_its_end_and_an_empty_one_begins(tmp_path):
    write_lines(
        tmp_path / "q.jsonl",
        [
            {"ctx": "x" * 50 + "yz", "endings": ["abc", "d"], "label": 1},
            {"ctx": "", "endings": ["a", "b"], "label": 0},
        ],
    )
    long, empty = read_questions(tmp_path / "q.jsonl", ByteTokenizer(), 10)
    assert bytes(long.context) == b"xxxxxyz" and list(map(bytes, long.endings)) == [b" abc", b" d"]
    assert empty.context == [256] and len(read_questions(tmp_path / "q.jsonl", ByteTokenizer(), 10, 1)) == 1
    model = lively()
    assert choices(model, [long, empty], CPU, 2).shape == (2, 2)


def test_hellaswag_is_downloaded_once_and_checked(tmp_path, monkeypatch):
    entry = b'{"ctx": "a", "endings": ["b", "c"], "label": 0}\n'
    published = tmp_path / "published.jsonl"
    published.write_bytes(entry)
    monkeypatch.setattr(questions, "DATA", tmp_path)
    monkeypatch.setattr(questions, "HELLASWAG", (published.as_uri(), "0" * 64))
    with pytest.raises(UserError, match="invalid hash value"):
        questions.hellaswag_file()
    assert not list((tmp_path / "hellaswag").iterdir())
    monkeypatch.setattr(questions, "HELLASWAG", (published.as_uri(), hashlib.sha256(entry).hexdigest()))
    path = questions.hellaswag_file()
    published.unlink()
    assert questions.hellaswag_file() == path and path.read_bytes() == entry


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 2: Expecting"),
        ("7", "line 2: it is no object"),
        ('{"endings": ["a", "b"], "label": 0}', "line 2: ctx is no text"),
        ('{"ctx": "a", "endings": ["b"], "label": 0}', "line 2: endings is no list of two"),
        ('{"ctx": "a", "endings": ["b", 3], "label": 0}', "line 2: endings is no list"),
        ('{"ctx": "a", "endings": ["b", "c"], "label": 2}', "line 2: label is not the number"),
        ('{"ctx": "a", "endings": ["b", "c"], "label": true}', "line 2: label is not the number"),
        ('{"ctx": "a", "endings": ["b", "c"]}', "line 2: label"),
        ('{"ctx": "a", "endings": ["b", "' + "c" * 40 + '"], "label": 0}', "line 2: an ending has 41 tokens"),
        ("[" * 100_000, "line 2: maximum recursion"),
    ],
)
def test_lines_that_are_no_questions(line, says, tmp_path):
    (tmp_path / "q.jsonl").write_text('{"ctx": "a", "endings": ["b", "c"], "label": 0}\n' + line)
    with pytest.raises(UserError, match=says) as told:
        read_questions(tmp_path / "q.jsonl", ByteTokenizer(), 32)
    assert ";" in str(told.value)


def test_mistakes(learner, dataset, tmp_path):
    out_dir, _ = learner
    where = {"out_dir": str(out_dir), "device": "cpu"}
    (tmp_path / "é.jsonl").write_text('{"ctx": "é", "endings": ["b", "c"], "label": 0}\n', encoding="utf-8")
    (tmp_path / "none.jsonl").write_text("\n")
    for more, says in (
        ({"tasks": "los"}, "tasks=los is not known"),
        ({"tasks": "choice"}, "give --input=FILE"),
        ({"tasks": "hellaswag", "input": str(tmp_path / "no.jsonl")}, "cannot be read"),
        ({"tasks": "hellaswag", "input": str(tmp_path / "é.jsonl")}, "line 1: character 'é'"),
        ({"tasks": "hellaswag", "input": str(tmp_path / "none.jsonl")}, "has no question"),
        ({"stride": 25}, "stride=25 is longer"),
        ({"block_size": 25}, "block_size=25 is longer"),
        ({"tasks": "next", "start": "x" * 25}, "a prompt has 25 tokens, the model reads 24"),
        ({"tasks": "accuracy", "separator": "=="}, "is 2"),
        ({"init_from": "gpt3"}, "init_from=gpt3"),
    ):
        with pytest.raises(UserError, match=says):
            measure(EvalConfig(**where | more))
    flags = [*TINY, f"--dataset={dataset}", f"--out_dir={tmp_path / 'out'}"]
    for more, says in (
        (["--eval_accuracy=True"], "loss_after"),
        (["--eval_accuracy=True", "--loss_after==", "--eval_splits=train"], "eval_splits=train reads none"),
        (["--eval_samples=1", "--sample_start=é"], "'é' at position 0"),
        (["--eval_hellaswag=True", f"--hellaswag_input={tmp_path / 'no.jsonl'}"], "cannot be read"),
    ):
        with pytest.raises(UserError, match=says):
            train_here(*flags, *more)
    assert not (tmp_path / "out").exists()  # nothing was begun
    assert_user_error(run("eval.py", f"--out_dir={tmp_path}"), "ckpt.pt is missing")


def test_files_of_other_systems_and_lines_within_texts(tmp_path):
    entries = [{"ctx": "a\u2028b", "endings": ["c", "d"], "label": n % 2} for n in range(2)]
    lines = [json.dumps(entry, ensure_ascii=False) for entry in entries]
    (tmp_path / "q.jsonl").write_bytes(("\ufeff" + "\r\n".join(lines) + "\r\n").encode())
    found = read_questions(tmp_path / "q.jsonl", ByteTokenizer(), 32)
    assert [(bytes(one.context).decode(), one.label) for one in found] == [("a\u2028b", 0), ("a\u2028b", 1)]


def test_results_that_cannot_be_written_are_told_before_they_are_computed(learner, monkeypatch, tmp_path):
    monkeypatch.setattr("eval.summed_loss", None)  # would be called
    where = {"out_dir": str(learner[0]), "device": "cpu"}
    with pytest.raises(UserError, match=r"r\.json cannot be written"):
        measure(EvalConfig(**where, json=str(tmp_path / "no" / "r.json")))


def test_a_loss_needs_no_tokenizer(copy, tmp_path):
    meta = json.loads((copy / "meta.json").read_text()) | {"tokenizer": None}
    (copy / "meta.json").write_text(json.dumps(meta))
    train_here(*TINY, f"--dataset={copy}", f"--out_dir={tmp_path / 'out'}", "--max_iters=1")
    where = {"out_dir": str(tmp_path / "out"), "device": "cpu"}
    assert 0 < measure(EvalConfig(**where))["loss"]["loss"] < 6
    with pytest.raises(UserError, match="names no characters"):
        measure(EvalConfig(**where, tasks="next"))


def test_next_tokens_leaves_the_padding_out():
    model = lively()
    found = next_tokens(model, [1, 2, 3], 100, CPU, 1000)
    assert len(found) == 100 and max(i for i, _ in found) < 100
    assert sum(p for _, p in found) == pytest.approx(1, abs=1e-5)


def test_a_checkpoint_without_a_dataset(tmp_path):
    model = lively()
    state = training_state(
        model,
        [],
        iter_num=1,
        best_val_loss=1.0,
        meta={"tokenizer": {"kind": "byte"}, "vocab_size": 257, "dtype": "uint16"},
    )
    torch.save(state, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match="names no dataset"):
        measure(EvalConfig(out_dir=str(tmp_path), device="cpu"))


def test_attention_weights_are_transformers(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    shape = {"n_positions": 32, "n_layer": 2, "n_head": 2, "n_embd": 8, "initializer_range": 0.5}
    config = GPT2Config(vocab_size=50, **shape, bos_token_id=None, eos_token_id=None)
    theirs = GPT2LMHeadModel._from_config(config, attn_implementation="eager").eval()
    theirs.save_pretrained(tmp_path)
    ids = [3, 1, 4, 1, 5, 9, 2, 6]
    with torch.no_grad():
        expected = torch.cat(theirs(torch.tensor([ids]), output_attentions=True).attentions)
    found = attention_weights(GPT.from_pretrained(str(tmp_path)).eval(), ids)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_attention_of_a_modern_network_reads_what_the_network_reads():
    model, ids = lively(**MODERN_SHAPE), [3, 1, 4, 1, 5, 9, 2, 6]
    found = attention_weights(model, ids)
    assert found.shape == (2, 2, 8, 8) and bool((found.triu(1) == 0).all())
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 2, 8))
