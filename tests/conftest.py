"""What the tests share: running a script as a user does, and a small dataset of real text."""

import argparse
import contextlib
import importlib.util
import io
import itertools
import json
import os
import random
import runpy
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from warm import POSSIBLE, Started

from configurator import read_settings
from distrogpt import settings

REPO = Path(__file__).resolve().parents[1]
NANOGPT = Path(__file__).parent / "fixtures" / "nanogpt"  # written by nanoGPT itself: see its README
SHARED = REPO.parent / "shared" / "data"
# the commands with the classes of their settings, and the scripts of data/
COMMANDS = {f"{name.removesuffix('Config').lower()}.py": cls for name, cls in vars(settings).items()
            if name.endswith("Config")}  # fmt: skip
PREPARE = sorted(path.relative_to(REPO).as_posix() for path in (REPO / "data").glob("*/prepare.py"))
TINY = (
    "--device=cpu --dtype=float32 --compile=False --n_layer=1 --n_head=2 --n_embd=16 --block_size=16 "
    "--batch_size=4 "
    "--gradient_accumulation_steps=1 --eval_iters=2 --eval_interval=10 --log_interval=5 --warmup_iters=2 "
    "--learning_rate=1e-2 --max_iters=20 --loss_plot=False"
).split()

MODERN = (
    "--norm=rmsnorm", "--rotary=True", "--qk_norm=True", "--activation=relu2", "--n_kv_head=1",
    "--tied=False", "--logit_softcap=15", "--embedding_skip=True", "--zero_init=True", "--optimizer=muon",
    "--key_offset=True", "--embedding_lr=0.03", "--lr_schedule=wsd", "--sampling=epochs",
)  # fmt: skip

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the hub's client is imported
os.environ["OMP_NUM_THREADS"] = "1"  # tiny models gain nothing from more, and suffer on a busy machine
torch.set_num_threads(1)
ENVIRONMENT = dict(os.environ)


def load_docs_script(name: str) -> ModuleType:
    """A script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", REPO / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*words: object, cwd: Path = REPO, env: dict[str, str] | None = None, **more):
    """Run a script of the repository with this Python; its status, stdout and stderr."""
    command = [sys.executable, str(REPO / str(words[0])), *map(str, words[1:])]
    return subprocess.run(
        command,
        cwd=cwd,
        env={**ENVIRONMENT, **(env or {})},
        text=True,
        timeout=120,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more},
    )


def run_warm(*words: object, cwd: Path = REPO, env: dict[str, str] | None = None):
    """The same in a process that has torch loaded already, which spares 2 s."""
    process = start_warm(*words, cwd=cwd, env=env)
    output, errors = process.communicate(timeout=120)
    return subprocess.CompletedProcess(words, process.returncode, output, errors)


def train_here(*flags: object) -> str:
    """Train within this process, which spares a start; what was printed."""
    from train import TrainConfig, train

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        train(read_settings(TrainConfig, [str(flag) for flag in flags]))
    return printed.getvalue()


def prepare_here(script: str, *words: object) -> subprocess.CompletedProcess:
    """Run a prepare.py within this process, which spares a start."""
    out, err = io.StringIO(), io.StringIO()
    status: Any = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(REPO / script), *map(str, words)])
        patch.setattr(sys, "path", list(sys.path))
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                runpy.run_path(str(REPO / script), run_name="__main__")
            except SystemExit as end:
                status = end.code
    return subprocess.CompletedProcess(words, status, out.getvalue(), err.getvalue())


class Terminal(io.StringIO):
    """Takes what is printed, and says that someone sees it."""

    def isatty(self) -> bool:
        return True


def run_here(
    script: str, *flags: object, cwd: Path | None = None, terminal: bool = False
) -> subprocess.CompletedProcess:
    """Run train.py, sample.py, bench.py, ablate.py or export.py within this process, which spares a start; as
    if on a terminal, if asked."""
    import ablate
    import bench
    import export
    import sample
    import train
    from distrogpt import settings
    from distrogpt.errors import cli_errors, exit_process

    def train_as_command(config: settings.TrainConfig) -> None:
        stopped_by = train.train(config).stopped_by
        exit_process(128 + stopped_by if stopped_by else 0)

    main, kind = {
        "train.py": (train_as_command, settings.TrainConfig),
        "sample.py": (sample.main, settings.SampleConfig),
        "bench.py": (bench.bench, settings.BenchConfig),
        "ablate.py": (ablate.ablate, settings.AblateConfig),
        "export.py": (export.export, settings.ExportConfig),
    }[script]
    out, err = (Terminal() if terminal else io.StringIO() for _ in range(2))
    status: Any = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd or REPO)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                with cli_errors():
                    main(read_settings(kind, [str(flag) for flag in flags]))
            except SystemExit as end:
                status = end.code
    return subprocess.CompletedProcess(flags, status or 0, out.getvalue(), err.getvalue())


def run_limited(size: int, *command: object) -> subprocess.CompletedProcess:
    """run_here where no file can become larger than `size` bytes, as on a full disk. Not on Windows."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))  # Python ignores the signal
    try:
        return run_here(*command)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def sample_here(*flags: object, terminal: bool = False) -> subprocess.CompletedProcess:
    """Run sample.py within this process."""
    return run_here("sample.py", *flags, terminal=terminal)


