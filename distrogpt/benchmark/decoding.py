"""Time prefill and decoding: one sequence and several, in the compute dtype and with 8-bit weights."""

import copy
import statistics
import time
from typing import Any

import torch

from distrogpt.benchmark.baselines import baseline_generate
from distrogpt.benchmark.timing import open_data, quartiles, ratio, seconds_of, spread, synchronize
from distrogpt.benchmark.training import new_weights
from distrogpt.errors import UserError
from distrogpt.hardware import measured_bandwidth
from distrogpt.inference.decoder import optimize_for_inference, stream
from distrogpt.inference.sampling import SamplingParams
from distrogpt.kernels.compile import compile_error
from distrogpt.runtime import Runtime
from distrogpt.settings import BenchConfig
from model import GPT

PROMPT = 16  # tokens before the timed ones
Run = tuple[str, int]  # name and batch


def time_stream(
    model: GPT, idx: torch.Tensor, max_new_tokens: int, n: int, runtime: Runtime
) -> tuple[float, float, float]:
    """Seconds to the first token, from the second to the last, and in total. A GPU records its CUDA graph at
    the second one."""
    synchronize(runtime)
    times = [time.perf_counter()]
    tokens = stream(model, idx, SamplingParams(0.8, 200), torch.rand(n, max_new_tokens))
    for number, _ in enumerate(tokens, 1):
        if number in (1, 2, max_new_tokens):
            synchronize(runtime)
            times.append(time.perf_counter())
    return times[1] - times[0], times[-1] - times[-2], times[-1] - times[0]


def num_new_tokens(config: BenchConfig) -> int:
    """Tokens of a sample. Raises UserError if block_size is too small for them."""
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
    """Tokens per second of prefill and decoding with random weights; and the baseline's if there is one."""
    n_tokens = num_new_tokens(config)
    model = new_weights(config, open_data(config))
    compiled = config.compile is True
    if compiled and (error := compile_error(runtime.device)):
        print(f"note     {error}")
        compiled = False
    models, baseline = {}, None
    for name, int8 in {"ours": False, "ours, int8": True}.items():
        replica = copy.deepcopy(model).to(runtime.device)
        models[name] = optimize_for_inference(replica, runtime.dtype, int8, compiled)
    vocab_size, half = model.config.vocab_size, config.block_size // 2
    if config.against:
        baseline = baseline_generate(config, n_tokens, vocab_size, runtime)
    prompt = torch.randint(vocab_size, (1, half), device=runtime.device)
    short = prompt[:, :PROMPT]
    runs = [(name, B) for name in models for B in sorted({1, config.num_samples})]
    decode: dict[Run, list[float]] = {run: [] for run in runs}  # tokens/s
    prefill: dict[Run, list[float]] = {run: [] for run in runs}  # tokens/s
    total: dict[str, list[float]] = {"ours": [], "other": []}  # tokens/s of one sequence, prompt included
    bandwidths = []
    for number in range(config.rounds + 1):
        if number == 1:  # the first round was a warm-up
            for rates in (*decode.values(), *prefill.values(), *total.values()):
                rates.clear()
        for run in runs:
            name, B = run
            first, _, _ = time_stream(models[name], prompt, 1, 1, runtime)
            _, rest, seconds = time_stream(models[name], short, n_tokens, B, runtime)
            prefill[run].append(half / first)
            decode[run].append(B * (n_tokens - 2) / rest)
            if run == ("ours", 1):
                total["ours"].append(n_tokens / seconds)
        if baseline:
            total["other"].append(n_tokens / seconds_of(baseline, short, runtime=runtime))
        bandwidths.append(measured_bandwidth(runtime.device))
    bandwidth = statistics.median(bandwidths)
    size = f"{model.get_num_params(False):,}"
    print(f"model    {size} parameters, random; prompt {PROMPT}, then {n_tokens} tokens")
    print(f"memory   read at {bandwidth / 1e9:,.0f} GB/s")
    n_weights = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, torch.nn.Linear))
    result: dict[str, Any] = {"bandwidth": bandwidth, "runs": []}
    for name, B in runs:
        limit = bandwidth / n_weights / (1 if "int8" in name else runtime.dtype.itemsize)
        result["runs"].append(run_result(name, B, decode[name, B], prefill[name, B], limit))
    if baseline:
        result["whole"] = {name: spread(rates) for name, rates in total.items()}
        result["ratio"] = gain = ratio(total["ours"], total["other"])  # of rates, not of seconds
        ours, other = (rates["median"] for rates in result["whole"].values())
        print(f"whole    ours {ours:.1f} tokens/s, {config.against} {other:.1f}, prompt included")
        print(f"ratio    {gain['median']:.1f} times theirs {quartiles(gain, 1)}")
    return result


def run_result(name: str, B: int, decode: list[float], prefill: list[float], limit: float) -> dict[str, Any]:
    """Print and return the rates of B sequences; `limit` is the tokens/s of one at which each weight is read
    once per token."""
    rate, prefill_rate = spread(decode), statistics.median(prefill)
    fraction = rate["median"] / B / limit
    print(
        f"{name + ',':11} batch {B:2}: decode {rate['median']:7.1f} tokens/s {quartiles(rate, 1)}, "
        f"{fraction:.0%} of the bandwidth's limit; prefill {prefill_rate:,.0f} tokens/s"
    )
    return {"name": name, "batch": B, "decode": rate, "share": fraction, "prefill": prefill_rate}
