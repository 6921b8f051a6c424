"""The decoding step in C++, against model.py in fp32 with the same weights; machines without a compiler."""

import copy
import gc
import os
import subprocess
import sys
import weakref

import pytest
import torch
from conftest import ENVIRONMENT, REPO

from distrogpt.inference.decoder import DecodingBatch, optimize_for_inference
from distrogpt.kernels.build import build_error, has_bf16
from distrogpt.kernels.native import NativeDecoder, supports
from distrogpt.kernels.quantized import Int8Linear
from model import GPT, GPTConfig, KVCache

MODERN = {
    "norm": "rmsnorm", "rotary": True, "qk_norm": True, "activation": "swiglu", "n_kv_head": 2, "tied": False,
    "logit_softcap": 2.0, "embedding_skip": True, "key_offset": True,
}  # fmt: skip
NETWORKS = {
    "gpt2": {},
    "exact gelu, no biases": {"activation": "gelu", "bias": False, "n_embd": 64, "n_head": 2},
    "modern": MODERN,
    "learned qk_norm, one key head": MODERN | {"qk_norm_weights": True, "n_kv_head": 1, "key_offset": False},
    "relu2": MODERN | {"activation": "relu2", "n_kv_head": 4, "logit_softcap": 0.0},
    "mlp_width 688": MODERN | {"n_embd": 256},  # not a multiple of 32
    "heads of 128": {"n_embd": 256, "n_head": 2, "rotary": True},
    "key_offset in GPT-2": {"key_offset": True, "n_embd": 96, "n_head": 3},
}
needs_native = pytest.mark.skipif(
    not has_bf16() or bool(build_error("decode")), reason="no AVX512_BF16, or no g++"
)


def network(name: str) -> GPT:
    """With large random weights, which bf16 has exactly."""
    torch.manual_seed(0)
    shape = {"block_size": 64, "vocab_size": 97, "n_layer": 3, "n_head": 4, "n_embd": 128}
    model = GPT(GPTConfig(**shape | NETWORKS[name])).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_((p + 0.1 * torch.randn_like(p)).bfloat16())
    return model


