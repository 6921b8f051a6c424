"""export.py --gguf: the file as the gguf package reads it, and the text that llama.cpp writes with it."""

import contextlib
import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import assert_user_error, run_here, run_limited
from test_export import GATED, KINDS, LETTERS, NEW, ODD, export_model, make_run, our_greedy, random_model

from configurator import configure
from distrogpt.data.tokenizer import (
    ByteTokenizer,
    CharTokenizer,
    GPT2Tokenizer,
    IdTokenizer,
    Tokenizer,
    train_bpe,
)
from distrogpt.settings import ExportConfig
from model import GPT

gguf = pytest.importorskip("gguf", reason="optional: pip install gguf")
ASCII = CharTokenizer(LETTERS.chars)  # without an end of text
QWEN3 = {**GATED, "bias": False, "qk_norm": True}
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT-2": ("gpt2", {}),
    "GPT-2 without biases, untied": ("gpt2", {"bias": False, "tied": False}),
    "GPT-2, exact GELU": ("gpt2", {"activation": "gelu", "n_kv_head": 4}),
    "Llama": ("llama", GATED),
    "Llama without biases, untied": ("llama", {**GATED, "bias": False, "tied": False}),
    "Qwen3": ("qwen3", QWEN3),
    "Qwen3 with learned norms, untied": ("qwen3", {**QWEN3, "qk_norm_weights": True, "tied": False}),
    "Arcee": ("arcee", {**NEW, "activation": "relu2", "n_kv_head": 2, "bias": False}),
}


def export_file(
    folder: Path, model: GPT, tokenizer: Tokenizer = LETTERS, kind: str = "f32"
) -> tuple[Path, list[str]]:
    """The file that export.py writes, and the lines that it prints."""
    out_dir, to = make_run(folder / f"out-{kind}", model, tokenizer), folder / f"{kind}.gguf"
    done = run_here("export.py", f"--out_dir={out_dir}", f"--to={to}", f"--gguf={kind}")
    assert done.returncode == 0, done.stderr
    return to, done.stdout.splitlines()


def fields_of(path: Path) -> dict[str, Any]:
    reader = gguf.GGUFReader(path)
    return {name: field.contents() for name, field in reader.fields.items() if "." in name}


def tensors_of(path: Path) -> dict[str, tuple[str, torch.Tensor]]:
    """The type and the values of each weight."""
    tensors = gguf.GGUFReader(path).tensors
    values = {t.name: torch.tensor(gguf.dequantize(t.data, t.tensor_type)) for t in tensors}
    return {t.name: (t.tensor_type.name, values[t.name]) for t in tensors}


def expected_weights(model: GPT) -> dict[str, torch.Tensor]:
    """The weights by llama.cpp's names, from the description of its networks."""
    config, ours = model.config, model.state_dict()
    C, K, D = config.n_embd, config.kv_heads, config.head_dim
    halves = torch.cat(
        [torch.arange(0, D, 2), torch.arange(1, D, 2)]
    )  # of a head: Qwen3 rotates i and i + D/2
    expected = {"token_embd.weight": ours["transformer.wte.weight"][:97]}
    if not config.tied:
        expected["output.weight"] = ours["lm_head.weight"][:97]
    if config.norm == "layernorm":
        names = {"ln_1": "attn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output"}
        names |= {"ln_2": "ffn_norm", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}
        names = {f"h.{n}.{name}": f"blk.{n}.{theirs}" for n in (0, 1) for name, theirs in names.items()}
        for name, theirs in {**names, "ln_f": "output_norm"}.items():
            w = expected[f"{theirs}.weight"] = ours[f"transformer.{name}.weight"]
            expected[f"{theirs}.bias"] = ours.get(f"transformer.{name}.bias", torch.zeros(len(w)))
        return {**expected, "position_embd.weight": ours["transformer.wpe.weight"]}
    expected["output_norm.weight"] = torch.ones(C)
    for n in (0, 1):
        for kind in ("weight", "bias")[: 1 + config.bias]:
            q, k, v = ours[f"transformer.h.{n}.attn.c_attn.{kind}"].split([C, K * D, K * D])
            if config.qk_norm:
                q, k = (torch.cat([head[halves] for head in w.split(D)]) for w in (q, k))
            expected |= {f"blk.{n}.attn_{name}.{kind}": w for name, w in (("q", q), ("k", k), ("v", v))}
            expected[f"blk.{n}.attn_output.{kind}"] = ours[f"transformer.h.{n}.attn.c_proj.{kind}"]
            fc = ours[f"transformer.h.{n}.mlp.c_fc.{kind}"]
            if config.activation == "swiglu":
                expected[f"blk.{n}.ffn_gate.{kind}"], fc = fc.chunk(2)
            expected[f"blk.{n}.ffn_up.{kind}"] = fc
            expected[f"blk.{n}.ffn_down.{kind}"] = ours[f"transformer.h.{n}.mlp.c_proj.{kind}"]
        expected |= {f"blk.{n}.{name}_norm.weight": torch.ones(C) for name in ("attn", "ffn")}
        for name, scale in (("q", 12 / D**0.5), ("k", 1.0)) if config.qk_norm else ():
            w = ours.get(f"transformer.h.{n}.attn.{name}_weight")
            expected[f"blk.{n}.attn_{name}_norm.weight"] = torch.full((D,), scale) if w is None else w[halves]
    return expected


