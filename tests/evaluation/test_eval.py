"""eval.py and the evaluations of training: strided losses, multiple choice, next tokens, attention maps."""

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
from distrogpt.data.dataset import open_dataset, strided_windows
from distrogpt.data.tokenizer import ByteTokenizer, from_description
from distrogpt.errors import UserError
from distrogpt.evaluation.batches import EvaluationStopped
from distrogpt.evaluation.evaluator import Evaluator
from distrogpt.evaluation.introspection import attention_weights, next_tokens
from distrogpt.evaluation.multiple_choice import (
    GPT2_HELLASWAG,
    Question,
    answer_multiple_choice,
    ending_log_probs,
    hellaswag_file,
    read_questions,
)
from distrogpt.runtime import Runtime
from distrogpt.settings import TrainConfig
from distrogpt.training.startup import new_model_config
from eval import EvalConfig, measure
from model import GPT, GPTConfig

LONGER = ("--block_size=24", "--max_iters=60", "--eval_interval=30")
CPU = Runtime(torch.device("cpu"), torch.float32)
MODERN_SHAPE = {
    "norm": "rmsnorm", "rotary": True, "qk_norm": True, "n_kv_head": 1, "tied": False, "logit_softcap": 15.0,
    "embedding_skip": True, "key_offset": True, "activation": "relu2",
}  # fmt: skip


def random_model(**settings) -> GPT:
    """A model with distinct logits: its weights are three times as large as at initialization."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, vocab_size=257, n_layer=2, n_head=2, n_embd=16, **settings)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3) if p.dim() > 1 else None
    return model


def random_questions(count: int, longest: int = 25) -> list[Question]:
    """Questions of all lengths, some with endings of one token."""
    rng = random.Random(0)

    def ids(low: int, high: int) -> list[int]:
        return [rng.randrange(257) for _ in range(rng.randint(low, high))]

    return [
        Question(ids(1, longest), [ids(1, 33 - longest) for _ in range(rng.randint(2, 5))], 0)
        for _ in range(count)
    ]


def plain_log_probs(model: GPT, question: Question) -> list[list[float]]:
    """The log-probabilities of each ending's tokens, by a forward pass per ending, in float64."""
    result = []
    for ending in question.endings:
        ids = torch.tensor([question.context + ending])
        with torch.no_grad():
            logits = model(ids[:, :-1], ids[:, 1:])[0][0]
        log_probs = torch.log_softmax(logits.double(), -1)
        first = len(question.context) - 1
        result.append([float(log_probs[first + n, token]) for n, token in enumerate(ending)])
    return result


@pytest.mark.parametrize("shape", [{}, MODERN_SHAPE])
def test_endings_in_one_row_have_the_log_probs_of_separate_passes(shape):
    model, questions = random_model(**shape), random_questions(40)
    expected = [plain_log_probs(model, question) for question in questions]
    for question, endings in zip(questions, expected, strict=True):
        (log_probs,) = ending_log_probs(model, [question], CPU)
        assert [len(ending) for ending in log_probs] == [len(ending) for ending in question.endings]
        for ending, plain in zip(log_probs, endings, strict=True):
            assert ending == pytest.approx(plain, abs=2e-5)
    by_sum = [int(np.argmax([sum(ending) for ending in scores])) for scores in expected]
    by_mean = [int(np.argmax([sum(ending) / len(ending) for ending in scores])) for scores in expected]
    assert by_sum != by_mean
    for batch_size in (1, 7, 64):
        assert answer_multiple_choice(model, questions, CPU, batch_size).tolist() == list(
            map(list, zip(by_sum, by_mean, strict=True))
        )
    with pytest.raises(EvaluationStopped):
        answer_multiple_choice(model, questions, CPU, 7, lambda: True)


@pytest.fixture(scope="module")
def learner(tmp_path_factory, dataset, questions_file):
    """The out_dir of a run with multiple choice and samples at each evaluation, and its output."""
    out_dir = tmp_path_factory.mktemp("learner")
    flags = ["--eval_hellaswag=True", f"--hellaswag_input={questions_file}", "--eval_samples=2"]
    flags += ["--sample_start=def ", "--sample_tokens=30"]
    printed = train_here(*TINY, *LONGER, *flags, f"--dataset={dataset}", f"--out_dir={out_dir}")
    return out_dir, printed


