"""Sampling, as a command and from Python."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import assert_user_error, run, run_warm, sample_here

from distrogpt.checkpoint import load_checkpoint, restore_model
from distrogpt.errors import UserError
from sample import SEPARATOR, Sampler


def sample(out_dir, *flags):
    return sample_here(f"--out_dir={out_dir}", "--device=cpu", "--max_new_tokens=30", *flags)


def sample_outside(out_dir, *flags, how=run, **more):
    return how("sample.py", f"--out_dir={out_dir}", "--device=cpu", "--max_new_tokens=30", *flags, **more)


def texts_of(done) -> list[str]:
    assert done.returncode == 0, done.stderr
    return done.stdout.split(f"\n{SEPARATOR}\n")[:-1]


def test_number_and_length_of_samples(trained):
    texts = texts_of(sample(trained, "--start=def ", "--num_samples=4"))
    assert len(texts) == 4 and len(set(texts)) == 4
    assert all(text.startswith("def ") and len(text) == 4 + 30 for text in texts)


def test_same_seed_same_text(trained):
    first = sample(trained, "--seed=1", "--num_samples=2").stdout
    env = {"PYTHONPROFILEIMPORTTIME": "1"}
    outside = sample_outside(trained, "--seed=1", "--num_samples=2", env=env)
    assert first == outside.stdout
    assert "torch.nn" in outside.stderr
    assert "torch._dynamo" not in outside.stderr  # which takes a second to import
    assert first != sample(trained, "--seed=2", "--num_samples=2").stdout


def test_the_source_of_the_samples_is_reported_on_stderr(trained):
    done = sample(trained, "--num_samples=1", "--start=class")
    assert f"{trained}/ckpt.pt, step 20, val loss" in done.stderr
    assert done.stdout.startswith("class") and len(done.stdout) == 5 + 30 + 1


def test_stream_and_generate_give_the_same_text(trained):
    sampler = Sampler(str(trained), device="cpu")
    pieces = list(sampler.stream("def", max_new_tokens=25, seed=3))
    assert len([piece for piece in pieces if piece]) == 25  # one at a time
    assert ["def" + "".join(pieces)] == sampler.generate("def", 1, max_new_tokens=25, seed=3)


def test_temperature_0_takes_the_most_likely_token(trained):
    path = trained / "ckpt.pt"
    model = restore_model(load_checkpoint(path), path).eval()
    sampler = Sampler(str(trained), device="cpu", dtype="float32")
    ids = torch.tensor([sampler.ids_of("import ")])
    for _ in range(9):  # up to block_size
        with torch.no_grad():
            logits, _ = model(ids)
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], 1)
    expected = sampler.tokenizer.decode(ids[0].tolist())
    for seed in ("1", "2"):
        flags = ("--temperature=0", "--start=import ", "--num_samples=2", "--max_new_tokens=9")
        done = sample(trained, *flags, "--dtype=float32", f"--seed={seed}")
        assert texts_of(done) == [expected, expected]


@pytest.mark.parametrize(
    "flags", [("--dtype=bfloat16",), ("--int8=True",), ("--int8=True", "--dtype=float32")]
)
def test_lower_precision_gives_nearly_the_same_text(flags, trained):
    exact = texts_of(
        sample(trained, "--temperature=0", "--start=import ", "--num_samples=2", "--dtype=float32")
    )
    texts = texts_of(sample(trained, "--temperature=0", "--start=import ", "--num_samples=2", *flags))
    assert texts[0] == texts[1] and len(texts[0]) == len(exact[0])
    assert texts[0][:9] == exact[0][:9]  # the prompt and two tokens; rounding may decide a later near tie


def test_calls_from_python_check_their_arguments(trained):
    sampler = Sampler(str(trained), device="cpu")
    for wrong in (
        {"max_new_tokens": 0},
        {"num_samples": -1},
        {"temperature": -1.0},
        {"top_k": -1},
        {"prompt": 5},
    ):
        with pytest.raises(UserError, match=next(iter(wrong)).replace("prompt", "start")):
            sampler.generate(**{"prompt": "a", "max_new_tokens": 3} | wrong)
    tiny = sampler.generate("a", 1, 9, temperature=1e-40)
    assert tiny == sampler.generate("a", 1, 9, temperature=0)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_is_reported(trained):
    with open("/dev/full", "w") as full:
        done = sample_outside(trained, "--num_samples=1", stdout=full)
    assert done.returncode == 1
    assert (
        done.stderr.splitlines()[-1].startswith("error: the output cannot be written (No space left")
        and "Traceback" not in done.stderr
    )


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))), reason="no C++ compiler")
def test_compiled_decoding_gives_the_same_text(trained):
    flags = ("--temperature=0", "--start=import ", "--num_samples=2", "--dtype=float32")
    compiled = sample_outside(trained, *flags, "--compile=True", how=run_warm)
    assert "does not work here" not in compiled.stderr
    assert texts_of(compiled) == texts_of(sample(trained, *flags))


def test_prompts_from_a_file_with_equals_signs_and_empty(trained, tmp_path):
    (tmp_path / "prompt.txt").write_text("def f(x=1):\n")
    for flag in (f"--start=FILE:{tmp_path / 'prompt.txt'}", "--start=def f(x=1):\n"):
        assert all(
            text.startswith("def f(x=1):\n") for text in texts_of(sample(trained, flag, "--num_samples=2"))
        )
    empty = texts_of(sample(trained, "--start=", "--num_samples=2"))
    assert [len(text) for text in empty] == [30, 30]


def test_the_end_of_a_prompt_longer_than_the_block_is_read(trained, tmp_path):
    long, note = "def greet(self, name):", "note     the prompt has 22 tokens; the model reads the last 16"
    flags = ("--num_samples=2", "--repetition_penalty=1.5")
    news = texts_of(sample(trained, f"--start={long[-16:]}", *flags, "--echo=False"))
    (tmp_path / "long.txt").write_text(long)
    for start in (long, f"FILE:{tmp_path / 'long.txt'}"):
        done = sample(trained, f"--start={start}", *flags)
        assert texts_of(done) == [long + new for new in news] and done.stderr.count(note) == 1
    (tmp_path / "prompts.txt").write_text(f"a\n{long}\n{'b' * 17}\n{'c' * 16}\n")
    done = sample(trained, f"--prompts={tmp_path / 'prompts.txt'}", *flags)
    assert texts_of(done)[2:4] == [long + new for new in news]
    assert (
        "prompts.txt, line 2, and 1 more, are over 16 tokens long; the model reads the last 16" in done.stderr
    )
    assert done.stderr.count("note") == 1
    sampler, settings = Sampler(str(trained), device="cpu"), {"repetition_penalty": 1.5}
    assert sampler.generate(["a", long], 2, max_new_tokens=30, **settings)[2:] == [long + new for new in news]
    assert "".join(sampler.stream(long, max_new_tokens=30, **settings)) == news[0]
    assert "".join(text for text, *_ in sampler.tokens(long, max_new_tokens=30, **settings)) == news[0]


def test_top_k_limits_the_candidates(trained):
    one = texts_of(sample(trained, "--top_k=1", "--temperature=5", "--num_samples=2"))
    greedy = texts_of(sample(trained, "--temperature=0", "--num_samples=2"))
    assert one == greedy
    all_texts = {str(flag): sample(trained, f"--top_k={flag}").stdout for flag in ("0", "None", "1000")}
    assert len(set(all_texts.values())) == 1


def test_mistakes(trained, tmp_path):
    assert_user_error(sample_outside(trained, "--start=é"), "'é' at position 0")
    assert_user_error(sample(trained, f"--start=FILE:{tmp_path / 'none'}"), "none", "No such file")
    assert_user_error(sample(trained, "--temperature=-1"), "at least 0")
    assert_user_error(sample(trained, "--num_samples=0"), "at least 1")
    assert_user_error(sample(tmp_path / "nowhere"), "ckpt.pt is missing", "train first")
    assert_user_error(sample(trained, "--init_from=gpt3"), "init_from=gpt3", "did you mean gpt2?")
    assert_user_error(sample(trained, "--device=warp"), "device=warp")
    if not torch.cuda.is_available():
        assert_user_error(sample(trained, "--device=cuda"), "finds no CUDA", "--device=cpu")


def test_gpt2s_weights_without_a_network(trained):
    for network in ({"HF_HUB_OFFLINE": "1"}, {"HF_HUB_OFFLINE": "0", "https_proxy": "http://127.0.0.1:9"}):
        env = {"HF_HOME": "/nonexistent", **network}
        done = sample_outside(trained, "--init_from=gpt2", how=run_warm, env=env)
        assert_user_error(done, "init_from=gpt2 cannot be loaded", "give a folder")
        assert len(done.stderr.splitlines()) == 1


def test_from_a_folder_of_transformers_with_gpt2s_tokenizer(tmp_path, gpt2_bpe):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    shape = {"n_positions": 32, "n_layer": 1, "n_head": 1, "n_embd": 8}
    padded = GPT2LMHeadModel(GPT2Config(**shape, vocab_size=50304))  # its last 47 ids have no text,
    with torch.no_grad():
        padded.transformer.ln_f.bias.fill_(1)
        padded.transformer.wte.weight[50257:] = 10  # and the highest logits
    padded.save_pretrained(tmp_path)
    flags = (
        f"--init_from={tmp_path}",
        "--start=Ärger in 日本 ",
        "--num_samples=3",
        "--temperature=3",
        "--top_k=None",
    )
    texts = texts_of(sample_here(*flags, "--device=cpu", "--max_new_tokens=20"))
    assert len(texts) == 3 and all(text.startswith("Ärger in 日本 ") for text in texts)


def test_the_home_folder_stands_for_a_tilde_from_python(trained, monkeypatch):
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(trained.parent))
    for names in ({"out_dir": f"~/{trained.name}"}, {"init_from": f"~/{trained.name}/ckpt.pt"}):
        assert Sampler(**names, device="cpu").source.startswith(str(trained))
