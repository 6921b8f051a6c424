"""export.py: transformers computes the same from the folder alone; --init_from=FOLDER loads it back."""

import ast
import json
import math
import shlex
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    REPO,
    TINY,
    assert_user_error,
    run_here,
    run_limited,
    sample_here,
    train_here,
    write_lines,
)

from distrogpt.checkpoint import atomic_write, load_checkpoint, restore_model, training_state
from distrogpt.data.tokenizer import ByteTokenizer, CharTokenizer, GPT2Tokenizer, Tokenizer, train_bpe
from distrogpt.errors import UserError
from distrogpt.huggingface.formats import in_halves, in_pairs
from distrogpt.inference.decoder import stream
from distrogpt.inference.sampling import SamplingParams
from distrogpt.loading import load_pretrained
from eval import EvalConfig, measure
from model import GPT, GPTConfig

SHAPE = {
    "block_size": 64,
    "vocab_size": 104,
    "n_layer": 2,
    "n_head": 4,
    "n_embd": 64,
}  # seven tokens are padding
LETTERS = CharTokenizer("".join(map(chr, range(32, 127))) + "\n", ends=True)  # 97 of them
NEW = {"norm": "rmsnorm", "rotary": True}
GATED = {**NEW, "activation": "swiglu", "n_kv_head": 2}
EVERYTHING = {"qk_norm": True, "n_kv_head": 1, "tied": False, "logit_softcap": 15.0, "embedding_skip": True}
EVERYTHING |= {"key_offset": True}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT-2": ("GPT2LMHeadModel", {}),
    "GPT-2 without biases": ("GPT2LMHeadModel", {"bias": False}),
    "GPT-2 untied, exact GELU": ("GPT2LMHeadModel", {"tied": False, "activation": "gelu"}),
    "GPT-2 with ReLU squared": ("GPT2LMHeadModel", {"activation": "relu2"}),
    "Llama": ("LlamaForCausalLM", GATED),
    "Llama without biases, untied": ("LlamaForCausalLM", {**GATED, "bias": False, "tied": False}),
    "Qwen3": ("Qwen3ForCausalLM", {**GATED, "bias": False, "qk_norm": True, "tied": False}),
    "Arcee": ("ArceeForCausalLM", {**NEW, "activation": "relu2", "n_kv_head": 2, "bias": False}),
    "Arcee with GELU, untied": ("ArceeForCausalLM", {**NEW, "tied": False}),
    "modern": ("DistroGPTForCausalLM", {**NEW, **EVERYTHING, "activation": "relu2", "bias": False}),
    "own, LayerNorm": ("DistroGPTForCausalLM", {"rotary": True, "activation": "swiglu"}),
    "own, table of positions": ("DistroGPTForCausalLM", {"qk_norm": True, "activation": "gelu"}),
}


@pytest.fixture(scope="module", autouse=True)
def modules_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder for the copies of a model's code that transformers runs; and no progress bars."""
    from transformers import dynamic_module_utils
    from transformers.utils import logging

    logging.disable_progress_bar()
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("modules"))
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", folder)
        patch.setattr(sys, "path", [*sys.path, folder])
        yield


def random_model(**shape: Any) -> GPT:
    """A network whose logits have a deviation of about 1, like a trained one's; no bias is 0."""
    torch.manual_seed(1)
    model = GPT(GPTConfig(**{**SHAPE, **shape})).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() < 2:
                p.add_(torch.randn_like(p), alpha=0.1)
            else:
                p.normal_(std=0.2 if "wte" in name or "wpe" in name else 0.5 * p.size(1) ** -0.5)
        model.lm_head.weight.normal_(std=0.2)
    return model


def make_run(folder: Path, model: GPT, tokenizer: Tokenizer, **extra: Any) -> Path:
    """An out_dir with a checkpoint of the model."""
    meta = {"tokenizer": tokenizer.describe(), "vocab_size": tokenizer.vocab_size, "dtype": "uint16"}
    defaults = {"iter_num": 7, "best_val_loss": 1.5, "val_loss": 1.6, "config": {}, "meta": meta}
    state = training_state(model, [], **{**defaults, **extra})
    folder.mkdir()
    atomic_write(lambda file: torch.save(state, file), folder / "ckpt.pt")
    return folder


def export_model(folder: Path, model: GPT, tokenizer: Tokenizer = LETTERS, *flags: str, **extra: Any) -> Path:
    """The folder that export.py writes."""
    out_dir, to = make_run(folder / "out", model, tokenizer, **extra), folder / "exported"
    done = run_here("export.py", f"--out_dir={out_dir}", f"--to={to}", *flags)
    assert done.returncode == 0, done.stderr
    return to


def has_own_code(folder: Path) -> bool:
    return (folder / "modeling_distrogpt.py").is_file()


def load_in_transformers(folder: Path) -> Any:
    """The export in transformers, which must find each weight and runs only the folder's code."""
    from transformers import AutoModelForCausalLM

    trust = has_own_code(folder)
    theirs, info = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=trust, output_loading_info=True
    )
    assert not any(info.values()), info
    return theirs.eval()


def load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=has_own_code(folder))


def random_ids(*shape: int) -> torch.Tensor:
    return torch.randint(96, shape, generator=torch.Generator().manual_seed(2))


def greedy(theirs: Any, ids: torch.Tensor, count: int, **options: Any) -> torch.Tensor:
    """Greedy generation by transformers."""
    unset = dict.fromkeys(("temperature", "top_k", "eos_token_id", "pad_token_id"))
    settings = {"attention_mask": torch.ones_like(ids), "do_sample": False, **unset}
    return theirs.generate(ids, max_new_tokens=count, **{**settings, **options})