@pytest.mark.parametrize("network", NETWORKS)
def test_the_file_has_the_networks_sizes_and_weights(network, tmp_path):
    architecture, settings = NETWORKS[network]
    model = random_model(**settings)
    to, _ = export_file(tmp_path, model)
    config, fields, tensors = model.config, fields_of(to), tensors_of(to)
    assert {kind for kind, _ in tensors.values()} == {"F32"}
    expected = expected_weights(model)
    assert set(tensors) == set(expected)
    for name, w in expected.items():
        torch.testing.assert_close(tensors[name][1], w, rtol=0, atol=1e-7, msg=name)
    sizes = {"context_length": 64, "embedding_length": 64, "block_count": 2, "vocab_size": 97}
    sizes |= {"feed_forward_length": config.mlp_width, "attention.head_count": 4}
    sizes |= {"attention.head_count_kv": settings.get("n_kv_head", 4)}
    if architecture == "gpt2":
        sizes["attention.layer_norm_epsilon"] = np.float32(1e-5)
    else:
        sizes |= {"rope.dimension_count": 16, "rope.freq_base": 10000.0}
        sizes["attention.layer_norm_rms_epsilon"] = np.float32(1e-6)
    assert {k: v for k, v in fields.items() if k.startswith(f"{architecture}.")} == {
        f"{architecture}.{name}": value for name, value in sizes.items()
    }
    general = {k: v for k, v in fields.items() if k.startswith("general.")}
    assert general == {
        "general.architecture": architecture,
        "general.type": "model",
        "general.file_type": 0,
        "general.quantization_version": 2,
    }


@pytest.mark.parametrize(("kind", "number"), [("bf16", 32), ("f16", 1), ("q8_0", 7)])
@pytest.mark.parametrize("network", ["GPT-2", "Qwen3"])
def test_types_of_weights(network, kind, number, tmp_path):
    model = random_model(**NETWORKS[network][1])
    to, lines = export_file(tmp_path, model, kind=kind)
    expected, fallback = expected_weights(model), []
    assert fields_of(to)["general.file_type"] == number
    for name, (stored, w) in tensors_of(to).items():
        exact = expected[name]
        if exact.dim() == 1 or name == "position_embd.weight":
            assert stored == "F32" and torch.allclose(w, exact)
        elif kind == "q8_0" and exact.size(1) % 32 == 0:
            step = exact.unflatten(1, (-1, 32)).abs().amax(-1, keepdim=True) / 127
            error = (w - exact).unflatten(1, (-1, 32)).abs()
            assert stored == "Q8_0" and (error <= 0.55 * step).all()  # the step itself is rounded to f16
        elif kind == "bf16":
            assert stored == "BF16" and w.equal(exact.bfloat16().float())
        else:
            fallback += [name] if kind == "q8_0" else []
            assert stored == "F16" and w.equal(exact.half().float())
    # SwiGLU's width is 176 at n_embd=64
    narrow = ["blk.0.ffn_down.weight", "blk.1.ffn_down.weight"]
    assert fallback == (narrow if (network, kind) == ("Qwen3", "q8_0") else [])
    counts = f"{len([t for t in tensors_of(to).values() if t[0] == kind.upper()])} in {kind}"
    assert counts in lines[1] and ("2 in f16" in lines[1]) == bool(fallback)