def decode_all(decoder: NativeDecoder, idx: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """Logits (B, T, V) for idx (B, T), read token by token, at positions from `starts` (B,) on. Keys and
    values of the positions before are zero."""
    cache = KVCache(decoder.config, len(idx), 48, dtype=decoder.cache_dtype)
    steps = [decoder(idx[:, t : t + 1], starts[:, None] + t, cache) for t in range(idx.size(1))]
    return torch.stack(steps, dim=1)


def full_logits(model: GPT, idx: torch.Tensor) -> torch.Tensor:
    """Logits (B, T, V) from one forward pass in fp32."""
    return model.logits(model.hidden_states(idx))


def dequantized(model: GPT) -> GPT:
    """In fp32, with the weights that 8 bits leave."""
    rounded = copy.deepcopy(model)
    for layer in rounded.modules():
        if isinstance(layer, torch.nn.Linear):
            small = Int8Linear(copy.deepcopy(layer).bfloat16())
            weight = small.weight.float() * small.scale.float()[:, None]
            layer.weight = torch.nn.Parameter(weight)  # of its own, if wte shares it
    return rounded


@needs_native
@pytest.mark.parametrize("int8", [False, True], ids=["bf16", "8 bits"])
@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_logits_are_those_of_a_forward_pass_in_fp32(name, int8):
    model = network(name)
    idx = torch.randint(97, (3, 40))
    ready = optimize_for_inference(copy.deepcopy(model), torch.bfloat16, int8)
    assert isinstance(ready.decode, NativeDecoder)
    result = decode_all(ready.decode, idx, torch.zeros(3, dtype=torch.long))
    exact = full_logits(dequantized(model) if int8 else model, idx)
    # torch's own bf16 is farther away, as it rounds more than the inputs of products
    in_bf16 = full_logits((dequantized(model) if int8 else copy.deepcopy(model)).bfloat16(), idx).float()
    error, limit = (result - exact).norm() / exact.norm(), (in_bf16 - exact).norm() / exact.norm()
    assert error < 0.8 * limit and limit < 0.1


@needs_native
@torch.no_grad()
def test_scores_whose_exponentials_are_too_large_for_fp32():
    model = network("gpt2")
    del model.transformer.h[1:]
    model.config.n_layer = 1
    model.transformer.h[0].attn.c_attn.weight[:256] *= 16  # of queries and keys: scores up to 1,000
    idx = torch.randint(97, (3, 40))
    ready = optimize_for_inference(copy.deepcopy(model), torch.bfloat16)
    result, exact = decode_all(ready.decode, idx, torch.zeros(3, dtype=torch.long)), full_logits(model, idx)
    assert (result - exact).norm() < 0.06 * exact.norm()


@needs_native
@pytest.mark.parametrize("int8", [False, True], ids=["bf16", "8 bits"])
@pytest.mark.parametrize("name", ["gpt2", "modern", "mlp_width 688"])
@torch.no_grad()
def test_a_sequence_gets_the_same_numbers_alone_and_in_a_batch_of_any_size(name, int8):
    ready = optimize_for_inference(network(name), torch.bfloat16, int8)
    idx, starts = torch.randint(97, (14, 20)), torch.arange(14)
    together = decode_all(ready.decode, idx, starts)
    threads = torch.get_num_threads()
    for rows in (1, 2, 3, 5, 6, 7, 13):
        torch.set_num_threads(1 + rows % 2)
        some = decode_all(ready.decode, idx[-rows:], starts[-rows:])
        torch.set_num_threads(threads)
        assert torch.equal(some, together[-rows:])


@needs_native
@torch.no_grad()
def test_one_position_for_all_rows_and_rows_that_the_batch_does_not_use():
    ready = optimize_for_inference(network("modern"), torch.bfloat16)
    idx = torch.randint(97, (4, 20))
    expected = decode_all(ready.decode, idx, torch.zeros(4, dtype=torch.long))
    cache = KVCache(ready.config, 6, 32, dtype=torch.bfloat16)
    cache.kv.fill_(torch.nan)  # what is not written is not read
    cache.kv[..., :1, ready.config.head_dim // 2 :] = 0  # the offset half of the first key
    for t in range(20):
        assert torch.equal(ready.decode(idx[:, t : t + 1], torch.tensor([[t]]), cache), expected[:, t])
    assert cache.kv[:, :, 4:, :, 1:].isnan().all() and cache.kv[..., 21:, :].isnan().all()


@needs_native
def test_positions_outside_of_the_cache_are_refused():
    ready = optimize_for_inference(network("modern"), torch.bfloat16)
    cache, ids = KVCache(ready.config, 2, 32, dtype=torch.bfloat16), torch.zeros(2, 1, dtype=torch.long)
    for rows, position in ((2, 32), (2, -1), (3, 0)):
        with pytest.raises(IndexError):
            ready.decode(ids[:1].expand(rows, 1), torch.tensor([[position]]), cache)
    ready.config.block_size = 20
    with pytest.raises(IndexError):
        ready.decode(ids, torch.tensor([[20]]), cache)
    with pytest.raises(ValueError, match="bfloat16"):
        ready.decode(ids, torch.tensor([[1]]), KVCache(ready.config, 2, 32))


@needs_native
@torch.no_grad()
def test_nan_reaches_the_logits():
    for name in ("gpt2", "modern", "exact gelu, no biases"):
        model = network(name)
        model.transformer.h[1].attn.c_attn.weight.fill_(torch.nan)
        ready = optimize_for_inference(model, torch.bfloat16)
        zeros = torch.zeros(1, 3, dtype=torch.long)
        assert decode_all(ready.decode, zeros, zeros[:, 0]).isnan().all()


@needs_native
def test_a_model_that_is_dropped_is_freed_at_once():
    gc.disable()
    try:
        model = optimize_for_inference(network("gpt2"), torch.bfloat16)
        alive = weakref.ref(model)
        del model
        assert alive() is None
    finally:
        gc.enable()


@needs_native
@torch.no_grad()
def test_weights_are_not_copied():
    model = GPT(GPTConfig(block_size=32, vocab_size=128, n_layer=2, n_head=2, n_embd=64, tied=False))
    for int8 in (False, True):
        ready = optimize_for_inference(copy.deepcopy(model), torch.bfloat16, int8)
        weights = {layer.weight.data_ptr() for layer in ready.modules() if hasattr(layer, "bias")}
        copied = {tensor.data_ptr() for tensor in ready.decode.tensors if tensor.dim() == 2} - weights
        assert not copied


def test_other_networks_and_dtypes_decode_with_torch():
    shape = {"block_size": 32, "vocab_size": 96, "n_layer": 1}
    for n_head, n_embd in ((4, 64), (1, 48), (2, 96)):  # heads of 16 and 48 channels
        model = GPT(GPTConfig(**shape, n_head=n_head, n_embd=n_embd))
        assert not supports(model.config, torch.bfloat16)
        batch = DecodingBatch(optimize_for_inference(model, torch.bfloat16), 1)
        assert batch.cache.kv.dtype == torch.float32
    model = GPT(GPTConfig(**shape, n_head=2, n_embd=64))
    assert not supports(model.config, torch.float32)
    assert not hasattr(optimize_for_inference(model, torch.float32), "decode")


SCRIPT = """
import torch
from distrogpt.inference.decoder import optimize_for_inference, stream
from distrogpt.inference.sampling import SamplingParams
from model import GPT, GPTConfig
torch.manual_seed(0)
model = GPT(GPTConfig(block_size=32, vocab_size=96, n_layer=1, n_head=2, n_embd=64))
model = optimize_for_inference(model, torch.bfloat16)
steps = stream(model, [torch.tensor([1])], SamplingParams(0.0), torch.zeros(1, 5))
print(len(list(steps)), type(getattr(model, "decode", None)).__name__)
"""


def run_script(**environment: str) -> subprocess.CompletedProcess:
    environment = {**ENVIRONMENT, "PYTHONPATH": str(REPO), **environment}
    command = [sys.executable, "-c", SCRIPT]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


@needs_native
def test_it_is_compiled_once(tmp_path):
    modified = []
    for _ in range(2):
        done = run_script(HOME=str(tmp_path))
        assert (done.stdout, done.stderr) == ("5 NativeDecoder\n", "")
        (compiled,) = (tmp_path / ".cache" / "distrogpt").iterdir()
        modified.append(compiled.stat().st_mtime_ns)
    assert modified[0] == modified[1]
    compiled.write_bytes(b"damaged")  # compiled again
    assert run_script(HOME=str(tmp_path)).stdout == "5 NativeDecoder\n"


@pytest.mark.skipif(not has_bf16(), reason="no AVX512_BF16")
@pytest.mark.parametrize("fault", ["no compiler", "a compiler that fails", "a folder that cannot be made"])
def test_without_a_compiler_torch_decodes_and_a_note_says_why(fault, tmp_path):
    home, path = tmp_path / "home", tmp_path / "bin"
    home.mkdir()
    path.mkdir()
    if fault == "a compiler that fails":
        (path / "g++").write_text("#!/bin/sh\n[ $1 = --version ] || { echo unknown flag >&2; exit 1; }\n")
        (path / "g++").chmod(0o755)
    if fault == "a folder that cannot be made":
        (home / ".cache").write_text("a file")
        path = os.environ["PATH"]
    done = run_script(HOME=str(home), PATH=str(path), CXX="")
    assert done.stdout == "5 NoneType\n"
    (note,) = done.stderr.splitlines()
    word = {"no compiler": "apt install g++", "a compiler that fails": "unknown flag"}.get(fault, ".cache")
    assert note.startswith("note     decoding is slower than it could be: ") and word in note
