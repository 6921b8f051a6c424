"""Every setting of every command: name, type, default, limits and meaning. Nothing here needs torch."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from configurator import Settings, setting
from distrogpt.errors import UserError
from distrogpt.gpus import GPUS

ACTIVATIONS = ("gelu_tanh", "gelu", "relu2", "swiglu")  # as in model.py, which --help must not load
NORMS = ("layernorm", "rmsnorm")
# of train.py, and not taken from the checkpoint that a run resumes from: they belong to this call or machine
OF_THIS_CALL = ("out_dir", "init_from", "eval_only", "device", "compile", "backend")
EVAL_TASKS = ("loss", "hellaswag", "choice", "accuracy", "next")
DTYPES = ("auto", "float32", "bfloat16", "float16")

MIXTURE = r"\A|,\s*"  # what stands before the name of a dataset

# settings of several commands
INIT_FROM = setting("resume", "resume (from out_dir), gpt2[-medium|-large|-xl], or a folder", path=True)
OUT_DIR = setting("out", "folder of the checkpoint", path=True)
DATASET = setting(
    None,
    "dataset with the tokenizer, if the checkpoint names none that is here",
    path=True,
    path_after=MIXTURE,
)
FILE = r"\AFILE:"
START = setting(
    "\n", "the prompt; FILE:path reads it from a file; empty starts a new document", path_after=FILE
)
DEVICE = setting("auto", "auto (cuda, else mps, else cpu), cpu, cuda, cuda:1, mps")
DTYPE = setting("auto", "compute dtype; auto: bfloat16 if supported; float32 is TF32 on GPUs", choices=DTYPES)
INT8 = setting(False, "8-bit weights: less memory, slightly less exact; faster on CPUs for few samples")
BASELINE_LOSS = setting(None, "a published val loss, to compare with", above=0)
BASELINE_HELLASWAG = setting(None, "a published acc_norm on HellaSwag, to compare with", min=0, max=1)
JSON = setting(None, "write the results to this file too", path=True)


@dataclass
class TrainConfig(Settings):
    """Train a GPT, resume a run, finetune, or evaluate once.

    usage: python train.py [config/NAME.py ...] [--setting=value ...]
           torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py

    Config files come first, flags override them. The defaults are GPT-2 124M on OpenWebText.
    """

    uses_ranks = True

    # files
    out_dir: str = setting("out", "folder of the checkpoints: ckpt.pt (best), last.pt (newest)", path=True)
    dataset: str = setting(
        "openwebtext", "folder of data/, path, or mixture: NAME:0.9,OTHER:0.1", path=True, path_after=MIXTURE
    )
    init_from: str = setting(
        "scratch",
        "scratch, resume, auto (resume if possible), auto:gpt2, gpt2[-medium|-large|-xl], or a folder",
        path=True,
        path_after=r"\A(?:auto:)?",
    )
    seed: int = setting(1337, "random seed of weights, batches and dropout", min=0, below=2**63)

    # evaluation and logging
    eval_interval: int = setting(2000, "steps between evaluations", min=1)
    eval_iters: int = setting(200, "batches per split in an evaluation; 0 is every token of val once", min=0)
    eval_splits: str = setting(
        "both", "splits to evaluate; train: the train loss chooses ckpt.pt", choices=("both", "train", "val")
    )
    eval_only: bool = setting(False, "evaluate once and stop")
    eval_hellaswag: bool = setting(False, "evaluate HellaSwag too (acc_norm)")
    hellaswag_input: str | None = setting(None, "file of questions; None downloads HellaSwag's", path=True)
    hellaswag_items: int | None = setting(None, "evaluate only the first N questions; None is all", min=1)
    eval_accuracy: bool = setting(False, "evaluate exact answers: how val's lines continue after loss_after")
    eval_samples: int = setting(0, "samples to print at each evaluation", min=0)
    sample_start: str = setting("\n", "prompt of these samples, or FILE:path", path_after=FILE)
    sample_tokens: int = setting(100, "tokens of each of these samples", min=1)
    log_interval: int = setting(1, "steps between log lines", min=1)
    always_save_checkpoint: bool = setting(True, "write ckpt.pt at each evaluation, not only at the best")
    save_interval: int | None = setting(None, "write last.pt every N steps, not only at evaluations", min=1)
    keep_checkpoints: int = setting(0, "keep the newest N checkpoints as step-*.pt too", min=0)
    skip_limit: int = setting(5, "end the run after N skipped steps in a row (gradients not finite)", min=1)
    wandb_log: bool = setting(False, "log to Weights & Biases too")
    wandb_project: str = setting("owt", "Weights & Biases project")
    wandb_run_name: str = setting("gpt2", "Weights & Biases run name")
    tensorboard_log: bool = setting(False, "log to TensorBoard too, in out_dir/tensorboard")
    loss_plot: bool = setting(True, "redraw out_dir/loss.png after evaluations, in the background")
    baseline_train_loss: float | None = setting(None, "a published train loss, to compare with", above=0)
    baseline_loss: float | None = BASELINE_LOSS
    baseline_hellaswag: float | None = BASELINE_HELLASWAG

    # batches: a step trains on gradient_accumulation_steps * batch_size * block_size tokens, over all ranks
    gradient_accumulation_steps: int = setting(40, "micro-steps per step, divided among ranks", min=1)
    batch_size: int = setting(12, "sequences per micro-step; bench.py --find_batch=True finds it", min=1)
    block_size: int = setting(1024, "context length: tokens per sequence", min=1)
    sampling: str = setting(
        "random",
        "random: windows at random positions; epochs: each window once per epoch; "
        "lines: windows that begin with a line, each line once per epoch",
        choices=("random", "epochs", "lines"),
    )
    loss_after: str | None = setting(None, "count a line in the loss only after this token, such as =")

    # model
    n_layer: int = setting(12, "transformer blocks", min=1)
    n_head: int = setting(12, "attention heads", min=1)
    n_embd: int = setting(768, "embedding width; a multiple of n_head", min=1)
    dropout: float = setting(0.0, "0 for pretraining; 0.1 or more for finetuning, small data", min=0, below=1)
    bias: bool = setting(False, "biases in the linear layers and LayerNorms, as in GPT-2")
    activation: str = setting(
        "gelu_tanh", "GPT-2's GELU; gelu is the exact one, several times as fast on CPUs", choices=ACTIVATIONS
    )
    # improvements since GPT-2; model.py says what each does, BENCHMARKS.md what it gains
    norm: str = setting("layernorm", "rmsnorm normalises the length alone and has no weights", choices=NORMS)
    rotary: bool = setting(False, "rotary position embedding instead of learned positions")
    qk_norm: bool = setting(False, "normalise queries and keys, which allows higher learning rates")
    n_kv_head: int | None = setting(
        None, "grouped-query attention: heads of keys and values, a divisor of n_head; None: all", min=1
    )
    tied: bool = setting(True, "tie the token embedding and lm_head")
    logit_softcap: float = setting(0.0, "bound the logits to this by tanh; 0 is off", min=0)
    embedding_skip: bool = setting(False, "feed the token embeddings to each block, with learned weights")
    zero_init: bool = setting(False, "zero-initialise residual projections and an untied lm_head")

    # optimizer and learning rate
    optimizer: str = setting(
        "adamw", "muon: AdamW for all but matrices; sgd: Nesterov's", choices=("adamw", "muon", "sgd")
    )
    learning_rate: float = setting(6e-4, "peak learning rate", above=0)
    muon_lr: float = setting(0.02, "peak learning rate of Muon's matrices", above=0)
    embedding_lr: float | None = setting(None, "learning_rate of wte and wpe, if different", above=0)
    head_lr: float | None = setting(None, "learning_rate of an untied lm_head, if different", above=0)
    max_iters: int = setting(600_000, "total training steps", min=0)
    max_epochs: float | None = setting(None, "passes over the training data, instead of max_iters", above=0)
    max_minutes: float | None = setting(
        None, "end the run after this time, all resumptions included; the schedule ignores it", above=0
    )
    patience: int | None = setting(None, "end after N evaluations in a row without a lower val loss", min=1)
    weight_decay: float = setting(0.1, "weight decay of matrices and embeddings", min=0)
    beta1: float = setting(0.9, "AdamW's decay of the first moment", min=0, below=1)
    beta2: float = setting(0.95, "AdamW's decay of the second moment", min=0, below=1)
    momentum: float = setting(0.95, "momentum of Muon and SGD", min=0, below=1)
    grad_clip: float = setting(1.0, "clip the gradient to this norm; 0 is off", min=0)
    decay_lr: bool = setting(True, "warm up, then decay as lr_schedule says; False is constant")
    lr_schedule: str = setting("cosine", "wsd: constant, then linear decay", choices=("cosine", "wsd"))
    cooldown: float = setting(0.4, "wsd: fraction of the steps in which it decays", above=0, max=1)
    warmup_iters: int = setting(2000, "steps of linear warm-up", min=0)
    lr_decay_iters: int | None = setting(None, "step at which min_lr is reached; None is max_iters", min=1)
    min_lr: float | None = setting(None, "final learning rate; None is a tenth of learning_rate", min=0)

    # hardware
    device: str = DEVICE
    dtype: str = DTYPE
    compile: bool | str = setting("auto", "torch.compile; auto: for long runs", choices=("auto", True, False))
    activation_checkpointing: bool = setting(False, "recompute activations: less memory, more compute")
    shard: bool = setting(False, "shard weights, gradients and optimizer state among ranks (FSDP2)")
    backend: str = setting("auto", "torch.distributed backend on GPUs", choices=("auto", "nccl", "gloo"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.out_dir or not self.dataset:
            raise ValueError("out_dir or dataset is empty; name a folder")

    def idle(self) -> dict[str, str]:
        if self.init_from != "scratch":  # the checkpoint may have what they need
            return {}
        needs = {
            ("hellaswag_input", "hellaswag_items"): (self.eval_hellaswag, "without eval_hellaswag=True"),
            ("sample_start", "sample_tokens"): (self.eval_samples, "without eval_samples"),
            ("wandb_project", "wandb_run_name"): (self.wandb_log, "without wandb_log=True"),
            ("muon_lr",): (self.optimizer == "muon", "without optimizer=muon"),
            ("cooldown",): (self.lr_schedule == "wsd", "without lr_schedule=wsd"),
            ("head_lr",): (not self.tied, "on a tied lm_head, without tied=False"),
        }
        return {name: why for names, (is_used, why) in needs.items() if not is_used for name in names}


CHECKS = "machine network greedy compile fp16 resume ranks synchronize memory".split()
# what each measurement of bench.py depends on, beside the settings of all
RECIPE = """bias activation norm rotary qk_norm n_kv_head tied logit_softcap embedding_skip zero_init
    optimizer""".split()  # what can differ from GPT-2 with AdamW, beside the size
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
        *"""bench_steps lr_decay_iters shard gpu n_gpus gpus_per_node mfu interconnect""".split(),
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
    """Time train.py's training step, or sampling, beside the machine's limits and other implementations.

    usage: python bench.py [config/NAME.py ...] [--setting=value ...]
           python bench.py --generate=True --against=../nanoGPT

    Config files are those of train.py. Without another measurement, it times the training step.
    """

    uses_ranks = False
    gradient_accumulation_steps: int = setting(1, "micro-steps per step", min=1)
    batch_size: int | None = setting(None, "sequences per micro-step; None is 12 on a GPU, 1 on a CPU", min=1)
    real_data: bool = setting(True, "read the dataset; False: random ids of GPT-2's vocabulary")
    bench_steps: int = setting(20, "timed steps", min=1)
    warmup_steps: int = setting(3, "steps before the timed ones, compiling included", min=0)
    profile: bool = setting(False, "list the costliest operations and write bench_trace.json for a browser")
    ladder: bool = setting(
        False, "time one improvement after another, from GPT-2 to the settings: a table and bench_ladder.png"
    )
    checkpoint: bool = setting(False, "time what writing a checkpoint costs the steps")
    logs: bool = setting(False, "time what logs and plots cost the steps")
    questions: bool = setting(False, "time multiple choice, batched and one by one")
    serve: bool = setting(False, "time out_dir's model in serve.py with 32 clients, beside sample.py")
    generate: bool = setting(False, "time sampling instead of training")
    max_new_tokens: int | None = setting(None, "generate: tokens per sample; None: 256 or what fits", min=3)
    num_samples: int = setting(10, "generate: samples in a batch, timed beside a single one", min=1)
    rounds: int = setting(3, "generate, checkpoint, questions, serve: repeats of each timing", min=1)
    against: str | None = setting(None, "time beside the folder of a nanoGPT, or transformers", path=True)
    json: str | None = JSON
    report: bool = setting(False, "measure and check this machine: report/report.md and report.json")
    report_minutes: float = setting(8.0, "report: leave out the last parts that take longer", above=0)
    check: str | None = setting(None, "run one of the report's checks by itself", choices=(*CHECKS, None))
    find_batch: bool = setting(False, "find the largest batch_size that fits, and the fastest")
    plan: bool = setting(False, "predict the run's memory, time and communication on n_gpus")
    gpu: str = setting("here", "plan: GPU to plan for; here: this machine", choices=("here", *GPUS))
    n_gpus: int = setting(1, "plan, find_batch: GPUs of the run", min=1, max=2**20)
    gpus_per_node: int | None = setting(None, "plan: GPUs per node; None is 8, or this machine's", min=1)
    mfu: float | None = setting(None, "plan: MFU to expect; None is measured, or 0.4", above=0, max=1)
    interconnect: float | None = setting(None, "plan: Gbit/s per GPU to other nodes; None: as usual", above=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.against not in (None, "transformers") and not (Path(self.against) / "model.py").is_file():
            advice = "name a nanoGPT checkout, or transformers"
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
        what = "a training step" if self.measurement == "profile" else self.measurement
        for name in set().union(*MEASUREMENTS.values()) - set(used):
            others = [other for other, names in MEASUREMENTS.items() if name in names and other != "profile"]
            where = f" (but {', '.join(others)})" if len(others) < 5 else ""
            reasons[name] = f"{what} does not depend on it{where}"
        if "n_layer" in reasons and self.measurement != "serve":  # which reads its out_dir
            reasons["a config file"] = f"{what} uses fixed settings"
        return reasons


@dataclass
class AblateConfig(TrainConfig):
    """Train a recipe, the recipe without each of its ingredients, GPT-2, and GPT-2 with each of them.

    usage: python ablate.py config/train_shakespeare_cpu_modern.py [--setting=value ...]

    Config files are those of train.py. The same command resumes an interrupted study.
    """

    uses_ranks = False
    seeds: int = setting(3, "runs of each variant, with seeds from `seed` on", min=1)
    json: str = setting("ablate.json", "file of the results", path=True)
    plot: str | None = setting(None, "file of the plot; None is named as json, with .png", path=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.picture == Path(self.json):
            raise ValueError(f"json={self.json} is the name of the picture; choose another")

    @property
    def picture(self) -> Path:
        return Path(self.plot or Path(self.json).with_suffix(".png"))

    @classmethod
    def never_used(cls) -> dict[str, str]:
        left = """out_dir log_interval always_save_checkpoint save_interval keep_checkpoints wandb_log
            wandb_project wandb_run_name tensorboard_log loss_plot baseline_train_loss baseline_loss
            baseline_hellaswag eval_hellaswag hellaswag_input hellaswag_items eval_accuracy eval_samples
            sample_start sample_tokens""".split()
        reasons = dict.fromkeys(left, "of the runs of a study, their val losses alone are kept")
        reasons |= dict.fromkeys(("eval_iters", "eval_splits"), "a study evaluates all of val")
        return reasons | dict.fromkeys(("init_from", "eval_only"), "a study trains each variant from scratch")


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
           python sample.py --init_from=gpt2-xl --start="What is the answer?" --num_samples=5
    """

    init_from: str = INIT_FROM
    out_dir: str = OUT_DIR
    dataset: str | None = DATASET
    start: str = START
    prompts: str | None = setting(
        None, r"file with a prompt on each line, or - for stdin, instead of start; \n is a newline", path=True
    )
    interactive: bool = setting(False, "read prompts from the keyboard; /help there says more")
    num_samples: int = setting(10, "samples of each prompt; a single one is streamed", min=1)
    batch_size: int = setting(64, "sequences per batch; on CPUs, does not change the text", min=1)
    max_new_tokens: int = setting(500, "tokens per sample, after the prompt", min=1)
    temperature: float = setting(0.8, "below 1 less random, above 1 more; 0 takes the most likely", min=0)
    top_k: int | None = setting(200, "sample from the k most likely tokens; None or 0 is all", min=0)
    top_p: float = setting(1.0, "sample from the smallest set of this total probability", above=0, max=1)
    min_p: float = setting(0.0, "drop tokens less likely than this fraction of the first", min=0, max=1)
    repetition_penalty: float = setting(1.0, "above 1 makes repeated tokens less likely; 1 is off", min=0.01)
    seed: int = setting(1337, "random seed: the same seed gives the same text", min=0, below=2**63)
    stop: tuple[str, ...] = setting((), r"end a sample before this text; \n in it is a newline, \t a tab")
    stop_at_end: bool = setting(True, "end a sample at the end-of-text token; False continues after it")
    echo: bool = setting(True, "print the prompt before each sample; False: only the new text")
    best_of: int = setting(1, "candidates per sample; keeps the one of highest mean log-likelihood", min=1)
    show_probs: bool = setting(False, "show token probabilities: as colours on a terminal, else in lines")
    speak: str | None = setting(None, "speak the samples into this .wav file, replacing it", path=True)
    voice: str | None = setting(
        None, "with speak: a Piper voice, NAME.onnx with its .json; None or system: the system's", path=True
    )
    device: str = DEVICE
    dtype: str = DTYPE
    compile: bool = setting(False, "torch.compile the decoding of a token; on a CPU, useful with int8")
    int8: bool = INT8

    def __post_init__(self) -> None:
        super().__post_init__()
        prompts = [self.start != START.default, self.prompts is not None, self.interactive]
        if sum(prompts) > 1:
            raise ValueError("start, prompts and interactive all set the prompt; give one of them")
        if self.speak and self.interactive:
            raise ValueError("speak needs samples that end; leave out interactive")
        if self.voice and not self.speak:
            raise ValueError("voice has no effect without speak; add --speak=out.wav")

    def unused(self) -> dict[str, str]:
        reason = "interactive writes one sample of each prompt"
        names = ["num_samples", "batch_size"][: 1 if self.best_of > 1 else 2]
        return dict.fromkeys(names, reason) if self.interactive else {}