def our_greedy(model: GPT, ids: torch.Tensor, count: int, tokenizer: Tokenizer = LETTERS) -> torch.Tensor:
    noise = torch.zeros(len(ids), count)
    steps = stream(model, ids, SamplingParams(temperature=0), noise, tokenizer.vocab_size)
    return torch.cat([ids, *(new_ids for new_ids, _ in steps)], dim=1)


def assert_same_network(model: GPT, other: GPT) -> None:
    """Bit for bit, except for tokens of the padding."""
    expected = {**asdict(model.config), "vocab_size": 97, "dropout": 0.0}
    assert asdict(other.config) == expected
    weights = other.state_dict()
    for name, tensor in model.state_dict().items():
        expected = tensor[:97] if name in ("transformer.wte.weight", "lm_head.weight") else tensor
        assert torch.equal(weights[name], expected), name


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_computes_the_same_and_loading_back_is_exact(kind, tmp_path):
    architecture, settings = KINDS[kind]
    model = random_model(**settings)
    folder = export_model(tmp_path, model)
    theirs, ids = load_in_transformers(folder), random_ids(4, 65)
    assert type(theirs).__name__ == architecture
    with torch.no_grad():
        logits, _ = model(ids[:, :-1], ids[:, 1:])
        their_logits = theirs(ids[:, :-1]).logits
        # without rotary positions, there are no embeddings for one more position
        loss = theirs(ids, labels=ids).loss if settings.get("rotary") else None
    logits = logits[..., : LETTERS.vocab_size]
    largest = (their_logits - logits).abs().max().item()
    print(f"{kind}: logits differ by {largest:.1e} at most, with a deviation of {logits.std():.2f}")
    assert their_logits.shape == logits.shape and logits.std() > 1 and largest <= 1e-5
    if loss is not None:
        assert loss.item() == pytest.approx(
            F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()
        )
    assert greedy(theirs, ids[:, :5], 50).tolist() == our_greedy(model, ids[:, :5], 50).tolist()
    back, contents = load_pretrained(str(folder))
    assert_same_network(model, back)
    assert contents["meta"]["tokenizer"] == LETTERS.describe()
    theirs.save_pretrained(tmp_path / "saved")  # as after finetuning elsewhere
    assert_same_network(model, load_pretrained(str(tmp_path / "saved"))[0])


FINETUNED = ("GPT-2", "GPT-2 without biases", "Llama", "Qwen3", "Arcee", "modern", "own, table of positions")


@pytest.mark.parametrize("kind", FINETUNED)
def test_a_model_comes_back_from_training_in_transformers_and_leaves_again(kind, tmp_path):
    folder, ids = export_model(tmp_path, random_model(**KINDS[kind][1])), random_ids(4, 48)
    theirs = load_in_transformers(folder).train()
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=0.03)
    theirs(ids, labels=ids).loss.backward()
    optimizer.step()
    for name, p in theirs.named_parameters():  # each, those of norms, too
        assert p.grad is not None and p.grad.any(), name
    theirs.eval().save_pretrained(tmp_path / "saved")
    with torch.no_grad():
        expected = theirs(ids).logits
        back = load_pretrained(str(tmp_path / "saved"))[0].eval()
        torch.testing.assert_close(back(ids, ids)[0], expected, atol=2e-5, rtol=0)
        generated = back.generate(ids[:1, :5], 20, temperature=0)  # by the KV cache
        assert generated.tolist() == greedy(theirs, ids[:1, :5], 20).tolist()
        load_tokenizer(folder).save_pretrained(tmp_path / "saved")  # without our meta.json
        done = run_here("export.py", f"--init_from={tmp_path / 'saved'}", f"--to={tmp_path / 'again'}")
        assert done.returncode == 0 and KINDS[kind][0] in done.stdout
        assert (tmp_path / "again" / "tokenizer.json").read_bytes() == (
            folder / "tokenizer.json"
        ).read_bytes()
        again = load_in_transformers(tmp_path / "again")
        torch.testing.assert_close(again(ids).logits, expected, atol=2e-5, rtol=0)
    assert expected.std() > 1


def test_norms_of_queries_and_keys_that_cancel_out_in_their_product_alone(qwen, tmp_path):
    for path in qwen.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    scale = torch.rand(16, generator=torch.Generator().manual_seed(4)) + 0.5  # rotation mixes the channels
    change_weights(tmp_path, **{NORM: 3 * scale, NORM.replace("q_norm", "k_norm"): 1 / scale})
    theirs, ids = load_in_transformers(tmp_path), random_ids(2, 48)
    back = load_pretrained(str(tmp_path))[0].eval()
    with torch.no_grad():
        torch.testing.assert_close(back(ids, ids)[0], theirs(ids).logits, atol=1e-5, rtol=0)


def test_learned_norms_of_queries_and_keys_train_and_leave_with_any_other_setting(tmp_path):
    model = random_model(qk_norm=True, qk_norm_weights=True, logit_softcap=15.0)
    theirs, ids = load_in_transformers(export_model(tmp_path, model)), random_ids(2, 48)
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, model(ids, ids)[0][..., :97], atol=1e-5, rtol=0)
    assert_same_network(model, load_pretrained(str(tmp_path / "exported"))[0])
    model(ids, ids)[1].backward()
    attn = model.transformer.h[1].attn
    assert attn.q_weight.grad.any() and attn.k_weight.grad.any()
    path = tmp_path / "out" / "ckpt.pt"
    restored = restore_model(load_checkpoint(path), path).state_dict()
    assert restored["transformer.h.1.attn.q_weight"].equal(attn.q_weight)
    with pytest.raises(ValueError, match="no effect without qk_norm"):
        GPTConfig(qk_norm_weights=True)