def plain_accuracies(out_dir, path) -> tuple[float, float]:
    """acc and acc_norm, by a loop over single sequences and full logits."""
    contents = load_checkpoint(out_dir / "ckpt.pt")
    model = restore_model(contents, out_dir).eval()
    tokenizer = from_description(contents["meta"]["tokenizer"])
    right = np.zeros(2)
    entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for entry in entries:
        context = tokenizer.encode(entry["ctx"]).tolist()
        endings = [tokenizer.encode(" " + ending).tolist() for ending in entry["endings"]]
        scores = plain_log_probs(model, Question(context, endings, 0))
        right[0] += np.argmax([sum(ending) for ending in scores]) == entry["label"]
        right[1] += np.argmax([np.mean(ending) for ending in scores]) == entry["label"]
    return tuple(right / len(entries))


def test_training_and_eval_measure_the_same_multiple_choice_accuracy(
    learner, questions_file, tmp_path, capsys
):
    out_dir, printed = learner
    evaluations = [line for line in printed.splitlines() if "val loss" in line and line.startswith("step")]
    assert len(evaluations) == 3 and all("hellaswag " in line for line in evaluations)
    assert printed.count("sample 1: def ") == printed.count("sample 2: def ") == 3
    acc, acc_norm = plain_accuracies(out_dir, questions_file)
    assert f"hellaswag {100 * acc_norm:.2f} %" in evaluations[-1]
    assert losses_of(out_dir)[0][-2:] == ["hellaswag", "accuracy"]
    assert float(losses_of(out_dir)[-1][-2]) == acc_norm

    where = {"out_dir": str(out_dir), "device": "cpu", "dtype": "float32"}
    results = measure(
        EvalConfig(
            **where,
            tasks="choice, next",
            input=str(questions_file),
            start="impor",
            show=3,
            json=str(tmp_path / "r.json"),
        )
    )
    assert (results["choice"]["acc"], results["choice"]["acc_norm"]) == (acc, acc_norm)
    rows = capsys.readouterr().out.splitlines()
    assert rows[0].split() == ["choice", "acc", f"{acc:.4f}"] and len(rows) == 3 + 3
    written = json.loads((tmp_path / "r.json").read_text())
    assert written["choice"] == results["choice"] and written["source"].startswith(
        f"{out_dir}/ckpt.pt, step 60"
    )
    model = restore_model(load_checkpoint(out_dir / "ckpt.pt"), out_dir).eval()
    tokenizer = from_description(load_checkpoint(out_dir / "ckpt.pt")["meta"]["tokenizer"])
    with torch.no_grad():
        probs = model(torch.tensor([tokenizer.encode("impor").tolist()]))[0][0, 0].double().softmax(-1)
    tokens = results["next"]["tokens"]
    assert [row["id"] for row in tokens] == probs.argsort(descending=True)[:3].tolist()
    assert [row["probability"] for row in tokens] == pytest.approx(
        probs.sort(descending=True)[0][:3].tolist(), rel=1e-4
    )
    assert [tokenizer.decode([row["id"]]) for row in tokens] == [row["token"] for row in tokens]


