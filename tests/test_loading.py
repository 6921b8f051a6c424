"""What every command makes of the checkpoints of diverged runs, of nanoGPT and of others."""

import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import NANOGPT, TINY, assert_user_error, run_here, sample_here, train_here

from configurator import configure
from distrogpt.checkpoint import load_checkpoint, restore_model
from distrogpt.data.meta import read_meta
from distrogpt.errors import UserError
from distrogpt.loading import find_tokenizer, load_pretrained
from distrogpt.serving.completions import parse_completion
from distrogpt.settings import ServeConfig
from eval import EvalConfig, measure
from sample import Sampler
from train import TrainConfig, train

BROKEN = "transformer.h.0.mlp.c_fc.weight"


def change(path: Path, **entries: Any) -> dict[str, Any]:
    """Replace entries of a checkpoint, in this file alone; all of its entries."""
    contents = torch.load(path, weights_only=True) | entries
    path.unlink()  # ckpt.pt and last.pt may be two names of a file
    torch.save(contents, path)
    return contents


def spoil(path: Path, value: float = math.nan, name: str = BROKEN) -> None:
    weights = torch.load(path, weights_only=True)["model"]
    weights[name].view(-1)[5] = value
    change(path, model=weights)


@pytest.fixture
def out_dir(trained: Path, tmp_path: Path) -> Path:
    """A copy of a run's folder, to spoil."""
    return Path(shutil.copytree(trained, tmp_path / "out"))


@pytest.mark.parametrize(
    ("value", "name"),
    [(math.nan, BROKEN), (math.inf, "transformer.wte.weight"), (-math.inf, "transformer.ln_f.weight")],
)
def test_weights_that_are_not_finite_are_refused_by_every_command(value, name, out_dir, dataset, tmp_path):
    os.remove(out_dir / "last.pt")
    spoil(out_dir / "ckpt.pt", value, name)
    flags, words = f"--out_dir={out_dir}", (f"{name} has NaN or infinite values", "use another checkpoint")
    assert_user_error(sample_here(flags), *words)
    assert_user_error(run_here("export.py", flags, f"--to={tmp_path / 'to'}"), *words)
    assert_user_error(run_here("train.py", *TINY, f"--dataset={dataset}", flags, "--init_from=auto"), *words)
    new = f"--out_dir={tmp_path / 'new'}"
    finetune = run_here("train.py", *TINY, f"--dataset={dataset}", f"--init_from={out_dir}", new)
    assert_user_error(finetune, *words)
    assert not (tmp_path / "new").exists() and not (tmp_path / "to").exists()
    for load in (
        lambda: measure(EvalConfig(out_dir=str(out_dir), device="cpu")),
        lambda: Sampler(str(out_dir), device="cpu"),  # of serve.py, bench.py and notebooks, too
        lambda: load_pretrained(str(out_dir / "ckpt.pt")),
    ):
        with pytest.raises(UserError, match=words[0]):
            load()


def test_the_last_good_file_of_a_run_is_named(dataset, tmp_path):
    out_dir = tmp_path / "a run"
    flags = (*TINY, f"--dataset={dataset}", f"--out_dir={out_dir}", "--keep_checkpoints=2")
    train_here(*flags)
    for path, when in (("last.pt", 9), ("ckpt.pt", 8), ("step-00000020.pt", 7), ("step-00000010.pt", 6)):
        os.utime(out_dir / path, (when, when))
    spoil(out_dir / "last.pt")
    resume = (*flags, "--init_from=resume", "--max_iters=22")
    good = out_dir / "ckpt.pt"
    wrong = run_here("train.py", *resume)
    assert_user_error(wrong, f"{good} is the last good checkpoint: copy it to last.pt")
    averages = torch.load(good, weights_only=True)["optimizer"]
    averages["state"][3]["exp_avg_sq"].view(-1)[0] = math.inf
    change(good, optimizer=averages)
    spoil(out_dir / "step-00000020.pt", math.inf)
    good, wrong = out_dir / "step-00000010.pt", run_here("train.py", *resume)
    assert_user_error(wrong, f"last.pt: {BROKEN}", f"--init_from='{good}'")
    shutil.copy(good, out_dir / "last.pt")
    assert "resumes  after step 10" in train_here(*resume)


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq", "step"])
def test_averages_that_are_not_finite_are_refused(key, out_dir, dataset):
    averages = torch.load(out_dir / "last.pt", weights_only=True)["optimizer"]
    averages["state"][2][key].view(-1)[0] = math.nan
    change(out_dir / "last.pt", optimizer=averages)
    os.remove(out_dir / "ckpt.pt")
    flags = (*TINY, f"--dataset={dataset}", f"--out_dir={out_dir}")
    wrong = run_here("train.py", *flags, "--init_from=resume", "--max_iters=22")
    words = (f"the optimizer's {key} has NaN", f"--init_from={out_dir}/last.pt starts a new run")
    assert_user_error(wrong, *words)
    assert sample_here(f"--out_dir={out_dir}", "--num_samples=1").returncode == 0  # its weights are good
    train_here(*flags, "--init_from=resume", "--eval_only=True")  # which needs no averages