def torchrun(ranks: int, *words: object, options: tuple[str, ...] = ("--standalone",)) -> list[str]:
    """The command that runs a script of the repository on so many ranks."""
    start = [sys.executable, "-m", "torch.distributed.run", *options, f"--nproc_per_node={ranks}"]
    return [*start, str(REPO / str(words[0])), *map(str, words[1:])]


def start(command: list[str], env: dict[str, str] | None = None, cwd: Path = REPO) -> subprocess.Popen:
    """The command in the background, with its output to read."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=cwd, env={**ENVIRONMENT, **(env or {})}, text=True, **pipes)


def start_warm(
    *words: object, env: dict[str, str] | None = None, cwd: Path = REPO
) -> Started | subprocess.Popen:
    """A script of the repository, or `-m module`, likewise, in a process that has torch loaded already."""
    script = [] if words[0] == "-m" else [str(REPO / str(words[0]))]
    words = [*script, *map(str, words[len(script) :])]
    if not POSSIBLE:
        return start([sys.executable, *words], env, cwd)
    return Started(words, cwd, {**ENVIRONMENT, **(env or {})})


def ranks(*words_of_each: tuple[object, ...]) -> subprocess.CompletedProcess:
    """Scripts of the repository as the ranks of one run, in the environment that torchrun makes; where one
    fails, the others are ended, as by torchrun."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)  # at a free port
    place = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port)}
    place |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "test"}
    place |= {"WORLD_SIZE": str(len(words_of_each))}
    processes = [
        start_warm(*words, env={**place, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank, words in enumerate(words_of_each)
    ]
    end = time.monotonic() + 100
    while any(process.poll() is None for process in processes):
        if any(process.poll() for process in processes) or time.monotonic() > end:
            time.sleep(0.5)  # for what the others have to say
            for process in processes:
                process.kill()
            break
        time.sleep(0.02)
    told = [process.communicate(timeout=10) for process in processes]
    status = next((process.returncode for process in processes if process.returncode), 0)
    return subprocess.CompletedProcess(words_of_each, status, *map("".join, zip(*told, strict=True)))


def until(process: subprocess.Popen | Started, words: str) -> str:
    """Read the output of a process up to the line that begins with `words`; that line, "" if none came."""
    return next((line for line in process.stdout if line.startswith(words)), "")


def assert_same_weights(one: Path, other: Path, atol: float = 0.0) -> None:
    """Two checkpoints have equal weights and averages, bit for bit unless `atol` is given."""
    ours, theirs = (torch.load(path, weights_only=True) for path in (one, other))
    assert ours["iter_num"] == theirs["iter_num"] and list(ours["model"]) == list(theirs["model"])
    for name, tensor in ours["model"].items():
        torch.testing.assert_close(theirs["model"][name], tensor, atol=atol, rtol=0, msg=name)
    for key in ("optimizer", "muon"):
        for number, averages in ours.get(key, {"state": {}})["state"].items():
            for name, tensor in averages.items():
                torch.testing.assert_close(theirs[key]["state"][number][name], tensor, atol=atol, rtol=0)


def losses_of(out_dir: Path) -> list[list[str]]:
    """The lines of log.csv, without what depends on the clock."""
    rows = [line.split(",") for line in (out_dir / "log.csv").read_text().splitlines()]
    timed = [rows[0].index(name) for name in ("seconds", "tokens_per_second")]
    return [[value for place, value in enumerate(row) if place not in timed] for row in rows]


def assert_user_error(result: subprocess.CompletedProcess, *words: str) -> None:
    """It ended with status 2 and one line on stderr that says what is wrong and what to do."""
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 2, result
    assert "Traceback" not in result.stderr
    assert len(errors) == 1 and result.stderr.splitlines()[-1] == errors[0], result.stderr
    assert ";" in errors[0], f"says not what to do: {errors[0]}"
    for word in words:
        assert word in errors[0], f"{word!r} is not in: {errors[0]}"


@pytest.fixture(scope="session")
def text() -> str:
    """100 kB of real text, on every machine that runs Python."""
    return Path(argparse.__file__).read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory, text: str) -> Path:
    """A prepared character dataset of that text."""
    folder = tmp_path_factory.mktemp("dataset")
    (folder / "text.txt").write_text(text, encoding="utf-8")
    done = prepare_here(
        "data/shakespeare_char/prepare.py", "--input", folder / "text.txt", "--output", folder
    )
    assert done.returncode == 0, done.stderr
    return folder


def write_lines(path: Path, entries: list[dict[str, Any]]) -> None:
    """A file of JSON lines."""
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")


@pytest.fixture(scope="session")
def questions_file(tmp_path_factory: pytest.TempPathFactory, text: str) -> Path:
    """Questions about a text: what stands there, or what stands elsewhere."""
    rng, entries = random.Random(1), []
    while len(entries) < 50:
        begin = rng.randrange(len(text) - 100)
        endings = [text[at : at + rng.randint(4, 9)] for at in (begin + 6, *rng.sample(range(len(text)), 3))]
        if len(set(endings)) < 4:  # equal ones would be equally likely
            continue
        label = rng.randrange(4)
        endings[0], endings[label] = endings[label], endings[0]
        entries.append({"ctx": text[begin : begin + 6], "endings": endings, "label": label, "ind": 7})
    path = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    write_lines(path, entries)
    return path


@pytest.fixture
def copy(dataset: Path, tmp_path: Path) -> Path:
    """A copy of that dataset, to spoil; its files are old, so that a change shows in their time."""
    folder = tmp_path / "data"
    folder.mkdir()
    for path in dataset.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
        os.utime(folder / path.name, (1e9, 1e9))
    return folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Path:
    """The out_dir of a finished run on it, 20 steps."""
    out_dir = tmp_path_factory.mktemp("trained") / "out"
    train_here(*TINY, f"--dataset={dataset}", f"--out_dir={out_dir}")
    return out_dir


@pytest.fixture
def at_each_step(
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[Callable[[int, list[torch.Tensor]], None]], None]:
    """Returns a function that lets training steps of this process call another one, with the number of the
    step, counted from then on, and the gradients before their norm is taken."""
    get_total_norm = torch.nn.utils.get_total_norm

    def install(function: Callable[[int, list[torch.Tensor]], None]) -> None:
        numbers = itertools.count(1)

        def norm(gradients: list[torch.Tensor]) -> torch.Tensor:
            function(next(numbers), gradients)
            return get_total_norm(gradients)

        monkeypatch.setattr(torch.nn.utils, "get_total_norm", norm)

    return install


@pytest.fixture
def gpt2_bpe(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment in which tiktoken has GPT-2's vocabulary; skips where it cannot be had."""
    cache = os.environ.get("TIKTOKEN_CACHE_DIR") or str(SHARED / "tiktoken-cache")
    if not Path(cache).is_dir():
        pytest.skip("no copy of GPT-2's vocabulary (set TIKTOKEN_CACHE_DIR)")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", cache)
    return {"TIKTOKEN_CACHE_DIR": cache}


@pytest.fixture
def tiny_shakespeare() -> Path:
    """The file; skips where there is no copy of it."""
    path = SHARED / "tinyshakespeare.txt"
    if not path.is_file():
        pytest.skip("no copy of tiny Shakespeare beside the repository (../shared/data)")
    return path


@pytest.fixture(scope="module")
def fuzz_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where odd inputs are written; code in them would make a file `trap` in it. No network."""
    folder = tmp_path_factory.mktemp("fuzz")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("tiktoken.get_encoding", lambda name: open("no network"))
        yield folder