def test_evaluations_do_not_change_the_training(learner, dataset, tmp_path):
    train_here(*TINY, *LONGER, f"--dataset={dataset}", f"--out_dir={tmp_path}")
    evaluated, plain = (load_checkpoint(folder / "last.pt")["model"] for folder in (learner[0], tmp_path))
    assert all(torch.equal(plain[name], tensor) for name, tensor in evaluated.items())


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
def test_strided_loss_equals_a_plain_loop(stride, learner, copy):
    """Each token of val is a target once, predicted from those before it in its window."""
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
    result = measure(EvalConfig(**where, stride=stride, batch_size=5))["loss"]
    assert result["loss"] == pytest.approx(mean, rel=1e-5) and result["tokens"] == 299
    assert result["perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)
    assert result["bits_per_byte"] == pytest.approx(mean * 300 / 450 / math.log(2), rel=1e-5)


def test_strided_windows_count_each_target_once():
    for length, T, stride in ((100, 10, 3), (101, 10, 10), (11, 10, 4), (57, 8, 1), (64, 8, 7)):
        starts, skip = strided_windows(length, T, stride)
        targets = [
            start + 1 + n for start, skipped in zip(starts, skip, strict=True) for n in range(skipped, T)
        ]
        assert targets == list(range(1, length)), (length, T, stride)
        assert (np.diff(starts) <= stride).all()


def test_eval_measures_the_val_loss_of_training(dataset, tmp_path):
    flags = [*TINY, *MODERN, "--eval_iters=0", "--max_iters=10", "--always_save_checkpoint=True"]
    train_here(*flags, f"--dataset={dataset}", f"--out_dir={tmp_path}")
    val_loss = float(losses_of(tmp_path)[-1][losses_of(tmp_path)[0].index("val_loss")])
    where = {"out_dir": str(tmp_path), "device": "cpu", "dtype": "float32"}
    assert measure(EvalConfig(**where))["loss"]["loss"] == pytest.approx(val_loss, rel=1e-6)
    whole = measure(EvalConfig(**where, split="train", block_size=8))["loss"]
    assert whole["tokens"] == json.loads((dataset / "meta.json").read_text())["tokens"]["train"] - 1


def test_published_hellaswag_of_gpt2_is_reported(tmp_path, gpt2_bpe, monkeypatch, capsys):
    """With transformers' own GPT-2 as the reference, and its tokenizer's ids; the weights are random."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    shape = {"n_positions": 64, "n_layer": 1, "n_head": 2, "n_embd": 8, "initializer_range": 0.5}
    gpt2 = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=None, eos_token_id=None)).eval()
    gpt2.save_pretrained(tmp_path / "gpt2")
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
            context, tokens = bpe.encode(entry["ctx"]), bpe.encode(" " + ending)
            with torch.no_grad():
                logits = gpt2(torch.tensor([context + tokens])).logits[0].double().log_softmax(-1)
            log_probs = [float(logits[len(context) - 1 + n, token]) for n, token in enumerate(tokens)]
            sums.append(sum(log_probs))
            means.append(sum(log_probs) / len(log_probs))
        right[0] += int(np.argmax(sums)) == int(entry["label"])
        right[1] += int(np.argmax(means)) == int(entry["label"])
    monkeypatch.setitem(GPT2_HELLASWAG, str(tmp_path / "gpt2"), {"acc": 0.25, "acc_norm": 0.5})
    config = EvalConfig(
        init_from=str(tmp_path / "gpt2"),
        tasks="hellaswag",
        input=str(tmp_path / "q.jsonl"),
        device="cpu",
        dtype="float32",
    )
    result = measure(config)["hellaswag"]
    assert (result["acc"], result["acc_norm"]) == (right[0] / 30, right[1] / 30)
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
    model = random_model()
    assert answer_multiple_choice(model, [long, empty], CPU, 2).shape == (2, 2)


def test_hellaswag_is_downloaded_once_and_checked(tmp_path):
    entry, folder = b'{"ctx": "a", "endings": ["b", "c"], "label": 0}\n', tmp_path / "hellaswag"
    original = tmp_path / "original.jsonl"
    original.write_bytes(entry)
    with pytest.raises(UserError, match="invalid hash"):
        hellaswag_file(folder, (original.as_uri(), "0" * 64))
    assert not list(folder.iterdir())
    source = (original.as_uri(), hashlib.sha256(entry).hexdigest())
    path = hellaswag_file(folder, source)
    original.unlink()
    assert hellaswag_file(folder, source) == path and path.read_bytes() == entry


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"line 2 is not valid JSON \(Expecting"),
        ("7", "line 2: it is not a JSON object"),
        ('{"endings": ["a", "b"], "label": 0}', "line 2: ctx is not a string"),
        ('{"ctx": "a", "endings": ["b"], "label": 0}', "line 2: endings is not a list of two or more"),
        ('{"ctx": "a", "endings": ["b", 3], "label": 0}', "line 2: endings is not a list"),
        ('{"ctx": "a", "endings": ["b", "c"], "label": 2}', "line 2: label is not the index"),
        ('{"ctx": "a", "endings": ["b", "c"], "label": true}', "line 2: label is not the index"),
        ('{"ctx": "a", "endings": ["b", "c"]}', "line 2: label"),
        ('{"ctx": "a", "endings": ["b", "' + "c" * 40 + '"], "label": 0}', "line 2: an ending has 41 tokens"),
        ("[" * 100_000, r"line 2 is not valid JSON \(maximum recursion"),
    ],
)
def test_invalid_questions(line, message, tmp_path):
    (tmp_path / "q.jsonl").write_text('{"ctx": "a", "endings": ["b", "c"], "label": 0}\n' + line)
    with pytest.raises(UserError, match=message) as error:
        read_questions(tmp_path / "q.jsonl", ByteTokenizer(), 32)
    assert ";" in str(error.value)


def test_user_errors(learner, dataset, tmp_path):
    out_dir, _ = learner
    where = {"out_dir": str(out_dir), "device": "cpu"}
    (tmp_path / "é.jsonl").write_text('{"ctx": "é", "endings": ["b", "c"], "label": 0}\n', encoding="utf-8")
    (tmp_path / "none.jsonl").write_text("\n")
    for settings, message in (
        ({"tasks": "los"}, "tasks=los is unknown"),
        ({"tasks": "choice"}, "set --input=FILE"),
        ({"tasks": "hellaswag", "input": str(tmp_path / "no.jsonl")}, "cannot be read"),
        ({"tasks": "hellaswag", "input": str(tmp_path / "é.jsonl")}, "line 1: character 'é'"),
        ({"tasks": "hellaswag", "input": str(tmp_path / "none.jsonl")}, "has no questions"),
        ({"stride": 25}, "stride=25 is larger"),
        ({"block_size": 25}, "block_size=25 is larger"),
        ({"tasks": "accuracy", "separator": "=="}, "is 2"),
        ({"init_from": "gpt3"}, "init_from=gpt3"),
    ):
        with pytest.raises(UserError, match=message):
            measure(EvalConfig(**where | settings))
    flags = [*TINY, f"--dataset={dataset}", f"--out_dir={tmp_path / 'out'}"]
    for settings, message in (
        (["--eval_accuracy=True"], "loss_after"),
        (["--eval_accuracy=True", "--loss_after==", "--eval_splits=train"], "eval_splits=train excludes"),
        (["--eval_samples=1", "--sample_start=é"], "'é' at position 0"),
        (["--eval_hellaswag=True", f"--hellaswag_input={tmp_path / 'no.jsonl'}"], "cannot be read"),
    ):
        with pytest.raises(UserError, match=message):
            train_here(*flags, *settings)
    assert not (tmp_path / "out").exists()  # nothing was started
    assert_user_error(run("eval.py", f"--out_dir={tmp_path}"), "ckpt.pt is missing")


def test_windows_line_ends_and_line_separators_within_texts(tmp_path):
    entries = [{"ctx": "a\u2028b", "endings": ["c", "d"], "label": n % 2} for n in range(2)]
    lines = [json.dumps(entry, ensure_ascii=False) for entry in entries]
    (tmp_path / "q.jsonl").write_bytes(("\ufeff" + "\r\n".join(lines) + "\r\n").encode())
    questions = read_questions(tmp_path / "q.jsonl", ByteTokenizer(), 32)
    assert [(bytes(one.context).decode(), one.label) for one in questions] == [
        ("a\u2028b", 0),
        ("a\u2028b", 1),
    ]


def test_an_unwritable_results_file_is_reported_before_anything_is_computed(learner, monkeypatch, tmp_path):
    monkeypatch.setattr(GPT, "forward", None)  # computing would fail
    where = {"out_dir": str(learner[0]), "device": "cpu"}
    with pytest.raises(UserError, match=r"r\.json cannot be written"):
        measure(EvalConfig(**where, json=str(tmp_path / "no" / "r.json")))


def test_a_loss_needs_no_tokenizer(copy, tmp_path):
    meta = json.loads((copy / "meta.json").read_text()) | {"tokenizer": None}
    (copy / "meta.json").write_text(json.dumps(meta))
    train_here(*TINY, f"--dataset={copy}", f"--out_dir={tmp_path / 'out'}", "--max_iters=1")
    where = {"out_dir": str(tmp_path / "out"), "device": "cpu"}
    assert 0 < measure(EvalConfig(**where))["loss"]["loss"] < 6
    for settings, words in (
        ({"tasks": "hellaswag"}, "has no tokenizer for HellaSwag's text"),
        ({"tasks": "accuracy"}, "has no tokenizer"),
        ({"tasks": "next", "start": "the"}, "'the' is not a token id"),
    ):
        with pytest.raises(UserError, match=words):
            measure(EvalConfig(**where, **settings))
    pairs = measure(EvalConfig(**where, tasks="next", start="1 2", show=3))["next"]["tokens"]
    assert [pair["token"] for pair in pairs] == [f" {pair['id']}" for pair in pairs]


def test_the_end_of_a_prompt_longer_than_the_block_is_read(learner, capsys):
    where = {"out_dir": str(learner[0]), "device": "cpu", "tasks": "next"}
    long, end = (
        measure(EvalConfig(**where, start=start))["next"]["tokens"] for start in ("ab" * 20, "ab" * 12)
    )
    assert long == end
    assert capsys.readouterr().err.count("the prompt has 40 tokens; the model reads the last 24") == 1


def test_next_tokens_leaves_out_the_padded_vocabulary():
    model = random_model()
    tokens = next_tokens(model, [1, 2, 3], 100, CPU, 1000)
    assert len(tokens) == 100 and max(i for i, _ in tokens) < 100
    assert sum(p for _, p in tokens) == pytest.approx(1, abs=1e-5)


def test_a_checkpoint_without_a_dataset(tmp_path):
    model = random_model()
    state = training_state(
        model,
        [],
        iter_num=1,
        best_val_loss=1.0,
        meta={"tokenizer": {"kind": "byte"}, "vocab_size": 257, "dtype": "uint16"},
    )
    torch.save(state, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match="does not name the dataset"):
        measure(EvalConfig(out_dir=str(tmp_path), device="cpu"))


def test_attention_weights_equal_those_of_transformers(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    shape = {"n_positions": 32, "n_layer": 2, "n_head": 2, "n_embd": 8, "initializer_range": 0.5}
    config = GPT2Config(vocab_size=50, **shape, bos_token_id=None, eos_token_id=None)
    gpt2 = GPT2LMHeadModel._from_config(config, attn_implementation="eager").eval()
    gpt2.save_pretrained(tmp_path)
    ids = [3, 1, 4, 1, 5, 9, 2, 6]
    with torch.no_grad():
        expected = torch.cat(gpt2(torch.tensor([ids]), output_attentions=True).attentions)
    weights = attention_weights(GPT.from_pretrained(str(tmp_path)).eval(), ids)
    torch.testing.assert_close(weights, expected, atol=1e-5, rtol=1e-4)


def test_attention_weights_of_a_modern_network():
    model, ids = random_model(**MODERN_SHAPE), [3, 1, 4, 1, 5, 9, 2, 6]
    weights = attention_weights(model, ids)
    assert weights.shape == (2, 2, 8, 8) and bool((weights.triu(1) == 0).all())
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 8))


def test_an_evaluation_stops_for_a_signal_and_for_changed_data(copy, tmp_path):
    config = read_settings(TrainConfig, [*TINY, f"--dataset={copy}"])
    data = open_dataset(config)
    evaluator, model = Evaluator(config, data, CPU), GPT(new_model_config(config, data.meta))
    assert evaluator.evaluate(model, lambda: True) is None and evaluator.error is None
    assert evaluator.evaluate(model).keys() >= {"train", "val"} and model.training
    (copy / "val.bin").write_bytes(b"")
    assert evaluator.evaluate(model) is None and "val.bin changed" in str(evaluator.error)