def test_a_best_loss_that_is_no_number_is_forgotten(out_dir, dataset):
    change(out_dir / "last.pt", best_val_loss=math.nan)
    settings = {"dataset": str(dataset), "out_dir": str(out_dir), "init_from": "resume", "device": "cpu"}
    sizes = {"block_size": 16, "batch_size": 4, "gradient_accumulation_steps": 1, "eval_iters": 2}
    assert train(TrainConfig(**settings, **sizes, max_iters=22, loss_plot=False)).best_val_loss < 10


def test_weights_too_large_for_the_dtype_are_refused(out_dir, dataset, tmp_path):
    spoil(out_dir / "ckpt.pt", 70_000.0)
    words = (f"{BROKEN} has a value of 7e+04", "too large for float16; set --dtype=bfloat16")
    flags = (f"--out_dir={out_dir}", "--dtype=float16", "--device=cpu")
    assert_user_error(sample_here(*flags), *words)
    assert_user_error(sample_here(*flags, "--int8=True"), *words)
    with pytest.raises(UserError, match="too large for float16"):
        measure(EvalConfig(out_dir=str(out_dir), dtype="float16", device="cpu"))
    new = (f"--dataset={dataset}", f"--init_from={out_dir}", f"--out_dir={tmp_path / 'new'}")
    assert_user_error(run_here("train.py", *TINY, *new, "--dtype=float16"), *words)
    assert sample_here(*flags[::2], "--dtype=bfloat16", "--num_samples=1").returncode == 0


GREEDY = ("--num_samples=1", "--max_new_tokens=9", "--temperature=0", "--device=cpu", "--dtype=float32")


@pytest.fixture
def nanogpt(tmp_path: Path) -> Path:
    """A folder with a checkpoint of nanoGPT, whose dataset is elsewhere."""
    folder = tmp_path / "nanogpt"
    folder.mkdir()
    shutil.copy(NANOGPT / "ckpt.pt", folder)
    change(folder / "ckpt.pt", config={"dataset": "elsewhere"})
    return folder


def test_a_dataset_that_is_elsewhere_can_be_named_by_its_path(nanogpt, tmp_path, monkeypatch):
    missing, where = "ckpt.pt was trained on elsewhere, which is not here", (f"--out_dir={nanogpt}",)
    to = f"--to={tmp_path / 'to'}"
    for done in (sample_here(*where), run_here("export.py", *where, to)):
        assert_user_error(done, missing, "tokens are not GPT-2's", "--dataset=FOLDER")
    for settings in ({}, {"tasks": "next"}):
        with pytest.raises(UserError, match=f"{missing}.*--dataset=FOLDER"):
            measure(EvalConfig(out_dir=str(nanogpt), device="cpu", **settings))
    named = (*where, f"--dataset={NANOGPT}")
    done = sample_here(*named, "--start=First", *GREEDY)
    model = restore_model(load_checkpoint(NANOGPT / "ckpt.pt"), NANOGPT).eval()
    chars = read_meta(NANOGPT)["tokenizer"]["chars"]
    ids = model.generate(torch.tensor([[chars.index(char) for char in "First"]]), 9, temperature=0)
    assert done.stdout == "".join(chars[i] for i in ids[0]) + "\n" and "note" not in done.stderr
    assert run_here("export.py", *named, to).returncode == 0
    assert sample_here(f"--init_from={tmp_path / 'to'}", "--start=First", *GREEDY).stdout == done.stdout
    settings = {"out_dir": str(nanogpt), "device": "cpu", "dataset": str(NANOGPT), "tasks": "loss,next"}
    assert measure(EvalConfig(**settings, start="First"))["next"]["tokens"][0]["token"] == done.stdout[5]
    flags = [*named, "--tasks=next", "--start=First", "--device=cpu"]  # of which it gives the tokenizer alone
    assert measure(configure(EvalConfig, flags))["next"]["tokens"][0]["token"] == done.stdout[5]
    monkeypatch.chdir(NANOGPT.parent)
    sampler = Sampler(str(nanogpt), device="cpu", dtype="float32", dataset="nanogpt")
    assert sampler.generate("First", 1, 9, temperature=0)[0] + "\n" == done.stdout


