"""llama.cpp as a baseline of bench.py --generate: our network as a GGUF file, in llama-cpp-python."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from distrogpt.data.tokenizer import IdTokenizer
from distrogpt.errors import UserError
from distrogpt.huggingface.gguf import check_network, write_gguf
from distrogpt.runtime import Runtime
from model import GPT, GPTConfig

NAME = "llama.cpp"
FILE_TYPES = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}
Rate = Callable[[torch.Tensor], float]  # of a prompt (1, T): new tokens per second


def check_llama_cpp(shape: GPTConfig, runtime: Runtime) -> None:
    """Raises UserError if llama.cpp cannot be timed."""
    if runtime.device.type != "cpu":
        raise UserError(f"against={NAME} is timed on CPUs only; add --device=cpu")
    for module, package in {"gguf": "gguf", "llama_cpp": "llama-cpp-python"}.items():
        if find_spec(module) is None:
            raise UserError(f"against={NAME} needs {package}; run: pip install {package}")
    check_network(shape, "time one")


@contextmanager
def llama_cpp_rates(model: GPT, n_tokens: int, runtime: Runtime) -> Iterator[dict[str, Rate]]:
    """For each file type that is timed, that of the compute dtype and q8_0, a function that decodes n_tokens
    tokens and returns its rate after the second one. Prints which llama.cpp it is."""
    from llama_cpp import Llama, __version__

    threads = torch.get_num_threads()
    options = {"n_threads": threads, "n_threads_batch": threads, "n_gpu_layers": 0, "seed": 0}
    options |= {"n_ctx": model.config.block_size, "n_batch": 64, "verbose": False}
    options["flash_attn"] = True  # as in llama.cpp's own programs; without it, decoding is a tenth slower
    with TemporaryDirectory() as folder, ExitStack() as stack:
        rates: dict[str, Rate] = {}
        for file_type in (FILE_TYPES[runtime.dtype], "q8_0"):
            path = Path(folder, f"{file_type}.gguf")
            write_gguf(
                path, model.config, model.state_dict(), IdTokenizer(model.config.vocab_size), file_type
            )
            llama = stack.enter_context(closing(Llama(str(path), **options)))
            rates[file_type] = lambda prompt, llama=llama: decoding_rate(llama, prompt, n_tokens)
        print(f"{NAME} {' and '.join(rates)}, {threads} threads, llama-cpp-python {__version__}")
        yield rates


def decoding_rate(llama: object, prompt: torch.Tensor, n_tokens: int) -> float:
    """Tokens per second after the second new one, as time_stream measures ours."""
    llama.reset()
    tokens = llama.generate(prompt[0].tolist(), top_k=200, temp=0.8, top_p=1.0, min_p=0.0, repeat_penalty=1.0)
    for _ in range(2):
        next(tokens)
    begin = time.perf_counter()
    for _ in range(n_tokens - 2):
        next(tokens)
    return (n_tokens - 2) / (time.perf_counter() - begin)