def test_rotary_pairs_and_halves():
    rows = torch.arange(2 * 6)[:, None]
    assert in_halves(rows, 6)[:, 0].tolist() == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]
    assert in_pairs(in_halves(rows, 6), 6).equal(rows)


ODD = "The king's men have 12 naïve cafés; they'll go\r\n\n\t日本語 😀 aaaa \u00a0 x  <|endoftext|> y "


@pytest.mark.parametrize("kind", ["char", "char that ends", "byte", "bpe", "gpt2"])
def test_tokenizers_give_the_same_ids_and_text(kind, tmp_path, text, request):
    if kind == "gpt2":
        request.getfixturevalue("gpt2_bpe")
    chars = "".join(sorted({*text, *ODD}))
    tokenizer = {
        "char": lambda: CharTokenizer(chars),
        "char that ends": lambda: CharTokenizer(chars, ends=True),
        "byte": ByteTokenizer,
        "bpe": lambda: train_bpe([text], 700),
        "gpt2": GPT2Tokenizer,
    }[kind]()
    model = random_model(vocab_size=50304 if kind == "gpt2" else tokenizer.vocab_size, n_layer=1)
    folder = export_model(tmp_path, model, tokenizer)
    theirs = load_tokenizer(folder)
    network = load_in_transformers(folder)
    assert len(theirs) == tokenizer.vocab_size == network.config.vocab_size
    assert theirs.eos_token_id == tokenizer.end_of_text
    ids = torch.tensor(tokenizer.encode(text[:2000])[:128]).view(4, 32)
    with torch.no_grad():
        logits = model(ids, ids)[0][..., : tokenizer.vocab_size]
        assert logits.std() > 1 and (network(ids).logits - logits).abs().max() <= 1e-5
    expected_ids = our_greedy(model, ids, 30, tokenizer)
    assert greedy(network, ids, 30).tolist() == expected_ids.tolist()
    assert theirs.decode(expected_ids[0]) == tokenizer.decode(expected_ids[0].tolist())
    for words in (text[:20_000], ODD, " a", "a ", "\n", " . ,", "", "'S 's  \n \n"):
        words = "".join(char for char in words if char in chars)
        ids = tokenizer.encode(words).tolist()
        assert theirs(words)["input_ids"] == ids
        assert theirs.decode(ids) == words == tokenizer.decode(ids)
    cut = tokenizer.encode("é日").tolist()[:-1]  # within a character
    assert theirs.decode(cut) == tokenizer.decode(cut)
    if kind.startswith("char"):
        with pytest.raises(Exception, match="Missing"):  # no character is dropped silently
            theirs("a§")
    saved = tmp_path / "saved"
    theirs.save_pretrained(saved)
    assert load_tokenizer(saved)(ODD)["input_ids"] == tokenizer.encode(ODD).tolist()
    network.save_pretrained(saved)  # as after finetuning elsewhere: without our meta.json
    assert load_pretrained(str(saved))[1]["meta"]["tokenizer"] == tokenizer.describe()


@pytest.mark.parametrize("change", ["another alphabet", "another kind", "a normalizer", "no JSON"])
def test_a_foreign_tokenizer_json_is_not_taken_for_ours(change, tmp_path, text):
    folder = export_model(tmp_path, random_model(vocab_size=300), train_bpe([text], 300))
    (folder / "meta.json").unlink()
    path = folder / "tokenizer.json"
    exported = json.loads(path.read_text(encoding="utf-8"))
    vocab = exported["model"]["vocab"]
    if change == "another alphabet":
        vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    elif change == "another kind":
        exported["model"]["type"] = "Unigram"
    elif change == "a normalizer":
        exported["normalizer"] = {"type": "Lowercase"}
    path.write_text("[" * 10**5 if change == "no JSON" else json.dumps(exported), encoding="utf-8")
    done = sample_here(f"--init_from={folder}", "--start=3 4", "--num_samples=1", "--max_new_tokens=2")
    assert done.stdout.startswith("3 4 ") and "has no known tokenizer" in done.stderr


def test_sample_py_and_transformers_write_the_same_text(tmp_path):
    model = random_model(**KINDS["modern"][1])
    folder = export_model(tmp_path, model)
    flags = (
        "--start=The ",
        "--num_samples=1",
        "--max_new_tokens=50",
        "--temperature=0",
        "--stop_at_end=False",
    )
    ours = sample_here(f"--out_dir={tmp_path / 'out'}", *flags, "--dtype=float32").stdout
    assert sample_here(f"--init_from={folder}", *flags, "--dtype=float32").stdout == ours
    tokenizer = load_tokenizer(folder)
    ids = tokenizer("The ", return_tensors="pt")["input_ids"]
    assert tokenizer.decode(greedy(load_in_transformers(folder), ids, 50)[0]) + "\n" == ours
    sampling = ("--temperature=1", "--seed=3", "--dtype=float32", *flags[:3])
    pair = [
        sample_here(name, *sampling).stdout
        for name in (f"--out_dir={tmp_path / 'out'}", f"--init_from={folder}")
    ]
    assert pair[0] == pair[1] != ours