@pytest.mark.parametrize("vocab_size", [50257, 50304])
def test_a_vocabulary_of_gpt2s_size_is_taken_for_gpt2s_with_a_note(vocab_size, nanogpt, gpt2_bpe):
    contents = torch.load(nanogpt / "ckpt.pt", weights_only=True)
    embeddings = torch.randn(vocab_size, contents["model_args"]["n_embd"])
    contents["model"] |= dict.fromkeys(("lm_head.weight", "transformer.wte.weight"), embeddings)
    change(
        nanogpt / "ckpt.pt", **contents | {"model_args": contents["model_args"] | {"vocab_size": vocab_size}}
    )
    done = sample_here(f"--out_dir={nanogpt}", "--start=Hello", *GREEDY)
    assert done.returncode == 0 and done.stdout.startswith("Hello")
    note = f"trained on elsewhere, which is not here; using GPT-2's tokenizer for its {vocab_size:,} tokens"
    assert done.stderr.count("note     ") == 1 and note in done.stderr
    assert_user_error(sample_here(f"--out_dir={nanogpt}", f"--dataset={nanogpt / 'no'}"), "no dataset")


@pytest.mark.parametrize("config", [{"dataset": None}, {}])
def test_a_checkpoint_that_names_no_dataset(config, nanogpt):
    change(nanogpt / "ckpt.pt", config=config)
    assert_user_error(sample_here(f"--out_dir={nanogpt}"), "ckpt.pt names no dataset", "--dataset=FOLDER")
    assert sample_here(f"--out_dir={nanogpt}", f"--dataset={NANOGPT}", *GREEDY).returncode == 0


def test_a_dataset_with_another_tokenizer_is_refused(out_dir, nanogpt, dataset):
    wrong = sample_here(f"--out_dir={out_dir}", f"--dataset={NANOGPT}")
    assert_user_error(wrong, f"{NANOGPT} has a different tokenizer than {out_dir}/ckpt.pt")
    wrong = sample_here(f"--out_dir={nanogpt}", f"--dataset={dataset}")
    assert_user_error(wrong, "its tokenizer", "--dataset=FOLDER")


def wrapped(prefix: str, within: str = "") -> Any:
    """Renames weights as a wrapper around the network, and one around each block, does."""
    return lambda name: prefix + name.replace(".h.0.", f".h.0.{within}")


WRAPPED = {
    "DDP": wrapped("module."),
    "compiled": wrapped("_orig_mod."),
    "DDP of a compiled one": wrapped("module._orig_mod."),
    "a compiled DDP": wrapped("_orig_mod.module."),
    "twice": wrapped("module.module."),
    "Lightning": wrapped("model."),
    "Lightning, compiled": wrapped("model._orig_mod."),
    "FSDP1": wrapped("_fsdp_wrapped_module.", "_fsdp_wrapped_module."),
    "a compiled block": wrapped("", "_orig_mod."),
    "a recomputed block": wrapped("module.", "_checkpoint_wrapped_module."),
}


@pytest.mark.parametrize("kind", WRAPPED)
@pytest.mark.parametrize("missing", [None, "lm_head.weight", "transformer.wte.weight"])
def test_weights_of_wrapped_and_tied_networks(kind, missing, nanogpt):
    path = nanogpt / "ckpt.pt"
    weights = load_checkpoint(path)["model"]
    expected = restore_model(load_checkpoint(path), path).state_dict()
    renamed = {WRAPPED[kind](name): tensor for name, tensor in weights.items() if name != missing}
    change(path, model={**renamed, WRAPPED[kind]("transformer.h.0.attn.bias"): torch.ones(1, 1, 32, 32)})
    model = restore_model(load_checkpoint(path), path)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert all(tensor.equal(expected[name]) for name, tensor in model.state_dict().items())


