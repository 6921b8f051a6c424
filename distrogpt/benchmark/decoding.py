"""Time prefill and decoding, of one sequence and of a batch, in the compute dtype and with 8-bit weights."""

import copy
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import torch

from distrogpt.benchmark import llama_cpp
from distrogpt.benchmark.llama_cpp import Rate
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
OURS, INT8 = "ours", "ours, int8"
Rates = dict[str, dict[tuple[str, int], list[float]]]  # tokens/s of each round, by name and batch size


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


def decoders(config: BenchConfig, model: GPT, runtime: Runtime) -> tuple[dict[str, GPT], bool]:
    """The model in the compute dtype and with 8-bit weights, by name, and whether they are compiled."""
    compiled = config.compile is True
    if compiled and (error := compile_error(runtime.device)):
        print(f"note     {error}")
        compiled = False
    models = {}
    for name, int8 in {OURS: False, INT8: True}.items():
        replica = copy.deepcopy(model).to(runtime.device)
        models[name] = optimize_for_inference(replica, runtime.dtype, int8, compiled)
    return models, compiled


@contextmanager
def baselines(config: BenchConfig, model: GPT, n_tokens: int, runtime: Runtime) -> Iterator[dict[str, Rate]]:
    """The rates of the baseline, by the names of our models that they are compared with; prints what it is.
    llama.cpp's are of decoding alone; others include the prompt."""
    if config.against == llama_cpp.NAME:
        with llama_cpp.llama_cpp_rates(model, n_tokens, runtime) as rates:
            yield dict(zip((OURS, INT8), rates.values(), strict=True))
    elif config.against:
        generate, theirs = baseline_generate(config, n_tokens, model.config.vocab_size, runtime)
        print_other_side(config, theirs, None)
        yield {OURS: lambda prompt: n_tokens / seconds_of(generate, prompt, runtime=runtime)}
    else:
        yield {}


def time_rounds(
    config: BenchConfig, models: dict[str, GPT], others: dict[str, Rate], runtime: Runtime
) -> tuple[Rates, float]:
    """Tokens per second in each round but the first, a warm-up, by what was timed: prefill, decode, both
    (total), or the baseline beside one sequence (other). And the median of the memory bandwidth."""
    n_tokens, half = num_new_tokens(config), config.block_size // 2
    prompt = torch.randint(models[OURS].config.vocab_size, (1, half), device=runtime.device)
    short, bandwidths = prompt[:, :PROMPT], []
    rates: Rates = {what: defaultdict(list) for what in ("prefill", "decode", "total", "other")}
    for number in range(config.rounds + 1):
        for name, B in product(models, sorted({1, config.num_samples})):
            first, _, _ = time_stream(models[name], prompt, 1, 1, runtime)
            _, rest, seconds = time_stream(models[name], short, n_tokens, B, runtime)
            other = others[name](short) if B == 1 and name in others else None
            if number:
                rates["prefill"][name, B].append(half / first)
                rates["decode"][name, B].append(B * (n_tokens - 2) / rest)
                rates["total"][name, B].append(B * n_tokens / seconds)
                rates["other"][name, B].append(other)
        bandwidths.append(measured_bandwidth(runtime.device))
    return rates, statistics.median(bandwidths)


def compare(config: BenchConfig, rates: Rates, runtime: Runtime) -> dict[str, Any]:
    """Print our rates for one sequence beside the baseline's. Returns them and their ratios."""
    name = baseline_name(config)
    if config.against != llama_cpp.NAME:
        ours, other = rates["total"][OURS, 1], rates["other"][OURS, 1]
        whole, gain = {"ours": spread(ours), "other": spread(other)}, ratio(ours, other)  # of rates
        shown = f"ours {whole['ours']['median']:.1f} tokens/s, {name} {whole['other']['median']:.1f} tokens/s"
        print(f"total    {shown}, including the prompt")
        print(f"ratio    {gain['median']:.1f} times {name}'s speed {quartiles(gain, 1)}")
        return {"whole": whole, "ratio": gain}
    result = {}
    for model, file_type in {OURS: llama_cpp.FILE_TYPES[runtime.dtype], INT8: "q8_0"}.items():
        ours, other = rates["decode"][model, 1], rates["other"][model, 1]
        sides, gain = {"ours": spread(ours), "other": spread(other)}, ratio(ours, other)
        shown = " and ".join(f"{rate['median']:.1f} {quartiles(rate, 1)}" for rate in sides.values())
        print(f"ratio    {gain['median']:.2f} times {name}'s speed in {file_type} {quartiles(gain)}: {shown}")
        result[file_type] = {**sides, "ratio": gain}
    return {name: result}


@torch.no_grad()
def bench_generate(config: BenchConfig, runtime: Runtime) -> dict[str, Any]:
    """Measure tokens per second of prefill and decoding with random weights, and of the baseline if given."""
    n_tokens = num_new_tokens(config)
    model = new_weights(config, open_data(config))
    if config.against == llama_cpp.NAME:
        llama_cpp.check_llama_cpp(model.config, runtime)
    models, compiled = decoders(config, model, runtime)
    what = f"{describe_network(config)}; {dtype_name(runtime.dtype)}{'; compiled' if compiled else ''}"
    print(f"model    {model.get_num_params(False):,} parameters, random weights: {what}")
    with baselines(config, model, n_tokens, runtime) as others:
        rates, bandwidth = time_rounds(config, models, others, runtime)
    print(f"text     a prompt of {PROMPT} tokens, then {n_tokens} new tokens")
    print(f"memory   {bandwidth / 1e9:,.0f} GB/s read bandwidth, measured")
    n_weights = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, torch.nn.Linear))
    result: dict[str, Any] = {"bandwidth": bandwidth, "runs": []}
    for (name, B), values in rates["decode"].items():
        rate, prefill_rate = spread(values), statistics.median(rates["prefill"][name, B])
        itemsize = 1 if name == INT8 else runtime.dtype.itemsize
        fraction = rate["median"] / B * n_weights * itemsize / bandwidth  # if weights are read once per token
        run = {"name": name, "batch": B, "decode": rate, "share": fraction, "prefill": prefill_rate}
        result["runs"].append(run)
        print(
            f"{name + ',':11} batch {B:2}: decode {rate['median']:7.1f} tokens/s {quartiles(rate, 1)}, "
            f"{fraction:.0%} of the bandwidth limit; prefill {prefill_rate:,.0f} tokens/s"
        )
    return result | (compare(config, rates, runtime) if config.against else {})