@pytest.mark.parametrize("kind", ["modern", "own, table of positions"])
def test_our_code_in_transformers_supports_batches_caches_beams_and_pipelines(kind, tmp_path):
    from transformers import pipeline

    folder = export_model(tmp_path, random_model(**KINDS[kind][1]))
    theirs, tokenizer, ids = load_in_transformers(folder), load_tokenizer(folder), random_ids(3, 9)
    alone = [greedy(theirs, row[None, :n], 20)[0, n:] for row, n in zip(ids, (9, 4, 6), strict=True)]
    batch, mask = ids.new_full((3, 9), 96), ids.new_zeros(3, 9)
    for row, n in enumerate((9, 4, 6)):
        batch[row, 9 - n :], mask[row, 9 - n :] = ids[row, :n], 1
    together = greedy(theirs, batch, 20, attention_mask=mask)[:, 9:]
    assert together.tolist() == torch.stack(alone).tolist()
    with torch.no_grad():
        logits = theirs(ids).logits
        past = theirs(ids[:, :5], use_cache=True).to_tuple()[-1]
        rest = theirs(ids[:, 5:], past_key_values=past).logits
        assert theirs(ids, logits_to_keep=2).logits.equal(logits[:, -2:])
    torch.testing.assert_close(rest, logits[:, 5:], atol=1e-5, rtol=0)
    beams = [greedy(theirs, ids, 12, num_beams=3, use_cache=cache).tolist() for cache in (True, False)]
    assert beams[0] == beams[1] != greedy(theirs, ids, 12).tolist()
    static = greedy(theirs, ids, 12, cache_implementation="static", disable_compile=True)
    assert static.tolist() == greedy(theirs, ids, 12).tolist()
    write = pipeline("text-generation", model=theirs, tokenizer=tokenizer)
    texts = write(["ab", "abcdef"], max_new_tokens=5, batch_size=2, do_sample=False)
    assert texts[1][0]["generated_text"].startswith("abcdef")
    theirs.train()
    theirs(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in theirs.parameters())
    if kind != "modern":
        with pytest.raises(ValueError, match="reads 64 tokens at most"):
            theirs(random_ids(1, 65))


@pytest.mark.parametrize("kind", ["GPT-2", "Qwen3", "modern"])
def test_half_precision(kind, tmp_path):
    model = random_model(**KINDS[kind][1])
    folder = export_model(tmp_path, model, LETTERS, "--dtype=bfloat16")
    theirs, ids = load_in_transformers(folder), random_ids(2, 32)
    assert theirs.dtype == torch.bfloat16
    assert (folder / "model.safetensors").stat().st_size < 2.1 * sum(
        p.numel() for p in theirs.parameters()
    ) + 9000
    back = load_pretrained(str(folder))[0].eval()
    with torch.no_grad():
        rounded = theirs.float()(ids).logits
        torch.testing.assert_close(back(ids, ids)[0], rounded, atol=1e-5, rtol=0)
        assert (rounded - model(ids, ids)[0][..., :97]).abs().max() > 1e-3
    for name, tensor in back.state_dict().items():
        expected = model.state_dict()[name][: len(tensor)].bfloat16().float()
        assert torch.equal(tensor, expected), name


def test_an_export_can_be_trained_further(dataset, tmp_path):
    trained = tmp_path / "trained"
    train_here(*TINY, f"--dataset={dataset}", f"--out_dir={trained}")
    done = run_here("export.py", f"--out_dir={trained}", f"--to={tmp_path / 'first'}")
    assert done.returncode == 0 and "GPT2LMHeadModel" in done.stdout
    where = (f"--dataset={dataset}", f"--out_dir={tmp_path / 'out'}", f"--init_from={tmp_path / 'first'}")
    printed = train_here(*TINY, *where)
    before, after = (load_checkpoint(path / "ckpt.pt") for path in (trained, tmp_path / "out"))
    first = float(printed.split("step 0: train")[1].split("val loss")[1].split()[0].rstrip(","))
    assert first == pytest.approx(before["val_loss"], abs=0.3) and after["val_loss"] < before["val_loss"]
    assert after["model_args"]["bias"] is before["model_args"]["bias"] is False
    of_run, of_folder = (
        measure(EvalConfig(**name, dataset=str(dataset), device="cpu", dtype="float32"))["loss"]["loss"]
        for name in ({"out_dir": str(trained)}, {"init_from": str(tmp_path / "first")})
    )
    assert of_run == of_folder
    second = run_here("export.py", f"--init_from={tmp_path / 'first'}", f"--to={tmp_path / 'second'}")
    assert second.returncode == 0
    for name in ("model.safetensors", "config.json", "tokenizer.json", "meta.json"):
        assert (tmp_path / "second" / name).read_bytes() == (tmp_path / "first" / name).read_bytes()


def test_an_export_with_another_tokenizer_than_the_dataset_is_refused(tmp_path, dataset):
    folder = export_model(tmp_path, random_model(vocab_size=257), ByteTokenizer())
    flags = (f"--init_from={folder}", f"--dataset={dataset}", f"--out_dir={tmp_path / 'new'}")
    assert_user_error(run_here("train.py", *TINY, *flags), "another tokenizer")


def test_a_foreign_llama_is_loaded_exactly(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 48, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "vocab_size": 96, "max_position_embeddings": 32}
    torch.manual_seed(3)
    theirs = LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True)).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_(mean=1.0, std=0.3) if p.dim() < 2 else p.normal_(std=0.15)  # norms learn weights
    theirs.save_pretrained(tmp_path / "llama", max_shard_size="60KB")
    assert len(list((tmp_path / "llama").glob("model-*.safetensors"))) > 1
    model, contents = load_pretrained(str(tmp_path / "llama"))
    assert not model.config.tied and contents["meta"]["tokenizer"] is None
    ids = random_ids(2, 32)
    with torch.no_grad():
        expected = theirs(ids).logits
        torch.testing.assert_close(model.eval()(ids, ids)[0], expected, atol=1e-5, rtol=0)
    assert expected.std() > 1
    done = sample_here(f"--init_from={tmp_path / 'llama'}", "--start=3 4", "--num_samples=1")
    assert (
        done.stdout.startswith("3 4 ")
        and "has no known tokenizer: prompts and samples are token ids" in done.stderr
    )