def test_weights_that_are_there_twice_are_refused(nanogpt):
    path, weights = nanogpt / "ckpt.pt", load_checkpoint(nanogpt / "ckpt.pt")["model"]
    change(path, model=weights | {f"module.{name}": tensor + 1 for name, tensor in weights.items()})
    assert_user_error(sample_here(f"--out_dir={nanogpt}"), "two weights are named")
    change(path, model=weights | {f"ema.{name}": tensor + 1 for name, tensor in weights.items()})
    assert_user_error(sample_here(f"--out_dir={nanogpt}"), "unexpected weight ema.lm_head.weight")


def test_an_untied_network_that_does_not_say_so_keeps_both_tables(nanogpt):
    path, weights = nanogpt / "ckpt.pt", load_checkpoint(nanogpt / "ckpt.pt")["model"]
    weights["lm_head.weight"] = torch.randn_like(weights["lm_head.weight"])
    change(path, model=weights)
    model = restore_model(load_checkpoint(path), path)
    assert not model.config.tied
    for name in ("lm_head.weight", "transformer.wte.weight"):
        assert model.state_dict()[name].equal(weights[name])


def test_token_ids_without_a_tokenizer(out_dir, tmp_path):
    contents = torch.load(out_dir / "ckpt.pt", weights_only=True)
    size = contents["meta"]["vocab_size"]
    change(out_dir / "ckpt.pt", meta={"tokenizer": None, "vocab_size": size, "dtype": "uint16"})
    model = restore_model(contents, out_dir).eval()
    ids = model.generate(torch.tensor([[5, 7]]), 9, temperature=0)[0].tolist()
    done = sample_here(f"--out_dir={out_dir}", "--start=5 7", *GREEDY)
    assert done.stdout == " ".join(map(str, ids)) + "\n"
    assert (
        f"note     {out_dir}/ckpt.pt has no known tokenizer: prompts and samples are token ids" in done.stderr
    )
    (tmp_path / "ids.txt").write_text("5,\n7\n")
    listed = sample_here(
        f"--out_dir={out_dir}", f"--start=FILE:{tmp_path / 'ids.txt'}", "--echo=False", *GREEDY
    )
    assert listed.stdout == "".join(f" {i}" for i in ids[2:]) + "\n"
    empty = sample_here(f"--out_dir={out_dir}", "--start=", *GREEDY)
    assert len(empty.stdout.split()) == 9
    for start in ("5 x", str(size), "-1", "1.5", "٣", "9" * 5000):
        wrong = sample_here(f"--out_dir={out_dir}", f"--start={start}", *GREEDY)
        assert_user_error(wrong, "is not a token id", f"numbers from 0 to {size - 1}")
    sampler = Sampler(str(out_dir), device="cpu")  # of serve.py
    for prompt in ("5 7", [5, 7]):
        assert parse_completion({"prompt": prompt}, sampler, ServeConfig()).prompts[0].ids == [5, 7]
    to = tmp_path / "to"
    exported = run_here("export.py", f"--out_dir={out_dir}", f"--to={to}")
    assert exported.returncode == 0 and "It has no tokenizer" in exported.stdout
    assert "okenizer" not in exported.stdout.split("Causal")[0] and "lm_eval" not in exported.stdout
    assert not list(to.glob("token*")) and (to / "meta.json").is_file()
    assert sample_here(f"--init_from={to}", "--start=5 7", *GREEDY).stdout == done.stdout
    again = run_here("export.py", f"--init_from={to}", f"--to={tmp_path / 'again'}")
    assert again.returncode == 0
    for name in ("model.safetensors", "config.json", "meta.json"):
        assert (to / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_a_dataset_gives_token_ids_their_characters(out_dir, dataset):
    size = read_meta(dataset)["vocab_size"]
    contents = {"meta": {"tokenizer": None, "vocab_size": size, "dtype": "uint16"}}
    assert find_tokenizer(contents, size, "it", str(dataset)).decode([0, 1]) == "\n "
