"""Batched decoding: a sequence gets the same numbers alone, in a batch, and if others join and leave."""

import copy
import random

import pytest
import torch
from torch import nn

from distrogpt.inference.decoder import DecodingBatch, optimize_for_inference, stream
from distrogpt.inference.sampling import SamplingParams, uniform_noise
from distrogpt.kernels.quantized import Int8Linear, PackedLinear
from model import GPT, GPTConfig


@pytest.fixture
def exact():
    """Exact fp32 products, also if training in this process has changed that."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="plain products depend on the batch")
@pytest.mark.parametrize("graph", [False, True], ids=["", "with the rows of CUDA graphs"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sequences_that_join_and_leave_continue_as_they_would_alone(exact, graph, dtype):
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this CPU has no bf16 instructions")
    torch.manual_seed(1)
    shape = {"block_size": 32, "vocab_size": 50, "n_layer": 2, "n_head": 4, "n_embd": 128, "n_kv_head": 2}
    model = GPT(GPTConfig(**shape, rotary=True, key_offset=True))
    model = optimize_for_inference(model, dtype)
    record_graph = (lambda function, *inputs: function) if graph else None
    rng, batch = random.Random(1), DecodingBatch(model, 6, record_graph=record_graph)
    running, finished = [], []  # the prompt of each row, and its logits so far
    with torch.no_grad():
        for _ in range(150):
            for row in reversed(range(len(running))):
                if rng.random() < 0.04:
                    batch.remove_sequence(row)
                    finished.append(running[row])
                    running[row] = running[-1]
                    running.pop()
            n = rng.choice([0, 0, 0, 1, 2])
            if n and len(running) + n <= 6:
                prompt = [rng.randrange(50) for _ in range(rng.randint(1, 40))]
                batch.add_sequences([torch.tensor(prompt)], n)
                running += [(prompt, []) for _ in range(n)]
            if running:
                logits = batch.next_logits().clone()
                batch.append(logits.argmax(dim=-1, keepdim=True))
                for (_, history), row_logits in zip(running, logits, strict=True):
                    history.append(row_logits)
        assert {shapes[0] for shapes in batch.graphs} <= {1, 2, 4, 6}
        lengths = []
        for prompt, history in finished + running:
            alone = DecodingBatch(model, 1)
            alone.add_sequences([torch.tensor(prompt)])
            for row_logits in history:
                assert torch.equal(alone.next_logits()[0], row_logits)  # to the last bit
                alone.append(row_logits.argmax()[None, None])
            lengths.append(len(history))
    assert len(lengths) > 10 and max(lengths) > 40 and graph == bool(batch.graphs)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="plain products depend on the batch")
@pytest.mark.parametrize(
    "int8, dtype", [(False, torch.float32), (False, torch.bfloat16), (True, torch.bfloat16)]
)
def test_logits_of_a_sequence_are_the_same_alone_and_in_a_batch(int8, dtype):
    """To the last bit: wide layers, a large vocabulary, prompts of all lengths, past the end of the block."""
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this CPU has no bf16 instructions")
    torch.manual_seed(0)
    shape = {"block_size": 32, "vocab_size": 3000, "n_layer": 2, "n_head": 6, "n_embd": 384, "n_kv_head": 2}
    model = optimize_for_inference(GPT(GPTConfig(**shape)), dtype, int8)
    prompts = [torch.randint(3000, (length,)).tolist() for length in (1, 5, 17, 32)]
    uniforms, prompts = uniform_noise(0, 2, 40), list(map(torch.tensor, prompts))
    together = list(stream(model, prompts, SamplingParams(), uniforms.repeat(4, 1)))
    for number, prompt in enumerate(prompts):
        for i in range(2):
            alone = stream(model, [prompt], SamplingParams(), uniforms[i][None])
            for (ids, logits), (all_ids, all_logits) in zip(alone, together, strict=True):
                row = 2 * number + i
                assert torch.equal(ids[0], all_ids[row]) and torch.equal(logits[0], all_logits[row])


@pytest.mark.parametrize(("int8", "dtype"), [(False, "bfloat16"), (True, "bfloat16"), (True, "float32")])
def test_optimize_for_inference_replaces_all_linear_layers(int8, dtype):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, vocab_size=96, n_layer=2, n_head=4, n_embd=64)).eval()
    optimized = optimize_for_inference(copy.deepcopy(model), getattr(torch, dtype), int8)
    layers, idx = {type(module) for module in optimized.modules()}, torch.randint(96, (3, 32))
    assert (Int8Linear if int8 else PackedLinear) in layers and nn.Linear not in layers
    with torch.no_grad():
        exact, result = model(idx)[0], optimized(idx)[0].float()
    assert (result - exact).norm() < 0.03 * exact.norm()


@pytest.mark.parametrize("int8", [False, True])
def test_generate_of_an_optimized_model_gives_the_same_greedy_tokens(int8):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, vocab_size=96, n_layer=2, n_head=4, n_embd=64))
    for parameter in model.parameters():
        parameter.data *= 5  # so that earlier tokens matter
    model, idx = optimize_for_inference(model, torch.float32, int8), torch.randint(96, (2, 5))
    steps = stream(model, idx, SamplingParams(0.0), torch.zeros(2, 30))
    greedy = torch.cat([ids for ids, _ in steps], dim=1)
    assert len(greedy.unique()) > 5 and torch.equal(model.generate(idx, 30, temperature=0)[:, 5:], greedy)