def change_settings(folder: Path, file: str = "config.json", **settings: Any) -> None:
    old = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**old, **settings}))


def change_weights(folder: Path, **changed: torch.Tensor | None) -> None:
    from safetensors.torch import load_file, save_file

    weights = {**load_file(folder / "model.safetensors"), **changed}
    save_file({name: w for name, w in weights.items() if w is not None}, folder / "model.safetensors")


NORM = "model.layers.0.self_attn.q_norm.weight"
BROKEN = {
    "no number": (lambda f: change_settings(f, hidden_size="64"), "hidden_size=64 is not a positive"),
    "too many layers": (lambda f: change_settings(f, num_hidden_layers=10**9), "n_layer=1000000000"),
    "too many heads": (lambda f: change_settings(f, num_attention_heads=0), "num_attention_heads=0"),
    "an epsilon": (lambda f: change_settings(f, rms_norm_eps=1e-5), "rms_norm_eps=1e-05"),
    "scaled positions": (lambda f: change_settings(f, rope_parameters={"type": "linear"}), "type=linear"),
    "another base": (lambda f: change_settings(f, rope_parameters={"rope_theta": 5e5}), "rope_theta=500000"),
    "another width": (lambda f: change_settings(f, intermediate_size=100), "intermediate_size=100"),
    "heads of another width": (lambda f: change_settings(f, head_dim=32), "head_dim=32"),
    "another activation": (lambda f: change_settings(f, hidden_act="relu"), "hidden_act=relu"),
    "an unknown kind": (lambda f: change_settings(f, model_type="mamba"), "model_type=mamba"),
    "a weight too few": (lambda f: change_weights(f, **{NORM: None}), f"such as {NORM}"),
    "a weight too many": (lambda f: change_weights(f, extra=torch.ones(2)), "unexpected weight extra"),
    "another shape": (lambda f: change_weights(f, **{NORM: torch.ones(8)}), f"{NORM} is not a dense"),
    "whole numbers": (lambda f: change_weights(f, **{NORM: torch.ones(16).long()}), "not a floating-point"),
    "half a file": (lambda f: (f / "model.safetensors").write_bytes(b"\x10\0\0\0"), "cannot be loaded"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "neither model.safetensors"),
    "no object": (lambda f: (f / "config.json").write_text("[" * 10**5), "cannot be loaded"),
    "no tokenizer": (lambda f: (f / "meta.json").write_text("{}"), "meta.json cannot be read"),
    "another's tokenizer": (
        lambda f: (f / "meta.json").write_text(json.dumps({"tokenizer": {"kind": "gpt2"}, "vocab_size": 50257,
                                                           "dtype": "uint16"})), "tokenizer has 50,257"),
}  # fmt: skip


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> Path:
    return export_model(tmp_path_factory.mktemp("qwen"), random_model(**KINDS["Qwen3"][1]))


@pytest.mark.parametrize("case", BROKEN)
def test_a_folder_that_does_not_fit_is_reported_in_one_line(case, qwen, tmp_path):
    for path in qwen.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    damage, words = BROKEN[case]
    damage(tmp_path)
    assert_user_error(sample_here(f"--init_from={tmp_path}", "--num_samples=1", "--max_new_tokens=1"), words)


@pytest.mark.parametrize(
    "settings", [{"activation_function": "relu"}, {"n_inner": 100}, {"scale_attn_by_inverse_layer_idx": True}]
)
def test_a_gpt2_that_is_another_network_is_refused(settings, tmp_path):
    folder = export_model(tmp_path, random_model())
    change_settings(folder, **settings)
    with pytest.raises(UserError, match=f"{next(iter(settings))}=.* is not"):
        load_pretrained(str(folder))


OTHER_NETWORKS = [
    ("modern", {"value_embeddings": True}),  # as a newer version may write
    ("modern", {"logit_scale": 0.5}),
    ("own, LayerNorm", {"window": [128, 128]}),
    ("own, LayerNorm", {"rope_theta": 5e5}),
    ("Llama", {"logit_softcap": 15.0}),
    ("Llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}),
    ("Llama", {"partial_rotary_factor": 0.5}),
    ("Arcee", {"quantization_config": {"bits": 4}}),
    ("Qwen3", {"layer_types": ["full_attention", "sliding_attention"]}),
    ("GPT-2", {"pruned_heads": {"0": [1]}}),
    ("GPT-2", {"embedding_skip": True}),
    ("GPT-2", {"key_offset": True}),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """An export of each of these kinds."""
    kinds = {kind for kind, _ in OTHER_NETWORKS}
    return {
        kind: export_model(tmp_path_factory.mktemp("kind"), random_model(**KINDS[kind][1])) for kind in kinds
    }


@pytest.mark.parametrize(("kind", "settings"), OTHER_NETWORKS)
def test_settings_of_another_network_are_refused(kind, settings, folders, tmp_path):
    folder = shutil.copytree(folders[kind], tmp_path / "folder")
    change_settings(folder, **settings)
    wrong = sample_here(f"--init_from={folder}")
    name = "rope_type" if "rope_scaling" in settings else next(iter(settings))
    assert_user_error(wrong, f"{name}=", "use another model, or update")


def test_settings_that_change_nothing_are_read(folders, tmp_path):
    folder = shutil.copytree(folders["modern"], tmp_path / "folder")
    off = {"value_embeddings": False, "logit_scale": 0.0, "window": None, "rope_scaling": {}}
    change_settings(
        folder, **off, _name_or_path="me/mine", torch_dtype="float32", transformers_version="5.0.0"
    )
    assert load_pretrained(str(folder))[0].config.logit_softcap == 15
    old = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in old.items() if k != "qk_norm_weights"}))
    assert load_pretrained(str(folder))[0].config.qk_norm  # an export of an older version