def make_tokenizer(kind: str, text: str) -> Tokenizer:
    chars = "".join(sorted({*text, *ODD}))
    return {
        "ASCII": lambda: ASCII,
        "ASCII that ends": lambda: LETTERS,
        "characters": lambda: CharTokenizer(chars),
        "characters that end": lambda: CharTokenizer(chars, ends=True),
        "bytes": ByteTokenizer,
        "BPE": lambda: train_bpe([text], 500),
        "GPT-2's": GPT2Tokenizer,
    }[kind]()


TOKENIZERS = ("ASCII", "ASCII that ends", "characters", "characters that end", "bytes", "BPE", "GPT-2's")


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_file_has_the_tokenizer(kind, tmp_path, text, request):
    if kind == "GPT-2's":
        request.getfixturevalue("gpt2_bpe")
    tokenizer = make_tokenizer(kind, text)
    to, _ = export_file(tmp_path, random_model(vocab_size=tokenizer.vocab_size, n_layer=1), tokenizer)
    fields = {k.removeprefix("tokenizer.ggml."): v for k, v in fields_of(to).items() if k.startswith("token")}
    tokens, end = fields["tokens"], tokenizer.end_of_text
    padded = kind == "characters"  # llama.cpp's merges need a token that ends texts
    assert len(tokens) == len(set(tokens)) == tokenizer.vocab_size + padded
    assert fields["add_bos_token"] is False
    last = len(tokens) - 1
    assert fields.get("eos_token_id") == (last if padded else end)
    assert fields["token_type"] == [1] * last + [1 if kind == "ASCII" else 3]
    assert fields["bos_token_id"] == (tokenizer.chars.find("\n") if end is None else end)
    assert fields.get("suppress_tokens") == ([last] if padded else None)
    visible = {b: ["Ġ", "Ċ"][b == 10] if b in (32, 10) else chr(b) for b in (*range(33, 127), 32, 10)}
    if kind in ("ASCII", "ASCII that ends", "bytes"):
        assert fields["model"] == "rwkv" and tokens[:2] == (
            ["\\x00", "\\x01"] if kind == "bytes" else ["\\x20", "\\x21"]
        )
    else:
        assert (fields["model"], fields["pre"]) == ("gpt2", "gpt-2")
        letter = tokenizer.encode("d\n ").tolist()
        assert [tokens[i] for i in letter] == [visible[ord(char)] for char in "d\n "]
        merged = {"".join(pair.split(" ")) for pair in fields["merges"]}
        made = {token for token in tokens if len(token) > 1 and token not in ("<|endoftext|>", "<|unused|>")}
        assert made <= merged and (merged == made or kind.startswith("characters"))
    assert ("<|endoftext|>" in tokens) == (end is not None)
    tensors = tensors_of(to)
    embeddings = tensors["token_embd.weight"][1]
    assert len(embeddings) == len(tokens)
    if padded:
        torch.testing.assert_close(embeddings[-1], embeddings[:-1].mean(0))
        assert fields_of(to)["gpt2.vocab_size"] == len(tokens)


def test_a_model_without_a_tokenizer(tmp_path):
    model = random_model(**QWEN3, vocab_size=50)
    to, lines = export_file(tmp_path, model, IdTokenizer(50), "q8_0")
    fields = fields_of(to)
    assert {k: v for k, v in fields.items() if "tokenizer" in k} == {"tokenizer.ggml.model": "none"}
    assert fields["qwen3.vocab_size"] == 50
    assert "It has no tokenizer: inputs and outputs are token ids." in lines


def test_a_folder_becomes_the_same_file(tmp_path):
    """The command of its model card."""
    model = random_model(**QWEN3)
    to, _ = export_file(tmp_path, model, kind="q8_0")
    (tmp_path / "folder").mkdir()
    folder = export_model(tmp_path / "folder", model)
    card = (folder / "README.md").read_text(encoding="utf-8")
    (line,) = [line for line in card.splitlines() if "--gguf" in line]
    _, *words = line.split("   #")[0].removeprefix("# python ").split()
    assert run_here("export.py", *words, cwd=folder.parent).returncode == 0
    assert (folder.parent / "exported.gguf").read_bytes() == to.read_bytes()


