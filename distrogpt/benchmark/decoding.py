"""Time prefill and decoding, of one sequence and of a batch, in the compute dtype and with 8-bit weights."""

import copy
import statistics
import time
from collections import defaultdict
from typing import Any

import torch

from distrogpt.benchmark.timing import (
    dtype_name,
    open_data,
    quartiles,
    ratio,
    seconds_of,
    spread,
    synchronize,
)
from distrogpt.benchmark.training import (
    baseline_generate,
    baseline_name,
    describe_network,
    new_weights,
    print_other_side,
)
from distrogpt.errors import UserError
from distrogpt.hardware import measured_bandwidth
from distrogpt.inference.decoder import optimize_for_inference, stream
from distrogpt.inference.sampling import SamplingParams
from distrogpt.kernels.compile import compile_error
from distrogpt.runtime import Runtime
from distrogpt.settings import BenchConfig
from model import GPT

PROMPT = 16  # tokens before the timed ones


def time_stream(model: GPT, idx: torch.Tensor, n_tokens: int, B: int, runtime: Runtime) -> tuple[float, ...]:
    """Seconds to the first token, of the tokens after the second (in which a GPU records its CUDA graph), and
    in total."""
    synchronize(runtime)
    times = [time.perf_counter()]
    tokens = stream(model, idx, SamplingParams(0.8, 200), torch.rand(B, n_tokens))
    for number, _ in enumerate(tokens, 1):
        if number in (1, 2, n_tokens):
            synchronize(runtime)
            times.append(time.perf_counter())
    return times[1] - times[0], times[-1] - times[-2], times[-1] - times[0]


def num_new_tokens(config: BenchConfig) -> int:
    """The number of new tokens per sample. Raises UserError if block_size is too small for it."""
    room = config.block_size - PROMPT
    n = min(256, room) if config.max_new_tokens is None else config.max_new_tokens
    if not 3 <= n <= room:
        raise UserError(
            f"block_size={config.block_size} leaves {room} tokens after a prompt of {PROMPT}, too few for "
            f"max_new_tokens={config.max_new_tokens or 3}; raise --block_size or lower --max_new_tokens"
        )
    return n


@torch.no_grad()
def bench_generate(config: BenchConfig, runtime: Runtime) -> dict[str, Any]:
    """Measure tokens per second of prefill and decoding with random weights, and of the baseline if given."""
    n_tokens = num_new_tokens(config)
    model = new_weights(config, open_data(config))
    compiled = config.compile is True
    if compiled and (error := compile_error(runtime.device)):
        print(f"note     {error}")
        compiled = False
    models = {}
    for name, int8 in {"ours": False, "ours, int8": True}.items():
        replica = copy.deepcopy(model).to(runtime.device)
        models[name] = optimize_for_inference(replica, runtime.dtype, int8, compiled)
    vocab_size, half = model.config.vocab_size, config.block_size // 2
    if config.against:
        baseline, their_runtime = baseline_generate(config, n_tokens, vocab_size, runtime)
    prompt = torch.randint(vocab_size, (1, half), device=runtime.device)
    short = prompt[:, :PROMPT]
    runs = [(name, B) for name in models for B in sorted({1, config.num_samples})]
    decode, prefill = defaultdict(list), defaultdict(list)  # tokens/s, by run
    total = {"ours": [], "other": []}  # tokens/s of one sequence, prompt included
    bandwidths = []
    for _ in range(config.rounds + 1):
        for name, B in runs:
            first, _, _ = time_stream(models[name], prompt, 1, 1, runtime)
            _, rest, seconds = time_stream(models[name], short, n_tokens, B, runtime)
            prefill[name, B].append(half / first)
            decode[name, B].append(B * (n_tokens - 2) / rest)
            if (name, B) == ("ours", 1):
                total["ours"].append(n_tokens / seconds)
        if config.against:
            total["other"].append(n_tokens / seconds_of(baseline, short, runtime=runtime))
        bandwidths.append(measured_bandwidth(runtime.device))
    bandwidth = statistics.median(bandwidths)
    what = f"{describe_network(config)}; {dtype_name(runtime.dtype)}{'; compiled' if compiled else ''}"
    print(f"model    {model.get_num_params(False):,} parameters, random weights: {what}")
    if config.against:
        print_other_side(config, their_runtime, None)
    print(f"text     a prompt of {PROMPT} tokens, then {n_tokens} new tokens")
    print(f"memory   {bandwidth / 1e9:,.0f} GB/s read bandwidth, measured")
    n_weights = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, torch.nn.Linear))
    result: dict[str, Any] = {"bandwidth": bandwidth, "runs": []}
    for name, B in runs:  # [1:] below: the first round was a warm-up
        rate, prefill_rate = spread(decode[name, B][1:]), statistics.median(prefill[name, B][1:])
        itemsize = 1 if "int8" in name else runtime.dtype.itemsize
        fraction = rate["median"] / B * n_weights * itemsize / bandwidth  # if weights are read once per token
        run = {"name": name, "batch": B, "decode": rate, "share": fraction, "prefill": prefill_rate}
        result["runs"].append(run)
        print(
            f"{name + ',':11} batch {B:2}: decode {rate['median']:7.1f} tokens/s {quartiles(rate, 1)}, "
            f"{fraction:.0%} of the bandwidth limit; prefill {prefill_rate:,.0f} tokens/s"
        )
    if config.against:
        result["whole"] = {name: spread(rates[1:]) for name, rates in total.items()}
        result["ratio"] = gain = ratio(total["ours"][1:], total["other"][1:])  # of rates, not of seconds
        ours, other = (rates["median"] for rates in result["whole"].values())
        name = baseline_name(config)
        print(f"total    ours {ours:.1f} tokens/s, {name} {other:.1f} tokens/s, including the prompt")
        print(f"ratio    {gain['median']:.1f} times {name}'s speed {quartiles(gain, 1)}")
    return result