def test_files_of_sharded_weights_must_lie_beside_their_index(qwen, tmp_path):
    (tmp_path / "config.json").write_bytes((qwen / "config.json").read_bytes())
    index = {"weight_map": {"x": str(qwen / "model.safetensors")}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_user_error(sample_here(f"--init_from={tmp_path}"), "not beside it")


def test_a_name_on_the_hub(tmp_path, monkeypatch):
    model = random_model(**KINDS["Arcee"][1])
    export_model(tmp_path, model).rename(tmp_path / "snapshot")
    cache = tmp_path / "models--me--mine"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("a" * 40)
    (cache / "snapshots").mkdir()
    (tmp_path / "snapshot").rename(cache / "snapshots" / ("a" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    back, contents = load_pretrained("me/mine")
    assert_same_network(model, back)
    assert contents["meta"]["vocab_size"] == 97
    assert_user_error(sample_here("--init_from=me/other"), "me/other cannot be loaded")


def test_pytorch_model_bin_is_read_and_runs_no_code(tmp_path):
    model = random_model()
    folder = export_model(tmp_path, model)
    theirs = load_in_transformers(folder)
    old = {name.removeprefix("transformer."): w for name, w in theirs.state_dict().items()}
    old = {**old, "h.0.attn.bias": torch.ones(1, 1, 64, 64), "h.1.attn.masked_bias": torch.tensor(-1e4)}
    torch.save(old, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert_same_network(model, load_pretrained(str(folder))[0])
    torch.save({f"module.{name}": w for name, w in old.items()}, folder / "pytorch_model.bin")  # of DDP
    assert_same_network(model, load_pretrained(str(folder))[0])
    torch.save({**old, "wpe.weight": old["wpe.weight"] / 0}, folder / "pytorch_model.bin")
    assert_user_error(sample_here(f"--init_from={folder}"), "wpe.weight has NaN or infinite", "another model")
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch trap'\ntR.")
    assert_user_error(sample_here(f"--init_from={folder}"), "cannot be loaded")


def test_mistakes(tmp_path):
    out_dir = make_run(tmp_path / "out", random_model(), LETTERS)
    to = tmp_path / "to"
    nothing = run_here("export.py", f"--out_dir={tmp_path / 'nothing'}", f"--to={to}")
    assert_user_error(nothing, "ckpt.pt is missing")
    assert_user_error(run_here("export.py", f"--out_dir={out_dir}"), "to is empty")
    assert_user_error(run_here("export.py", f"--out_dir={out_dir}", f"--to={out_dir}"), "ckpt.pt")
    assert_user_error(run_here("export.py", f"--out_dir={out_dir}", f"--to={out_dir}/ckpt.pt"), "is a file")
    assert_user_error(
        run_here("export.py", f"--out_dir={out_dir}", f"--to={out_dir}/ckpt.pt/x"), "cannot be created"
    )
    assert not to.exists()
    to.mkdir()  # an empty one may be there
    assert run_here("export.py", f"--out_dir={out_dir}", f"--to={to}").returncode == 0
    before = {path.name: path.read_bytes() for path in to.iterdir()}
    assert_user_error(run_here("export.py", f"--out_dir={out_dir}", f"--to={to}"), "exists already")
    assert {path.name: path.read_bytes() for path in to.iterdir()} == before
    half = run_here("export.py", f"--out_dir={out_dir}", f"--to={to}", "--overwrite=True", "--dtype=float16")
    assert half.returncode == 0 and {path.name for path in to.iterdir()} == set(before)
    assert (to / "model.safetensors").stat().st_size < 0.6 * len(before["model.safetensors"])
    (to / "notes.txt").write_text("mine")
    refused = run_here("export.py", f"--out_dir={out_dir}", f"--to={to}", "--overwrite=True")
    assert_user_error(refused, "notes.txt")
    assert (to / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("package", ["safetensors", "tokenizers"])
def test_a_missing_package_is_reported(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    missing = run_here("export.py", f"--to={tmp_path / 'to'}")
    assert_user_error(missing, f"needs {package}; run: pip install {package}")


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A run with a small network, whose tokenizer has no token that ends a text."""
    tokenizer = CharTokenizer("\n ,:abc?")
    folder = tmp_path_factory.mktemp("small") / "out"
    return make_run(folder, random_model(vocab_size=8, n_layer=1, **NEW), tokenizer)


def export_run(out_dir: Path, to: object, *flags: str, cwd: Path | None = None) -> Any:
    return run_here("export.py", f"--out_dir={out_dir}", f"--to={to}", *flags, cwd=cwd)


def read_tree(folder: Path) -> dict[str, bytes]:
    """The files below a folder."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_neighbouring_folders_are_left_alone(small, tmp_path):
    mine = {"to.old/config.json": "{}", "to.old/README.md": "mine", "to.tmp/model.safetensors": "mine"}
    for name, words in mine.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(words)
    before = read_tree(tmp_path)
    for flags in ((), ("--overwrite=True",), ("--overwrite=True",)):
        done = export_run(small, tmp_path / "to", *flags)
        assert done.returncode == 0 and not done.stderr
        assert sorted(path.name for path in tmp_path.iterdir()) == ["to", "to.old", "to.tmp"]
    assert before.items() < read_tree(tmp_path).items()
    modes = {path.stat().st_mode for path in (tmp_path / "to").iterdir()}
    assert modes == {(tmp_path / "to.old" / "README.md").stat().st_mode}
    assert (tmp_path / "to").stat().st_mode == (tmp_path / "to.old").stat().st_mode


@pytest.mark.parametrize("what", ["a folder by our name", "a link by our name", "a file alone", "a folder"])
def test_only_an_export_is_replaced(what, small, tmp_path):
    to = tmp_path / "to"
    to.mkdir()
    (to / "config.json").write_text("{}")
    if what == "a folder by our name":
        (to / "README.md").mkdir()
    elif what == "a link by our name":
        (to / "README.md").symlink_to(small / "ckpt.pt")
    elif what == "a file alone":
        (to / "config.json").rename(to / "README.md")
    else:
        (to / "mine").mkdir()
    before = read_tree(tmp_path)
    wrong = export_run(small, "to", "--overwrite=True", cwd=tmp_path)
    assert_user_error(wrong, "to has ", "which is not part of an export")
    assert str(tmp_path) not in wrong.stderr and read_tree(tmp_path) == before  # called as the user did


def test_a_link_to_a_folder_stays_a_link(small, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert export_run(small, tmp_path / "link").returncode == 0
    assert export_run(small, tmp_path / "link", "--overwrite=True", "--dtype=bfloat16").returncode == 0
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "config.json").is_file()
    assert len(list(tmp_path.iterdir())) == 2


def test_a_file_added_to_the_old_export_while_writing_is_kept(small, tmp_path, monkeypatch):
    to = tmp_path / "to"
    assert export_run(small, to).returncode == 0
    save = sys.modules["safetensors.torch"].save_file

    def save_slowly(*args: Any, **kwargs: Any) -> None:
        save(*args, **kwargs)
        (to / "notes.txt").write_text("mine")

    monkeypatch.setattr("safetensors.torch.save_file", save_slowly)
    done = export_run(small, to, "--overwrite=True")
    assert done.returncode == 0 and "notes.txt" in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (to / "notes.txt").exists() and (to / "model.safetensors").is_file()
    old = Path(done.stderr.split("note     ")[1].split(" has the old files of ")[0])
    assert (old / "notes.txt").read_text() == "mine" and (old / "model.safetensors").is_file()


@pytest.mark.parametrize("to", ["/", "two\nlines", "two\u2028lines", "bell\a"])
def test_an_unprintable_name_is_refused(to, small, tmp_path):
    assert_user_error(export_run(small, to, cwd=tmp_path), "is not a valid name")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such names")
def test_any_printable_name_is_quoted_correctly(small, tmp_path):
    name = 'it\'s *my* "model" 😀 `x` #1'
    done = export_run(small, name, cwd=tmp_path)
    assert done.returncode == 0 and [path.name for path in tmp_path.iterdir()] == [name]
    card = (tmp_path / name / "README.md").read_text(encoding="utf-8")
    assert '\n# it\'s \\*my\\* "model" 😀 \\`x\\` #1\n' in card
    lines = card.split("```python\n")[1].split("```\n")[0].splitlines()
    assert ast.literal_eval(lines[1].split("from_pretrained")[1]) == name
    args = next(shlex.split(line[2:], comments=True) for line in lines if "lm_eval" in line)
    assert json.loads(args[args.index("--model_args") + 1]) == {"pretrained": name, "prefix_token_id": 0}
    assert shlex.split(lines[-1][2:], comments=True)[-1] == f"--init_from={name}"
    assert all(line in done.stdout.splitlines() for line in lines)


def test_weights_too_large_for_a_type_are_reported(tmp_path):
    model = random_model(n_layer=1)
    model.transformer.wte.weight.data[3, 4] = 70_000
    out_dir = make_run(tmp_path / "out", model, LETTERS)
    wrong = export_run(out_dir, tmp_path / "to", "--dtype=float16")
    assert_user_error(wrong, "wte.weight has weights that are not finite in float16", "--dtype=bfloat16")
    assert not (tmp_path / "to").exists()
    assert export_run(out_dir, tmp_path / "to", "--dtype=bfloat16").returncode == 0
    model.transformer.wte.weight.data[3, 4] = 3.4e38
    out_dir = make_run(tmp_path / "larger", model, LETTERS)
    wrong = export_run(out_dir, tmp_path / "other", "--dtype=bfloat16")
    assert_user_error(wrong, "not finite in bfloat16; set --dtype=float32")


def test_batches_are_padded_if_a_token_can_do_it(tmp_path):
    folder = export_model(tmp_path, random_model(n_layer=1, **NEW))
    tokenizer, theirs = load_tokenizer(folder), load_in_transformers(folder)
    batch = tokenizer(["The", "A longer one"], padding=True, return_tensors="pt")
    together = greedy(theirs, batch["input_ids"], 9, attention_mask=batch["attention_mask"], pad_token_id=97)
    alone = greedy(theirs, tokenizer("The", return_tensors="pt")["input_ids"], 9)
    assert tokenizer.decode(together[0], skip_special_tokens=True) == tokenizer.decode(alone[0])


def test_a_model_of_characters_reports_its_limits_and_drops_none(small, tmp_path):
    done = export_run(small, tmp_path / "to")
    card = (tmp_path / "to" / "README.md").read_text()
    for words in ("Its vocabulary is 8 characters; all others are an error.", "no end-of-text or padding",
                  "prefix_token_id=0",
                  " --tasks choice --include_path distrogpt/huggingface "):  # fmt: skip
        assert words in done.stdout and words in card
    tokenizer = load_tokenizer(tmp_path / "to")
    assert tokenizer.decode(tokenizer("\na b\n\n")["input_ids"], skip_special_tokens=True) == "\na b\n\n"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limits of files")
def test_a_full_disk_leaves_what_was_there(tmp_path):
    out_dir, to = make_run(tmp_path / "out", random_model(), LETTERS), tmp_path / "to"
    flags = ("export.py", f"--out_dir={out_dir}", f"--to={to}", "--overwrite=True")
    assert run_here(*flags).returncode == 0
    before = {path.name: path.read_bytes() for path in to.iterdir()}
    full = run_limited(100_000, *flags)
    assert full.returncode == 1 and "cannot be written" in full.stderr and "Traceback" not in full.stderr
    assert len(full.stderr.splitlines()) == 1 and sorted(p.name for p in tmp_path.iterdir()) == ["out", "to"]
    assert {path.name: path.read_bytes() for path in to.iterdir()} == before


def test_the_model_card_reports_where_the_model_comes_from(tmp_path):
    from huggingface_hub import ModelCard

    meta = {"tokenizer": LETTERS.describe(), "vocab_size": 100, "dtype": "uint16", "sha256": "ab" * 32}
    meta |= {"tokens": {"train": 900, "val": 100}, "bytes": {"train": 1800, "val": 200}}
    meta |= {"source": f"{tmp_path}/notes.txt, https://example.org/book.txt"}
    config = {"dataset": f"{tmp_path}/mybook", "learning_rate": 1e-3, "optimizer": "muon", "device": "cpu"}
    folder = export_model(tmp_path, random_model(**KINDS["modern"][1]), meta=meta, config=config)
    card = ModelCard.load(folder / "README.md", ignore_metadata_errors=False)
    metadata = card.data.to_dict()
    assert metadata["library_name"] == "transformers" and metadata["pipeline_tag"] == "text-generation"
    assert "license" not in metadata and "the owner of the weights" in card.text
    bits = 1.6 / math.log(2) * 100 / 200
    for row in (
        "| name | mybook |", "| train tokens | 900 |", f"| sha256 | {'ab' * 32} |", "| step | 7 |",
        "| source | notes.txt, https://example.org/book.txt |", "| val loss | 1.6000 |",
        f"| val bits per byte | {bits:.4f} |", "| best val loss of the run | 1.5000 |",
        "| optimizer | muon |", "| learning_rate | 0.001 |", "| logit\\_softcap | 15.0 |",
    ):  # fmt: skip
        assert row.replace("\\_", "_") in card.text.replace("\\_", "_"), row
    assert "trust_remote_code=True" in card.text and "vLLM does not support this network." in card.text
    reasons = "activation, logit_softcap, embedding_skip, key_offset"
    assert f"llama.cpp does not support this network (because of {reasons})." in card.text
    assert "--gguf" not in card.text
    for path in folder.iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path  # no path of this machine
    assert load_pretrained(str(folder))[1]["meta"]["vocab_size"] == 97  # those that it has tokens for
    lines = card.text.split("```python\n")[1].split("```")[0].replace("'exported'", repr(str(folder)))
    names: dict[str, Any] = {}
    exec(lines, names)
    assert names["tokenizer"].decode(names["model"].generate(max_new_tokens=3)[0]).startswith("<|endoftext|>")


def test_a_card_without_own_code_needs_no_trust(qwen):
    card = (qwen / "README.md").read_text()
    assert "trust_remote_code" not in card and "vllm serve exported" in card
    assert "export.py --init_from=exported --to=exported.gguf --gguf=q8_0   # a file for llama.cpp" in card
    assert "llama.cpp does not" not in card
    assert "Its vocabulary is 96" in card and "prefix_token_id" not in card and "no end-of-text" not in card


def test_lm_evaluation_harness_measures_the_same_accuracy(tmp_path, text, questions_file, monkeypatch):
    lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not there: pip install lm-eval")
    pytest.importorskip("accelerate", reason="lm-evaluation-harness needs it: pip install accelerate")
    import datasets
    from lm_eval.tasks import TaskManager

    tokenizer = CharTokenizer("".join(sorted({*text, *ODD})))  # without an end of text
    model = random_model(**KINDS["modern"][1], vocab_size=tokenizer.vocab_size)
    folder = export_model(tmp_path, model, tokenizer)
    questions = [json.loads(line) for line in questions_file.read_text().splitlines()]
    questions = [q for q in questions if q["ctx"].strip() and len(set(q["endings"])) == 4]  # no ties
    write_lines(tmp_path / "questions.jsonl", questions)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    command = next(line for line in (folder / "README.md").read_text().splitlines() if "lm_eval" in line)
    args = command.split("--model_args ")[1].split()[0].replace("pretrained=", f"pretrained={tmp_path}/")
    tasks = TaskManager(include_path=str(REPO / "distrogpt" / "huggingface"), include_defaults=False)
    options = {"task_manager": tasks, "device": "cpu", "batch_size": 8, "bootstrap_iters": 0}
    theirs = lm_eval.simple_evaluate("hf", model_args=f"{args},dtype=float32", tasks=["choice"], **options)
    run = {"out_dir": str(tmp_path / "out"), "input": "questions.jsonl"}
    ours = measure(EvalConfig(**run, tasks="choice", device="cpu", dtype="float32"))["choice"]
    assert theirs["results"]["choice"]["acc,none"] == ours["acc"] and ours["questions"] == len(questions) > 30