# mistakes


@pytest.mark.parametrize(
    ("network", "has", "flags"),
    [
        ("modern", "logit_softcap=15.0, embedding_skip=True, key_offset=True", "--key_offset=False"),
        ("Arcee with GELU, untied", "activation=gelu_tanh", "--activation=swiglu"),
        ("own, LayerNorm", "norm=layernorm", "--norm=rmsnorm"),
        ("own, table of positions", "qk_norm=True", "--qk_norm=False"),
    ],
)
def test_a_network_that_llama_cpp_lacks_is_refused(network, has, flags, tmp_path):
    out_dir = make_run(tmp_path / "out", random_model(**KINDS[network][1]), LETTERS)
    to = tmp_path / "to.gguf"
    wrong = run_here("export.py", f"--out_dir={out_dir}", f"--to={to}", "--gguf=bf16")
    assert_user_error(
        wrong, "llama.cpp cannot run a network with", has, "; train one with --", flags, "docs/export.md"
    )
    assert not to.exists() and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_arcee_has_no_biases_there(tmp_path):
    model = random_model(**{**NETWORKS["Arcee"][1], "bias": True})
    out_dir = make_run(tmp_path / "out", model, LETTERS)
    wrong = run_here("export.py", f"--out_dir={out_dir}", f"--to={tmp_path}/to.gguf", "--gguf=bf16")
    assert_user_error(wrong, "bias=True", "--bias=False")


def test_mistakes(tmp_path, monkeypatch, capsys):
    model = random_model(n_layer=1)
    out_dir, to = make_run(tmp_path / "out", model, LETTERS), tmp_path / "new" / "to.gguf"

    def export(*flags: str) -> Any:
        return run_here("export.py", f"--out_dir={out_dir}", *flags)

    assert_user_error(export(f"--to={to}"), "names a GGUF file", "--gguf=q8_0")
    assert_user_error(export("--to=two\nlines.gguf", "--gguf=q8_0"), "is not a valid name")
    assert_user_error(export(f"--to={tmp_path / 'to'}", "--gguf=q8_0"), "does not end in .gguf")
    assert_user_error(export(f"--to={to}", "--gguf=q4"), "gguf=q4", "f32, bf16, f16, q8_0")
    with pytest.raises(SystemExit):
        configure(ExportConfig, [f"--to={to}", "--gguf=q8_0", "--dtype=float16"])
    assert "gguf=q8_0 sets the type of the weights" in capsys.readouterr().err
    assert export(f"--to={to}", "--gguf=q8_0").returncode == 0
    before = to.read_bytes()
    assert_user_error(export(f"--to={to}", "--gguf=bf16"), "exists already", "--overwrite=True")
    assert to.read_bytes() == before
    assert export(f"--to={to}", "--gguf=bf16", "--overwrite=True").returncode == 0
    assert len(to.read_bytes()) > len(before) and [path.name for path in to.parent.iterdir()] == ["to.gguf"]
    mine = tmp_path / "mine.gguf"
    mine.write_text("my notes")
    refused = export(f"--to={mine}", "--gguf=bf16", "--overwrite=True")
    assert_user_error(refused, "is not a GGUF file")
    assert mine.read_text() == "my notes"
    assert_user_error(export(f"--to={mine}/to.gguf", "--gguf=bf16"), "cannot be created")
    (tmp_path / "folder.gguf").mkdir()
    assert_user_error(export(f"--to={tmp_path}/folder.gguf", "--gguf=bf16"), "cannot be read")
    monkeypatch.setitem(sys.modules, "gguf", None)
    missing = export(f"--to={tmp_path / 'x.gguf'}", "--gguf=bf16")
    assert_user_error(missing, "needs gguf; run: pip install gguf")