@dataclass
class ServeConfig(Settings):
    """Serve a trained GPT, or GPT-2: a page to write with, and OpenAI's /v1/completions for other programs.

    usage: python serve.py --out_dir=out-shakespeare-char [--setting=value ...]
           python serve.py --init_from=gpt2 --host=0.0.0.0 --api_key=FILE:key.txt

    The page is at http://127.0.0.1:8000 and for this machine alone, unless host says otherwise.
    """

    init_from: str = INIT_FROM
    out_dir: str = OUT_DIR
    dataset: str | None = DATASET
    host: str = setting("127.0.0.1", "address to listen on; 0.0.0.0 is all, and needs an api_key")
    port: int = setting(8000, "port to listen on; 0 takes any free one", min=0, max=65535)
    api_key: str | None = setting(
        None, "API key that clients must send; FILE:path reads it from a file", path_after=FILE
    )
    batch_size: int = setting(16, "samples in a batch, which takes memory for their KV cache", min=1)
    queue: int = setting(64, "requests that may wait for a place in the batch; more are refused", min=0)
    max_new_tokens: int = setting(4096, "limit of the tokens per sample that a request may ask for", min=1)
    voice: str | None = setting(None, "speech: a Piper voice, NAME.onnx, or system; None is off", path=True)
    device: str = DEVICE
    dtype: str = DTYPE
    int8: bool = INT8

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.host:
            raise ValueError("host is empty; name an address, such as 127.0.0.1")


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
    """Evaluate a trained GPT, or GPT-2: loss, multiple choice, exact answers, next tokens.

    usage: python eval.py --out_dir=out-addition [--setting=value ...]
           python eval.py --init_from=gpt2 --tasks=hellaswag
           python eval.py --out_dir=out --tasks=loss,next --stride=64 --start="To be or not"
    """

    uses_ranks = True

    init_from: str = INIT_FROM
    out_dir: str = OUT_DIR
    tasks: str = setting("auto", f"some of {', '.join(EVAL_TASKS)}; auto: accuracy if loss_after, else loss")
    batch_size: int | None = setting(None, "per batch; None is 16 sequences or questions, 256 lines", min=1)
    max_items: int | None = setting(None, "evaluate only the first N lines or questions; None is all", min=1)
    show: int = setting(10, "wrong answers and next tokens to print", min=0)
    json: str | None = JSON

    # loss, accuracy
    dataset: str | None = setting(
        None, "None is the dataset that the checkpoint was trained on", path=True, path_after=MIXTURE
    )
    split: str = setting("val", "split of the dataset", choices=("train", "val"))
    block_size: int | None = setting(None, "loss: context length; None is the model's", min=1)
    stride: int | None = setting(None, "loss: tokens from window to window; None: block_size", min=1)
    separator: str | None = setting(None, "accuracy: token that ends a prompt; None: loss_after, or =")
    # hellaswag, choice
    input: str | None = setting(None, 'JSON lines {"ctx": "a", "endings": ["b", "c"], "label": 0}', path=True)
    # next
    start: str = START

    # hardware
    device: str = DEVICE
    dtype: str = DTYPE

    def unused(self) -> dict[str, str]:
        names = [name.strip() for name in self.tasks.split(",")]
        tasks = ("loss", "accuracy") if names == ["auto"] else names
        known = set(tasks) <= set(EVAL_TASKS)  # else another error says so
        return self.unused_by(tasks) if known else {}

    def unused_by(self, tasks: Collection[str]) -> dict[str, str]:
        """The settings that none of these tasks reads, and why."""
        reason = f"it is not for tasks={','.join(tasks)}"
        return {name: reason for name, of in TASKS_OF.items() if not set(tasks) & set(of)}


@dataclass
class ExportConfig(Settings):
    """Write a trained GPT in Hugging Face's format, a folder that transformers and others load.

    usage: python export.py --out_dir=out-shakespeare-char --to=my-model
           python export.py --init_from=gpt2 --to=gpt2-bf16 --dtype=bfloat16
    """

    init_from: str = INIT_FROM
    out_dir: str = OUT_DIR
    dataset: str | None = DATASET
    to: str = setting("", "the folder to write", path=True)
    dtype: str = setting("float32", "dtype of the weights", choices=DTYPES[1:])
    overwrite: bool = setting(False, "replace an existing export")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.to:
            raise ValueError("to is empty; name the folder to write: --to=FOLDER")
