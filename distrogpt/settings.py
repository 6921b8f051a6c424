"""Every setting of every command: name, type, default, limits and meaning. Nothing here needs torch."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from configurator import Settings, setting
from distrogpt.errors import UserError
from distrogpt.gpus import GPUS
from distrogpt.scaling import Size, parse_size

ACTIVATIONS = ("gelu_tanh", "gelu", "relu2", "swiglu")  # as in model.py, which --help must not load
NORMS = ("layernorm", "rmsnorm")
# of train.py, and not taken from the checkpoint that a run resumes from: they belong to this call or machine
OF_THIS_CALL = ("out_dir", "init_from", "eval_only", "device", "compile", "backend")
EVAL_TASKS = ("loss", "hellaswag", "choice", "accuracy", "next")
DTYPES = ("auto", "float32", "bfloat16", "float16")
GGUF_TYPES = ("f32", "bf16", "f16", "q8_0")

MIXTURE = r"\A|,\s*"  # what stands before the name of a dataset

# settings of several commands
INIT_FROM = setting(
    "resume",
    "the model: resume (the checkpoint in out_dir); gpt2, gpt2-medium, gpt2-large, gpt2-xl; "
    "the folder of a run; a folder or hub name in Hugging Face's format",
    path=True,
    heading="model",
)
OUT_DIR = setting("out", "folder of a trained run, with init_from=resume", path=True)
DATASET = setting(
    None, "dataset whose tokenizer to use, if the checkpoint has none", path=True, path_after=MIXTURE
)
FILE = r"\AFILE:"
START = setting(
    "\n",
    "the prompt; FILE:path reads it from a file; empty: a new document",
    path_after=FILE,
    heading="prompt",
)
DEVICE = setting("auto", "cpu, cuda, cuda:1, mps; auto: a GPU if there is one, else cpu", heading="machine")
DTYPE = setting(
    "auto",
    "compute dtype (mixed precision: bf16, fp16); auto: bf16 if supported; float32: TF32 on GPUs",
    choices=DTYPES,
)
INT8 = setting(False, "8-bit weights: less memory, slightly less exact; faster on CPUs for few samples")
BASELINE_LOSS = setting(None, "a published val loss, shown for comparison", above=0)
BASELINE_HELLASWAG = setting(None, "a published HellaSwag acc_norm, shown for comparison", min=0, max=1)
JSON = setting(None, "also write the results to this JSON file", path=True)


@dataclass
class TrainConfig(Settings):
    """Train a GPT from scratch, resume a run, finetune a model, or evaluate one.

    usage: python train.py [config/NAME.py ...] [--setting=value ...]
           python train.py config/train_shakespeare_cpu.py --max_iters=500
           python train.py --init_from=resume --out_dir=out-shakespeare-cpu
           torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py

    A config file is Python code that assigns settings; flags override it. The defaults are those of
    GPT-2 124M on OpenWebText.
    """

    uses_ranks = True
    most_used = """dataset minutes out_dir init_from batch_size n_layer n_embd learning_rate max_iters
        device"""

    # a step trains on gradient_accumulation_steps * batch_size * block_size tokens, over all ranks
    dataset: str = setting(
        "openwebtext",
        "name of a folder in data/, a path, or a mixture of datasets such as NAME:0.9,OTHER:0.1",
        path=True,
        path_after=MIXTURE,
        heading="data",
    )
    batch_size: int = setting(12, "sequences per micro-step; see bench.py --find_batch=True", min=1)
    block_size: int = setting(1024, "context length: tokens per sequence", min=1)
    gradient_accumulation_steps: int = setting(40, "micro-steps per step, divided among the ranks", min=1)
    sampling: str = setting(
        "random",
        "random: sequences from random positions; epochs: each sequence of the data once per epoch; "
        "lines: each sequence starts with a line, each line once per epoch",
        choices=("random", "epochs", "lines"),
    )
    loss_after: str | None = setting(
        None, "for tasks on lines, such as 12+34=46: the loss counts only the tokens after this one (here =)"
    )
    seed: int = setting(1337, "random seed of weights, batches and dropout", min=0, below=2**63)

    n_layer: int = setting(12, "number of layers (transformer blocks)", min=1, heading="model")
    n_head: int = setting(12, "number of attention heads", min=1)
    n_embd: int = setting(768, "embedding width (hidden size); a multiple of n_head", min=1)
    dropout: float = setting(0.0, "0 for pretraining; 0.1 or more for finetuning, small data", min=0, below=1)
    bias: bool = setting(False, "biases in the linear layers and LayerNorms, as in GPT-2")
    activation: str = setting(
        "gelu_tanh",
        "gelu_tanh: GPT-2's GELU; gelu: exact, several times as fast on CPUs; relu2: squared ReLU",
        choices=ACTIVATIONS,
    )
    # improvements since GPT-2; model.py says what each does, BENCHMARKS.md what it gains
    norm: str = setting("layernorm", "normalisation; rmsnorm (RMSNorm) has no learned weights", choices=NORMS)
    rotary: bool = setting(False, "rotary position embeddings (RoPE) instead of learned positions")
    qk_norm: bool = setting(False, "normalise queries and keys; allows higher learning rates")
    n_kv_head: int | None = setting(
        None, "key/value heads (grouped-query attention, GQA), a divisor of n_head; None: n_head", min=1
    )
    tied: bool = setting(True, "tie the token embedding and lm_head (share their weights)")
    logit_softcap: float = setting(0.0, "bound the logits by this with tanh, such as 15; 0 is off", min=0)
    embedding_skip: bool = setting(
        False, "each block reads a learned mix of the residual stream and the token embeddings"
    )
    key_offset: bool = setting(False, "half of each key is that of the position before (partial key offset)")
    zero_init: bool = setting(False, "zero-initialise residual projections and an untied lm_head")

    optimizer: str = setting(
        "adamw",
        "muon: Muon for the blocks' matrices, AdamW for the rest; sgd: SGD with Nesterov momentum",
        choices=("adamw", "muon", "sgd"),
        heading="optimizer",
    )
    learning_rate: float = setting(
        6e-4, "peak learning rate (lr); with optimizer=muon, of AdamW only", above=0
    )
    muon_lr: float = setting(0.02, "muon: peak learning rate of the blocks' matrices", above=0)
    embedding_lr: float | None = setting(
        None, "peak learning rate of the embeddings; None: learning_rate", above=0
    )
    head_lr: float | None = setting(
        None, "peak learning rate of an untied lm_head; None: learning_rate", above=0
    )
    weight_decay: float = setting(0.1, "weight decay of matrices and embeddings", min=0)
    beta1: float = setting(0.9, "AdamW: decay rate of the first moment", min=0, below=1)
    beta2: float = setting(0.95, "AdamW: decay rate of the second moment", min=0, below=1)
    momentum: float = setting(0.95, "muon, sgd: Nesterov momentum", min=0, below=1)
    grad_clip: float = setting(1.0, "clip the gradient norm to this; 0 is off", min=0)

    max_iters: int = setting(600_000, "total training steps", min=0, heading="schedule")
    max_epochs: float | None = setting(None, "passes over the training data, instead of max_iters", above=0)
    minutes: float | None = setting(
        None,
        "train for N minutes; the size of the model, and all other settings that are not given, are chosen "
        "for this machine and dataset",
        above=0,
    )
    max_minutes: float | None = setting(
        None,
        "end after N minutes in total, start, evaluations and resumptions included, or after max_iters; the "
        "schedule of the learning rate is fitted to that time",
        above=0,
    )
    patience: int | None = setting(
        None, "early stopping: stop after N evaluations in a row without a lower val loss", min=1
    )
    skip_limit: int = setting(5, "stop after N skipped steps in a row (loss or gradients not finite)", min=1)
    decay_lr: bool = setting(True, "warm-up and decay of the learning rate; False: constant")
    lr_schedule: str = setting(
        "cosine",
        "cosine decay, or wsd (warmup-stable-decay): constant, then linear decay",
        choices=("cosine", "wsd"),
    )
    warmup_iters: int = setting(2000, "steps of linear learning-rate warm-up", min=0)
    cooldown: float = setting(0.4, "wsd: fraction of the steps that the final decay takes", above=0, max=1)
    lr_decay_iters: int | None = setting(None, "step at which min_lr is reached; None: max_iters", min=1)
    min_lr: float | None = setting(None, "final learning rate; None: learning_rate / 10", min=0)

    eval_interval: int = setting(2000, "evaluate and save every N steps", min=1, heading="evaluation")
    eval_iters: int = setting(200, "batches per split in an evaluation; 0: the whole val split", min=0)
    eval_splits: str = setting(
        "both",
        "splits to evaluate; train: the train loss decides which checkpoint is best",
        choices=("both", "train", "val"),
    )
    eval_only: bool = setting(False, "evaluate once and exit")
    eval_hellaswag: bool = setting(False, "also evaluate HellaSwag (acc_norm) at each evaluation")
    hellaswag_input: str | None = setting(
        None, "file with HellaSwag's questions; None: download it", path=True
    )
    hellaswag_items: int | None = setting(None, "evaluate only the first N questions; None: all", min=1)
    eval_accuracy: bool = setting(
        False, "also evaluate exact match: complete the lines of val after the token loss_after"
    )
    eval_samples: int = setting(0, "print N samples at each evaluation", min=0)
    sample_start: str = setting(
        "\n", "prompt of these samples; FILE:path reads it from a file", path_after=FILE
    )
    sample_tokens: int = setting(100, "tokens per sample", min=1)

    out_dir: str = setting(
        "out",
        "folder of the run: ckpt.pt (best checkpoint), last.pt (newest), log.csv, loss.png",
        path=True,
        heading="checkpoints",
    )
    init_from: str = setting(
        "scratch",
        "scratch; resume (from out_dir); auto (resume if possible, else scratch); auto:gpt2 (else GPT-2); "
        "or, to finetune: gpt2, gpt2-medium, gpt2-large, gpt2-xl, the folder of another run, a folder or hub "
        "name in Hugging Face's format",
        path=True,
        path_after=r"\A(?:auto:)?",
    )
    always_save_checkpoint: bool = setting(
        True, "write ckpt.pt at each evaluation; False: only if the val loss is the lowest so far"
    )
    save_interval: int | None = setting(
        None, "also write last.pt every N steps; None: at evaluations and at the end only", min=1
    )
    keep_checkpoints: int = setting(0, "also keep the newest N checkpoints as step-*.pt", min=0)

    log_interval: int = setting(1, "log the loss every N steps", min=1, heading="logging")
    wandb_log: bool = setting(False, "log to Weights & Biases (wandb) too")
    wandb_project: str = setting("owt", "wandb: name of the project")
    wandb_run_name: str = setting("gpt2", "wandb: name of the run")
    tensorboard_log: bool = setting(False, "log to TensorBoard too, in out_dir/tensorboard")
    loss_plot: bool = setting(
        True, "draw out_dir/loss.png after evaluations, at most once a minute, and at the end"
    )
    baseline_train_loss: float | None = setting(None, "a published train loss, shown for comparison", above=0)
    baseline_loss: float | None = BASELINE_LOSS
    baseline_hellaswag: float | None = BASELINE_HELLASWAG

    device: str = DEVICE
    dtype: str = DTYPE
    compile: bool | str = setting(
        "auto",
        "use torch.compile; auto: only if the run is long enough to gain by it",
        choices=("auto", True, False),
    )
    activation_checkpointing: bool = setting(
        False, "gradient checkpointing: recompute activations; less memory, slower"
    )
    shard: bool = setting(
        False, "FSDP2 instead of DDP: shard weights, gradients and optimizer state; less memory per GPU"
    )
    backend: str = setting(
        "auto", "torch.distributed backend on GPUs; auto: nccl", choices=("auto", "nccl", "gloo")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.out_dir or not self.dataset:
            raise ValueError("out_dir or dataset is empty; give a name")
        if self.minutes is not None and self.max_minutes is not None:
            raise ValueError("minutes and max_minutes both limit the time; give one of them")
        if self.minutes is not None and self.lr_decay_iters is not None:
            raise ValueError("with minutes, the learning rate decays until the end; leave out lr_decay_iters")
        if self.minutes is not None and self.eval_only:
            raise ValueError("minutes trains a model, eval_only trains nothing; leave out one of them")

    def idle(self) -> dict[str, str]:
        if self.init_from != "scratch" or self.minutes is not None:  # what is not given may need them
            return {}
        needs = {
            ("hellaswag_input", "hellaswag_items"): (self.eval_hellaswag, "without eval_hellaswag=True"),
            ("sample_start", "sample_tokens"): (self.eval_samples, "without eval_samples"),
            ("wandb_project", "wandb_run_name"): (self.wandb_log, "without wandb_log=True"),
            ("muon_lr",): (self.optimizer == "muon", "without optimizer=muon"),
            ("cooldown",): (self.lr_schedule == "wsd", "without lr_schedule=wsd"),
            ("head_lr",): (not self.tied, "on a tied lm_head; it needs tied=False"),
        }
        return {name: why for names, (is_used, why) in needs.items() if not is_used for name in names}


CHECKS = "machine network greedy compile fp16 resume ranks synchronize memory".split()
# what each measurement of bench.py depends on, beside the settings of all
RECIPE = """bias activation norm rotary qk_norm n_kv_head tied logit_softcap embedding_skip key_offset
    zero_init optimizer""".split()  # what can differ from GPT-2 with AdamW, beside the size
NETWORK = ["init_from", "block_size", "n_layer", "n_head", "n_embd", *RECIPE[:-1], "seed"]
OPTIMIZER = """optimizer learning_rate muon_lr embedding_lr head_lr weight_decay beta1 beta2 momentum
    grad_clip""".split()
STEP = """dataset gradient_accumulation_steps batch_size sampling loss_after dropout max_iters max_epochs
    compile activation_checkpointing""".split()
STEP += NETWORK + OPTIMIZER
TIMED = [*STEP, "bench_steps", "warmup_steps"]
MEASUREMENTS = {
    "plan": [
        *STEP,
        *"""bench_steps minutes max_minutes lr_decay_iters shard gpu n_gpus gpus_per_node mfu
        interconnect""".split(),
    ],
    "find_batch": [*STEP, "n_gpus"],
    "check": TIMED,
    "ladder": TIMED,
    "checkpoint": [*TIMED, "rounds", "always_save_checkpoint", "keep_checkpoints"],
    "logs": [*TIMED, *"eval_interval wandb_log wandb_project wandb_run_name".split()],
    "generate": [*NETWORK, *"dataset compile max_new_tokens num_samples rounds against".split()],
    "questions": [*NETWORK, "rounds"],
    "serve": ["out_dir", "max_new_tokens", "rounds"],
    "report": ["against", "report_minutes"],
    "profile": [*TIMED, "against"],
}


@dataclass
class BenchConfig(TrainConfig):
    """Measure the speed of training or sampling on this machine, alone or beside other implementations.

    usage: python bench.py [config/NAME.py ...] [--setting=value ...]
           python bench.py config/train_shakespeare_cpu.py
           python bench.py --generate=True --against=../nanoGPT
           python bench.py --generate=True --against=llama.cpp
           python bench.py config/train_gpt2.py --plan=True --gpu=h100 --n_gpus=64
           python bench.py --plan=True --minutes=600 --gpu=h100 --n_gpus=8

    Choose one measurement; without one, bench.py times the training step. Config files are those of
    train.py. The groups "data" and below are settings of train.py, of the run or model to be measured.
    """

    uses_ranks = False
    most_used = "generate against profile find_batch plan gpu n_gpus report batch_size device"

    gradient_accumulation_steps: int = setting(1, "micro-steps per optimizer step", min=1)
    batch_size: int | None = setting(None, "sequences per micro-step; None: 12 on a GPU, 1 on a CPU", min=1)

    generate: bool = setting(False, "time sampling (inference): prefill and decoding", heading="measurement")
    profile: bool = setting(
        False, "list the most expensive operations of a training step; writes bench_trace.json for a browser"
    )
    find_batch: bool = setting(False, "find the largest batch_size that fits, and the fastest one")
    plan: bool = setting(False, "predict memory, time and communication of a run on many GPUs")
    ladder: bool = setting(
        False,
        "time the training step from plain GPT-2 to these settings, one improvement at a time: a table "
        "and bench_ladder.png",
    )
    checkpoint: bool = setting(False, "time how much writing a checkpoint slows down training")
    logs: bool = setting(False, "time how much logs and plots slow down training")
    questions: bool = setting(False, "time multiple-choice evaluation, batched and one by one")
    serve: bool = setting(False, "time serve.py with the model in out_dir: 32 clients, beside sample.py")
    report: bool = setting(False, "measure and check this machine: report/report.md and report.json")
    check: str | None = setting(None, "run a single check of the report", choices=(*CHECKS, None))
    against: str | None = setting(
        None,
        "training step, generate, report: another implementation to time too, the folder of a nanoGPT "
        "checkout or transformers; generate on a CPU: llama.cpp",
        path=True,
    )
    rounds: int = setting(3, "generate, checkpoint, questions, serve: repetitions of each timing", min=1)
    json: str | None = JSON

    bench_steps: int = setting(20, "steps to time", min=1, heading="training step")
    warmup_steps: int = setting(3, "untimed steps before them, which include compiling", min=0)
    real_data: bool = setting(True, "read the dataset; False: random token ids, with GPT-2's vocabulary size")

    max_new_tokens: int | None = setting(
        None,
        "generate, serve: tokens per sample; None: 256, or what fits in block_size",
        min=3,
        heading="generate and serve",
    )
    num_samples: int = setting(10, "generate: batch size, timed beside a single sample", min=1)

    gpu: str = setting(
        "here", "plan: GPU of the run; here: this machine, measured", choices=("here", *GPUS), heading="plan"
    )
    n_gpus: int = setting(1, "plan, find_batch: number of GPUs of the run", min=1, max=2**20)
    gpus_per_node: int | None = setting(None, "plan: GPUs per node; None: 8, or this machine's", min=1)
    mfu: float | None = setting(
        None,
        "plan: model FLOPs utilisation (MFU) to expect; None: measured if gpu is here, else 0.4",
        above=0,
        max=1,
    )
    interconnect: float | None = setting(
        None, "plan: network between nodes, Gbit/s per GPU; None: usual for that GPU", above=0
    )

    report_minutes: float = setting(
        8.0, "report: time limit; the last parts are left out", above=0, heading="report"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.against == "llama.cpp" and not self.generate:
            raise ValueError("against=llama.cpp only generates text; add --generate=True")
        names = (None, "transformers", "llama.cpp")
        if self.against not in names and not (Path(self.against) / "model.py").is_file():
            advice = "give the folder of a nanoGPT checkout, transformers or llama.cpp"
            raise ValueError(f"against={self.against} has no model.py; {advice}")

    @property
    def measurement(self) -> str:
        """The setting that says what is measured; profile if it is the training step. Raises UserError."""
        names = [name for name in MEASUREMENTS if getattr(self, name)] or ["profile"]
        if self.against and "against" not in MEASUREMENTS[names[0]]:
            names.append("against")
        if len(names) > 1:
            raise UserError(f"{' and '.join(names)} do not go together; give one at a time")
        return names[0]

    @classmethod
    def never_used(cls) -> dict[str, str]:
        used = {"device", "dtype", "real_data", "json", *MEASUREMENTS}.union(*MEASUREMENTS.values())
        return {name: "bench.py does not read it" for name in cls.__dataclass_fields__ if name not in used}

    def unused(self) -> dict[str, str]:
        used = MEASUREMENTS[self.measurement]
        if self.check in ("compile", "fp16", "ranks"):
            used = OPTIMIZER
        elif self.check not in ("memory", "synchronize", None):
            used = []
        reasons = self.never_used()
        what = "timing a training step" if self.measurement == "profile" else self.measurement
        for name in set().union(*MEASUREMENTS.values()) - set(used):
            others = [other for other, names in MEASUREMENTS.items() if name in names and other != "profile"]
            where = f" (only {', '.join(others)})" if len(others) < 5 else ""
            reasons[name] = f"{what} does not use it{where}"
        if "n_layer" in reasons and self.measurement != "serve":  # which reads its out_dir
            reasons["a config file"] = f"{what} uses fixed settings"
        return reasons


@dataclass
class AblateConfig(TrainConfig):
    """Ablation study: train a recipe, the recipe without each ingredient, GPT-2, and GPT-2 with each.

    usage: python ablate.py config/NAME.py [--setting=value ...]
           python ablate.py config/train_shakespeare_cpu_modern.py --max_iters=500 --seeds=1
           python ablate.py --scaling=True --dataset=shakespeare_char

    Config files and most settings are those of train.py. The same command resumes an interrupted study.

    With --scaling=True, train a grid of sizes and minutes on a dataset instead, and fit the rule by
    which train.py --minutes chooses a size.
    """

    uses_ranks = False
    most_used = "seeds scaling json dataset max_iters max_epochs device"

    seeds: int | None = setting(
        None,
        "runs per variant, with the seeds seed, seed + 1, ...; None: 3, or 1 with scaling",
        min=1,
        heading="study",
    )
    json: str | None = setting(
        None, "file of the results; None: ablate.json, or scaling_runs.json with scaling", path=True
    )
    plot: str | None = setting(None, "file of the plot; None: the name of json, with .png", path=True)
    scaling: bool = setting(
        False,
        "train a grid of sizes and minutes on the dataset, and fit the rule of train.py --minutes to it",
    )
    scaling_minutes: str = setting("1,3,10", "scaling: train each size for each of these times")
    sizes: str | None = setting(
        None, "scaling: layers/heads/width, such as 4/4/128,6/6/192; None: six sizes for the device"
    )
    constants: str | None = setting(
        None,
        "scaling: also write the fitted constants to this file; train.py reads distrogpt/scaling.json",
        path=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.picture == self.results:
            raise ValueError(f"json={self.results} is the name of the plot too; choose another")
        if self.constants and Path(self.constants) in (self.results, self.picture):
            raise ValueError(f"constants={self.constants} is the name of json or plot too; choose another")
        for name in ("minutes_of_runs", "sizes_of_runs"):
            getattr(self, name)  # raises ValueError

    @property
    def results(self) -> Path:
        return Path(self.json or ("scaling_runs.json" if self.scaling else "ablate.json"))

    @property
    def picture(self) -> Path:
        return Path(self.plot or self.results.with_suffix(".png"))

    @property
    def seeds_of_runs(self) -> range:
        return range(self.seed, self.seed + (self.seeds or (1 if self.scaling else 3)))

    @property
    def minutes_of_runs(self) -> list[float]:
        try:
            minutes = sorted({float(word) for word in self.scaling_minutes.split(",")})
        except ValueError:
            minutes = []
        if not minutes or not 0 < minutes[0] <= minutes[-1] < 1e5:
            example = "give minutes above 0, separated by commas, such as 1,3,10"
            raise ValueError(f"scaling_minutes={self.scaling_minutes} is not valid; {example}")
        return minutes

    @property
    def sizes_of_runs(self) -> list[Size]:
        """Empty if none are given."""
        try:
            return sorted({parse_size(word) for word in self.sizes.split(",")}) if self.sizes else []
        except ValueError:
            example = "give layers/heads/width, such as 4/4/128,6/6/192; heads must divide width"
            raise ValueError(f"sizes={self.sizes} is not valid; {example}") from None

    @classmethod
    def never_used(cls) -> dict[str, str]:
        left = """out_dir log_interval always_save_checkpoint save_interval keep_checkpoints wandb_log
            wandb_project wandb_run_name tensorboard_log loss_plot baseline_train_loss baseline_loss
            baseline_hellaswag eval_hellaswag hellaswag_input hellaswag_items eval_accuracy eval_samples
            sample_start sample_tokens""".split()
        reasons = dict.fromkeys(left, "a study keeps only the val losses of its runs")
        reasons |= dict.fromkeys(("eval_iters", "eval_splits"), "a study evaluates the whole val split")
        reasons["minutes"] = "a study does not choose settings; scaling_minutes are for scaling=True"
        return reasons | dict.fromkeys(("init_from", "eval_only"), "a study trains each variant from scratch")

    def unused(self) -> dict[str, str]:
        if not self.scaling:
            alone = ("scaling_minutes", "sizes", "constants")
            return self.never_used() | dict.fromkeys(alone, "it needs scaling=True")
        lengths = "max_iters max_epochs minutes max_minutes lr_decay_iters eval_interval patience".split()
        reasons = dict.fromkeys(lengths, "the runs of a scaling study last for scaling_minutes")
        reasons |= dict.fromkeys(
            ("n_layer", "n_head", "n_embd"), "a scaling study trains the sizes of --sizes"
        )
        reasons["loss_after"] = "a scaling study compares bits per byte, which need the loss of all tokens"
        return self.never_used() | reasons


@dataclass
class PlotConfig(Settings):
    """Draw the losses of one or more runs from their log.csv.

    usage: python plot.py RUN [RUN ...] [--setting=value ...]
           python plot.py out-a out-b --by=tokens
           python plot.py small=out-a large=logs/b.csv --by=seconds

    RUN is an out_dir or a .csv file, or NAME= and one of these: NAME is its label in the picture.
    """

    by: str = setting("steps", "x axis", choices=("steps", "tokens", "seconds"))
    output: str = setting("compare.png", "file to write: .png, .svg or .pdf", path=True)
    baseline_loss: float | None = BASELINE_LOSS
    baseline_hellaswag: float | None = BASELINE_HELLASWAG


# those of SampleConfig on which a sample's text depends, beside its model and prompt, and how it is shown
SAMPLING_FIELDS = """max_new_tokens temperature top_k top_p min_p repetition_penalty
    stop stop_at_end best_of show_probs seed""".split()


@dataclass
class SampleConfig(Settings):
    """Sample text from a trained GPT, or from GPT-2.

    usage: python sample.py --out_dir=out-shakespeare-char [--setting=value ...]
           python sample.py --out_dir=out-shakespeare-char --start="ROMEO:" --num_samples=1
           python sample.py --init_from=gpt2-xl --start="What is the answer?" --num_samples=5
           python sample.py --out_dir=out-shakespeare-char --interactive=True
    """

    most_used = """out_dir init_from start interactive num_samples max_new_tokens temperature top_k seed
        device"""

    init_from: str = INIT_FROM
    out_dir: str = OUT_DIR
    dataset: str | None = DATASET

    start: str = START
    prompts: str | None = setting(
        None, r"file with one prompt per line, or - for stdin, instead of start; \n is a newline", path=True
    )
    interactive: bool = setting(False, "read prompts from the keyboard; /help lists its commands")

    num_samples: int = setting(
        10, "samples per prompt; a single one is printed as it is generated", min=1, heading="sampling"
    )
    max_new_tokens: int = setting(500, "tokens per sample, prompt not included", min=1)
    temperature: float = setting(
        0.8, "below 1 less random, above 1 more; 0: the most likely token (greedy)", min=0
    )
    top_k: int | None = setting(200, "sample from the k most likely tokens; None or 0: all", min=0)
    top_p: float = setting(
        1.0,
        "nucleus sampling: sample from the smallest set of tokens with this total probability",
        above=0,
        max=1,
    )
    min_p: float = setting(
        0.0, "leave out tokens less probable than this fraction of the most likely one's", min=0, max=1
    )
    repetition_penalty: float = setting(
        1.0, "above 1, repeated tokens become less likely; 1 is off", min=0.01
    )
    best_of: int = setting(
        1, "generate N candidates per sample, and keep the one with the highest mean log-likelihood", min=1
    )
    stop: tuple[str, ...] = setting(
        (), r"end a sample before this text; repeat the flag for several; \n is a newline, \t a tab"
    )
    stop_at_end: bool = setting(True, "end a sample at the end-of-text token; False: continue")
    seed: int = setting(1337, "random seed: the same seed gives the same text", min=0, below=2**63)

    echo: bool = setting(True, "print the prompt before each sample", heading="output")
    show_probs: bool = setting(
        False, "show the probability of each token: as colours on a terminal, else one token per line"
    )
    speak: str | None = setting(
        None, "also speak the samples (text to speech) into this .wav file, replacing it", path=True
    )
    voice: str | None = setting(
        None,
        "with speak: a Piper voice, NAME.onnx beside its NAME.onnx.json; None or system: the system's",
        path=True,
    )

    device: str = DEVICE
    dtype: str = DTYPE
    batch_size: int = setting(64, "sequences per batch; does not change the text on CPUs", min=1)
    compile: bool = setting(False, "use torch.compile; slower on CPUs with bf16 instructions")
    int8: bool = INT8

    def __post_init__(self) -> None:
        super().__post_init__()
        prompts = [self.start != START.default, self.prompts is not None, self.interactive]
        if sum(prompts) > 1:
            raise ValueError("start, prompts and interactive all set the prompt; give one of them")
        if self.speak and self.interactive:
            raise ValueError("speak does not work with interactive; leave out one of them")
        if self.voice and not self.speak:
            raise ValueError("voice has no effect without speak; add --speak=out.wav")

    def unused(self) -> dict[str, str]:
        reason = "interactive generates one sample per prompt"
        names = ["num_samples", "batch_size"][: 1 if self.best_of > 1 else 2]
        return dict.fromkeys(names, reason) if self.interactive else {}


@dataclass
class ServeConfig(Settings):
    """Serve a trained GPT, or GPT-2: a web page to write with, and OpenAI's /v1/completions API.

    usage: python serve.py --out_dir=out-shakespeare-char [--setting=value ...]
           python serve.py --init_from=gpt2 --host=0.0.0.0 --api_key=FILE:key.txt

    The page is at http://127.0.0.1:8000, for this machine only unless you set host and api_key.
    """

    init_from: str = INIT_FROM
    out_dir: str = OUT_DIR
    dataset: str | None = DATASET

    host: str = setting(
        "127.0.0.1", "address to listen on; 0.0.0.0: all, which needs an api_key", heading="server"
    )
    port: int = setting(8000, "port to listen on; 0: any free one", min=0, max=65535)
    api_key: str | None = setting(
        None, "API key that clients must send; FILE:path reads it from a file", path_after=FILE
    )
    queue: int = setting(64, "requests that can wait for a place in the batch; more are refused", min=0)
    max_new_tokens: int = setting(4096, "limit of a request's max_tokens", min=1)
    voice: str | None = setting(
        None, "text to speech: a Piper voice (NAME.onnx), or system; None: off", path=True
    )

    device: str = DEVICE
    dtype: str = DTYPE
    batch_size: int = setting(
        16, "samples that are generated at once; each needs memory for its KV cache", min=1
    )
    int8: bool = INT8

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.host:
            raise ValueError("host is empty; give an address, such as 127.0.0.1")


TASKS_OF = {  # which tasks read a setting of EvalConfig; all, the tokenizer of its dataset
    "batch_size": ("loss", "hellaswag", "choice", "accuracy"),
    "max_items": ("hellaswag", "choice", "accuracy"),
    "show": ("accuracy", "next"),
    "split": ("loss", "accuracy"),
    "block_size": ("loss",),
    "stride": ("loss",),
    "separator": ("accuracy",),
    "input": ("hellaswag", "choice"),
    "start": ("next",),
}


@dataclass
class EvalConfig(Settings):
    """Evaluate a trained GPT, or GPT-2: loss, multiple choice, exact match, next-token probabilities.

    usage: python eval.py --out_dir=out-addition [--setting=value ...]
           python eval.py --init_from=gpt2 --tasks=hellaswag
           python eval.py --out_dir=out --tasks=loss,next --stride=64 --start="To be or not"
    """

    uses_ranks = True

    init_from: str = INIT_FROM
    out_dir: str = OUT_DIR

    tasks: str = setting(
        "auto",
        f"some of {', '.join(EVAL_TASKS)}, with commas; auto: accuracy (exact match) if the model was "
        "trained with loss_after, else loss",
        heading="tasks",
    )
    max_items: int | None = setting(None, "evaluate only the first N lines or questions; None: all", min=1)
    show: int = setting(10, "accuracy, next: how many wrong answers or next tokens to print", min=0)
    json: str | None = JSON

    dataset: str | None = setting(
        None,
        "dataset to evaluate on; None: the one of the checkpoint's training",
        path=True,
        path_after=MIXTURE,
        heading="loss and accuracy",
    )
    split: str = setting("val", "split of the dataset", choices=("train", "val"))
    block_size: int | None = setting(None, "loss: context length; None: the model's", min=1)
    stride: int | None = setting(
        None, "loss: tokens between the starts of two windows (sliding window); None: block_size", min=1
    )
    separator: str | None = setting(
        None, "accuracy: the token that ends the prompt of a line; None: the run's loss_after, or ="
    )

    input: str | None = setting(
        None,
        "file of questions: JSON lines with ctx (text), endings (list of texts) and label (the right one, "
        "from 0); None: hellaswag downloads its own",
        path=True,
        heading="hellaswag and choice",
    )

    start: str = setting(
        "\n",
        "the text whose next token is predicted; FILE:path reads it from a file",
        path_after=FILE,
        heading="next",
    )

    device: str = DEVICE
    dtype: str = DTYPE
    batch_size: int | None = setting(
        None, "sequences per batch; None: 16 (loss and multiple choice), 256 (accuracy)", min=1
    )

    def unused(self) -> dict[str, str]:
        names = [name.strip() for name in self.tasks.split(",")]
        tasks = ("loss", "accuracy") if names == ["auto"] else names
        known = set(tasks) <= set(EVAL_TASKS)  # else another error says so
        return self.unused_by(tasks) if known else {}

    def unused_by(self, tasks: Collection[str]) -> dict[str, str]:
        """The settings that none of these tasks reads, and why."""
        reason = f"tasks={','.join(tasks)} does not use it"
        return {name: reason for name, of in TASKS_OF.items() if not set(tasks) & set(of)}


@dataclass
class ExportConfig(Settings):
    """Export a trained GPT to a folder in Hugging Face's format, for transformers, vLLM and others, or
    to a GGUF file for llama.cpp.

    usage: python export.py --out_dir=out-shakespeare-char --to=my-model
           python export.py --init_from=gpt2 --to=gpt2-bf16 --dtype=bfloat16
           python export.py --init_from=gpt2 --to=gpt2.gguf --gguf=q8_0
    """

    init_from: str = INIT_FROM
    out_dir: str = OUT_DIR
    dataset: str | None = DATASET

    to: str = setting("", "folder to write; with gguf, the file (required)", path=True, heading="output")
    dtype: str = setting("float32", "dtype of the weights in a folder", choices=DTYPES[1:])
    gguf: str | None = setting(
        None,
        "write a GGUF file for llama.cpp, with weights of this type (q8_0: 8 bits); None: a folder",
        choices=(*GGUF_TYPES, None),
    )
    overwrite: bool = setting(False, "replace an export that is already there")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.to:
            raise ValueError("to is empty; give the folder to write: --to=FOLDER")
        is_file = self.to.lower().endswith(".gguf")
        if self.gguf and not is_file:
            raise ValueError(f"to={self.to} does not end in .gguf; give the file to write: --to=NAME.gguf")
        if is_file and not self.gguf:
            raise ValueError(f"to={self.to} names a GGUF file; add its type, such as --gguf=q8_0")

    def unused(self) -> dict[str, str]:
        return {"dtype": f"gguf={self.gguf} sets the type of the weights"} if self.gguf else {}