def test_weights_too_large_for_a_type_are_reported(tmp_path):
    model = random_model(n_layer=1)
    model.transformer.wte.weight.data[3, 4] = 1e8
    out_dir, to = make_run(tmp_path / "out", model, LETTERS), tmp_path / "to.gguf"
    for kind in ("f16", "q8_0"):
        wrong = run_here("export.py", f"--out_dir={out_dir}", f"--to={to}", f"--gguf={kind}")
        assert_user_error(wrong, f"token_embd.weight has weights that are not finite in {kind}; choose bf16")
        assert not to.exists()
    assert run_here("export.py", f"--out_dir={out_dir}", f"--to={to}", "--gguf=bf16").returncode == 0


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limits of files")
def test_a_full_disk_leaves_what_was_there(tmp_path):
    to, _ = export_file(tmp_path, random_model())
    flags = ("export.py", f"--out_dir={tmp_path / 'out-f32'}", f"--to={to}", "--gguf=f32", "--overwrite=True")
    before = to.read_bytes()
    full = run_limited(100_000, *flags)
    assert full.returncode == 1 and "cannot be written" in full.stderr and len(full.stderr.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f32.gguf", "out-f32"]
    assert to.read_bytes() == before


def test_surrogates_in_the_vocabulary_are_reported(tmp_path):
    tokenizer = CharTokenizer("ab\ud800")
    out_dir = make_run(tmp_path / "out", random_model(vocab_size=3), tokenizer)
    wrong = run_here("export.py", f"--out_dir={out_dir}", f"--to={tmp_path}/to.gguf", "--gguf=bf16")
    assert_user_error(wrong, "surrogates")


# llama.cpp itself


@contextlib.contextmanager
def loaded(path: Path, **options: Any) -> Any:
    """The file in llama.cpp, with keys and values in fp32: it rounds them to f16 otherwise."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="optional: pip install llama-cpp-python (minutes)")
    exact = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
    llm = llama_cpp.Llama(str(path), **{"n_ctx": 0, "n_threads": 1, "verbose": False, **exact, **options})
    try:
        yield llm
    finally:
        llm.close()


def their_greedy(llm: Any, ids: list[int], count: int) -> list[int]:
    tokens = llm.generate(ids, top_k=1, temp=0.0, top_p=1.0, min_p=0.0)
    return [token for token, _ in zip(tokens, range(count), strict=False)]


@torch.no_grad()
def decisive_prompt(model: GPT, tokenizer: Tokenizer, text: str) -> tuple[str, list[int], float]:
    """A prompt whose 60 greedy tokens are chosen clearly: its text, the tokens, and the smallest difference
    between the two largest logits, over 0.5 if there is one among a hundred prompts."""
    best: tuple[str, list[int], float] = ("", [], -1.0)
    for begin in range(1000, 31_000, 300):
        prompt = text[begin : begin + 40]
        ids = torch.tensor([tokenizer.encode(prompt).tolist()])
        everything = our_greedy(model, ids, 60, tokenizer)
        logits = model(everything, everything)[0][0, ids.size(1) - 1 : -1, : tokenizer.vocab_size]
        first, second = logits.topk(2).values.unbind(-1)
        gap = (first - second).min().item()
        best = max(best, (prompt, everything[0, ids.size(1) :].tolist(), gap), key=lambda found: found[2])
        if gap > 0.5:
            break
    return best


def rounded(model: GPT, kind: str) -> GPT:
    """The network with its matrices in the type of the file."""
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}[kind]
    for p in model.parameters():
        if p.dim() > 1:
            p.data = p.data.to(dtype).float()
    return model


def assert_same_text(model: GPT, tokenizer: Tokenizer, text: str, folder: Path, kind: str) -> None:
    to, _ = export_file(folder, model, tokenizer, kind)
    prompt, expected, gap = decisive_prompt(rounded(model, kind), tokenizer, text)
    ids = tokenizer.encode(prompt).tolist()
    with loaded(to) as llm:
        assert llm.tokenize(prompt.encode(), special=True) == ids  # with its default, add_bos=True
        assert their_greedy(llm, ids, 60) == expected
        written = llm(prompt, max_tokens=60, temperature=0.0)
    print(f"gap {gap:.3f}")
    assert written["usage"]["prompt_tokens"] == len(ids)
    if tokenizer.end_of_text not in expected:
        assert written["choices"][0]["text"] == tokenizer.decode(expected)


@pytest.mark.parametrize("kind", ["f32", "bf16"])
@pytest.mark.parametrize("network", NETWORKS)
def test_llama_cpp_writes_the_same_text(network, kind, tmp_path, text):
    model = random_model(**NETWORKS[network][1], block_size=256)
    assert_same_text(model, LETTERS, text, tmp_path, kind)


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_llama_cpp_encodes_the_same(tokenizer, tmp_path, text, request):
    if tokenizer == "GPT-2's":
        request.getfixturevalue("gpt2_bpe")
    tokenizer = make_tokenizer(tokenizer, text)
    size = 50304 if tokenizer.vocab_size == 50257 else tokenizer.vocab_size
    model = random_model(**QWEN3, vocab_size=size, block_size=256)
    assert_same_text(model, tokenizer, text, tmp_path, "f32")
    everything = "".join(chr(code) for code in range(1, 0x110000) if not 0xD800 <= code < 0xE000)
    texts = [text[:20_000], ODD, " a", "a ", "\n", " . ,", "'S 's  \n \n", "a<|endoftext|><|endoftext|>b"]
    with loaded(tmp_path / "f32.gguf") as llm:
        for words in [*texts, *([] if isinstance(tokenizer, CharTokenizer) else [everything])]:
            if isinstance(tokenizer, CharTokenizer):
                words = "".join(char for char in words if char in tokenizer.chars)
            ids = tokenizer.encode(words).tolist()
            assert llm.tokenize(words.encode(), special=True) == ids
            pieces = [llm.detokenize([i], special=True) for i in ids[:2000]]
            assert b"".join(pieces) == tokenizer.decode_bytes(ids[:2000])


def test_llama_cpp_and_characters_that_are_unknown(tmp_path):
    model = random_model(vocab_size=97, n_layer=1, block_size=256)
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir(), other.mkdir()
    to, lines = export_file(one, model, LETTERS)
    assert "Its vocabulary is 96 characters; all others are an error." in lines
    with loaded(to) as llm, pytest.raises(RuntimeError, match="decode"):
        llm("a§b", max_tokens=1)
    tokenizer = CharTokenizer(f"{LETTERS.chars}é")
    to, lines = export_file(other, model, tokenizer)
    assert "Its vocabulary is 97 characters; all others are left out by llama.cpp." in lines
    with loaded(to) as llm:
        assert llm.tokenize("aüéb§".encode()) == tokenizer.encode("aéb").tolist()


@pytest.mark.parametrize("kind", ["ASCII", "characters", "BPE", "ids"])
def test_the_printed_lines_run(kind, tmp_path, text):
    tokenizer = IdTokenizer(97) if kind == "ids" else make_tokenizer(kind, text)
    pytest.importorskip("llama_cpp", reason="optional: pip install llama-cpp-python (minutes)")
    model = random_model(**QWEN3, vocab_size=tokenizer.vocab_size, block_size=256)
    _, lines = export_file(tmp_path, model, tokenizer, "q8_0")
    code = [line for line in lines if line.startswith(("from ", "llm = ", "ids = ", "text = ", "print("))]
    assert len(code) == 4
    printed, names = io.StringIO(), {}
    with contextlib.redirect_stdout(printed):
        exec("\n".join(code), names)
    names["llm"].close()
    assert len(printed.getvalue()) > 100
    # the token that ours lacks is never sampled
    assert (f"logit_bias={{{tokenizer.vocab_size}: -100}}" in code[2]) == (kind == "characters")


def test_a_window_is_as_long_as_ours(tmp_path):
    """Up to its last position, GPT-2's table of positions is read as ours."""
    model = random_model(block_size=256)
    to, lines = export_file(tmp_path, model)
    assert "It reads 256 tokens, prompt included: llama.cpp does not move this window." in lines
    ids = torch.randint(97, (1, 256), generator=torch.Generator().manual_seed(1))
    with loaded(to, logits_all=True) as llm, torch.no_grad():
        llm.eval(ids[0].tolist())
        logits = model(ids, ids)[0][0, :, :97]
        assert llm.n_ctx() == 256 and np.abs(llm.scores[:256] - logits.numpy()).max() < 0.01
