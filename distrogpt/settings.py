"""Every setting of every command: name, type, default, limits and meaning. Nothing here needs torch."""

from dataclasses import dataclass

from configurator import check_settings, setting
from distrogpt.gpus import GPUS

ACTIVATIONS = ("gelu_tanh", "gelu", "relu2", "swiglu")
NORMS = ("layernorm", "rmsnorm")
OPTIMIZERS = ("adamw", "muon", "sgd")
EVAL_TASKS = ("loss", "hellaswag", "choice", "accuracy", "next")
EVAL_SPLITS = ("both", "train", "val")
DTYPES = ("auto", "float32", "bfloat16", "float16")
COMPILE = ("auto", True, False)


@dataclass
class TrainConfig:
    """Train a GPT, or go on with one, or evaluate one.

    usage: python train.py [config/NAME.py ...] [--setting=value ...]
           torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py

    Config files come first, flags override them. The defaults are GPT-2 124M on OpenWebText.
    """

    # where things are and come from
    out_dir: str = setting("out", "folder of the checkpoints: ckpt.pt (best), last.pt (newest)", path=True)
    dataset: str = setting(
        "openwebtext",
        "a folder of data/, or a path to one, made by a prepare.py; a mixture: NAME:0.9,OTHER:0.1",
        path=True,
    )
    init_from: str = setting(
        "scratch",
        "scratch, resume, auto (resume if possible), auto:gpt2, gpt2[-medium|-large|-xl], a folder",
        path=True,
    )
    seed: int = setting(1337, "of weights, batches and dropout", at_least=0, below=2**63)

    # evaluation and logging
    eval_interval: int = setting(2000, "steps between evaluations", at_least=1)
    eval_iters: int = setting(
        200, "batches per evaluation and split; 0 is every token of val once", at_least=0
    )
    eval_splits: str = setting(
        "both", "what an evaluation measures; with train, the best is that of train", choices=EVAL_SPLITS
    )
    eval_only: bool = setting(False, "evaluate once and stop")
    eval_hellaswag: bool = setting(False, "tell how many of HellaSwag's endings it finds, too (acc_norm)")
    hellaswag_input: str | None = setting(
        None, "another file of such questions; None is HellaSwag's own, downloaded once", path=True
    )
    hellaswag_items: int | None = setting(
        None, "so many of its questions, the first ones; None is all", at_least=1
    )
    eval_accuracy: bool = setting(
        False, "tell how many of val's lines it finishes exactly, from loss_after on, too"
    )
    eval_samples: int = setting(0, "so many samples to print, too", at_least=0)
    sample_start: str = setting("\n", "their prompt")
    sample_tokens: int = setting(100, "tokens of each", at_least=1)
    log_interval: int = setting(1, "steps between log lines", at_least=1)
    always_save_checkpoint: bool = setting(True, "write ckpt.pt at each evaluation, not only at the best")
    save_interval: int | None = setting(
        None, "steps between writings of last.pt, beside those at evaluations; None is none", at_least=1
    )
    keep_checkpoints: int = setting(0, "so many of the newest are kept as step-*.pt, too", at_least=0)
    skip_limit: int = setting(
        5, "a step without finite gradients is skipped; after so many in a row the run ends", at_least=1
    )
    wandb_log: bool = setting(False, "log to Weights & Biases too")
    wandb_project: str = setting("owt", "its project")
    wandb_run_name: str = setting("gpt2", "its run")
    tensorboard_log: bool = setting(False, "log to TensorBoard, out_dir/tensorboard, too")
    loss_plot: bool = setting(True, "redraw out_dir/loss.png at each evaluation, in the background")
    baseline_train_loss: float | None = setting(
        None, "a published train loss, told beside one's own", above=0
    )
    baseline_loss: float | None = setting(None, "a published val loss, told and drawn likewise", above=0)
    baseline_hellaswag: float | None = setting(
        None, "a published share of HellaSwag's questions, likewise", at_least=0, at_most=1
    )

    # batches: a step trains on gradient_accumulation_steps * batch_size * block_size tokens, over all ranks
    gradient_accumulation_steps: int = setting(40, "micro-steps per step, shared among the ranks", at_least=1)
    batch_size: int = setting(
        12, "sequences per micro-step; bench.py --find_batch=True finds the largest", at_least=1
    )
    block_size: int = setting(1024, "tokens per sequence, the longest context", at_least=1)
    sampling: str = setting(
        "random",
        "windows at random places; epochs: each window once per epoch; lines: from the begin of a line, each "
        "line once per epoch",
        choices=("random", "epochs", "lines"),
    )
    loss_after: str | None = setting(
        None, "a token, such as =: the loss counts what stands after it on its line; None counts all"
    )

    # model
    n_layer: int = setting(12, "transformer blocks", at_least=1)
    n_head: int = setting(12, "attention heads", at_least=1)
    n_embd: int = setting(768, "width; a multiple of n_head", at_least=1)
    dropout: float = setting(
        0.0, "for pretraining 0, for small sets and finetuning 0.1 and more", at_least=0, below=1
    )
    bias: bool = setting(False, "biases in the linear layers and LayerNorms (GPT-2 has them)")
    activation: str = setting(
        "gelu_tanh", "GPT-2's GELU; gelu is the exact one, five times as fast on CPUs", choices=ACTIVATIONS
    )
    # what came after GPT-2; model.py says what each does, BENCHMARKS.md what it gains
    norm: str = setting("layernorm", "rmsnorm normalises the length alone and has no weights", choices=NORMS)
    rotary: bool = setting(False, "positions by rotation of queries and keys, not by a table")
    qk_norm: bool = setting(False, "queries and keys of equal length, which bears higher learning rates")
    n_kv_head: int | None = setting(
        None, "heads of keys and values, a divisor of n_head: a smaller KV cache; None is n_head", at_least=1
    )
    tied: bool = setting(True, "one table reads and writes tokens; False: two")
    logit_softcap: float = setting(0.0, "bound of the logits; 0 is off", at_least=0)
    embedding_skip: bool = setting(False, "each block reads the embeddings, too, by weights that it learns")
    zero_init: bool = setting(False, "blocks begin as nothing, and a head of its own with equal chances")

    # optimizer and learning rate
    optimizer: str = setting(
        "adamw",
        "muon: for the matrices of the blocks, AdamW for the rest; sgd: with Nesterov's momentum",
        choices=OPTIMIZERS,
    )
    learning_rate: float = setting(6e-4, "the highest", above=0)
    muon_lr: float = setting(0.02, "the highest of Muon's matrices", above=0)
    embedding_lr: float | None = setting(None, "the highest of wte and wpe; None is learning_rate", above=0)
    head_lr: float | None = setting(None, "the highest of an untied lm_head; None is learning_rate", above=0)
    max_iters: int = setting(600_000, "optimizer steps in all", at_least=0)
    max_epochs: float | None = setting(
        None,
        "passes over the training data, instead of max_iters; a pass is as many samples as the data has "
        "windows, or lines with sampling=lines",
        above=0,
    )
    max_minutes: float | None = setting(
        None,
        "the run ends after the step in which it has taken so long in all; the schedule still goes by steps",
        above=0,
    )
    patience: int | None = setting(
        None, "evaluations in a row without a lower val loss, after which the run ends", at_least=1
    )
    weight_decay: float = setting(0.1, "of matrices and embeddings", at_least=0)
    beta1: float = setting(0.9, "AdamW's averaging of gradients", at_least=0, below=1)
    beta2: float = setting(0.95, "AdamW's averaging of squared gradients", at_least=0, below=1)
    momentum: float = setting(0.95, "Muon's and SGD's averaging of gradients", at_least=0, below=1)
    grad_clip: float = setting(1.0, "largest norm of the gradient; 0 is off", at_least=0)
    decay_lr: bool = setting(True, "warm up, then decay as lr_schedule says; False is constant")
    lr_schedule: str = setting(
        "cosine", "wsd: constant, then a linear fall in the last steps", choices=("cosine", "wsd")
    )
    cooldown: float = setting(0.4, "with wsd: the share of the steps in which it falls", above=0, at_most=1)
    warmup_iters: int = setting(2000, "steps of linear warm-up", at_least=0)
    lr_decay_iters: int | None = setting(None, "step where min_lr is reached; None is max_iters", at_least=1)
    min_lr: float | None = setting(
        None, "the lowest after warm-up; None is a tenth of learning_rate", at_least=0
    )

    # the machine
    device: str = setting("auto", "auto (cuda, else mps, else cpu), cpu, cuda, cuda:1, mps")
    dtype: str = setting(
        "auto",
        "of the arithmetic; auto is bfloat16 where the chip has it; float32 uses TF32 on a GPU",
        choices=DTYPES,
    )
    compile: bool | str = setting("auto", "torch.compile; auto weighs what it gains", choices=COMPILE)
    activation_checkpointing: bool = setting(
        False, "compute activations again for the gradient: less memory, a third more arithmetic"
    )
    shard: bool = setting(False, "share weights, gradients and averages among the ranks (FSDP2)")
    backend: str = setting("auto", "between ranks on GPUs", choices=("auto", "nccl", "gloo"))

    def __post_init__(self) -> None:
        check_settings(self)
        check_heads(self.n_embd, self.n_head, self.n_kv_head, self.rotary)
        if not self.out_dir or not self.dataset:
            raise ValueError("out_dir or dataset is empty; name a folder")


CHECKS = (
    *("machine", "network", "greedy", "compile", "fp16", "resume", "ranks", "synchronize", "memory"),
    None,
)


@dataclass
class BenchConfig(TrainConfig):
    """Time a training step as train.py does it, or sampling, beside the machine's limits and others.

    usage: python bench.py [config/NAME.py ...] [--setting=value ...]
           python bench.py --generate=True --against=../nanoGPT

    Takes all settings of train.py; those that no step needs change nothing.
    """

    gradient_accumulation_steps: int = setting(1, "micro-steps per step", at_least=1)
    batch_size: int | None = setting(
        None, "sequences per micro-step; None is 12 on a GPU, 1 on a CPU", at_least=1
    )
    real_data: bool = setting(True, "read the dataset; False: random ids of GPT-2's vocabulary")
    bench_steps: int = setting(20, "timed steps", at_least=1)
    warmup_steps: int = setting(3, "steps before them, compiling included", at_least=0)
    profile: bool = setting(False, "show the costliest operations and write bench_trace.json for a browser")
    ladder: bool = setting(False, "one improvement after another: a table and bench_ladder.png")
    checkpoint: bool = setting(False, "time what a checkpoint costs the steps")
    logs: bool = setting(False, "time what logs and plots cost the steps")
    questions: bool = setting(False, "time multiple choice, batched against one by one")
    serve: bool = setting(
        False, "time out_dir's model through serve.py, beside sample.py; 32 clients at once"
    )
    generate: bool = setting(False, "time sampling instead of training")
    max_new_tokens: int | None = setting(
        None, "with generate: tokens of a sample; None is 256, or what fits", at_least=3
    )
    num_samples: int = setting(10, "with generate: samples at once, beside one alone", at_least=1)
    rounds: int = setting(
        3, "with generate, checkpoint, logs, questions, serve: how often each is timed", at_least=1
    )
    against: str | None = setting(
        None, "time these too, in turns: a nanoGPT checkout's folder, or transformers", path=True
    )
    json: str | None = setting(None, "write the results to this file too", path=True)
    report: bool = setting(
        False, "measure and check all that matters on this machine: report/report.md and report.json"
    )
    report_minutes: float = setting(
        8.0, "with report: what does not fit is left out, last parts first", above=0
    )
    check: str | None = setting(None, "run one of the report's checks by itself", choices=CHECKS)
    find_batch: bool = setting(False, "the largest batch_size that fits, and the fastest; flags for both")
    plan: bool = setting(False, "say what the run would take on n_gpus: memory, time, exchange")
    gpu: str = setting(
        "here", "with plan: whose data sheet; here measures this machine", choices=("here", *GPUS)
    )
    n_gpus: int = setting(1, "with plan and find_batch: GPUs of the run", at_least=1, at_most=2**20)
    gpus_per_node: int | None = setting(
        None, "with plan: GPUs of a node; None is 8, or this machine's", at_least=1
    )
    mfu: float | None = setting(
        None,
        "with plan: share of the peak that arithmetic reaches, as train.py tells it; None: measured, or 0.4",
        above=0,
        at_most=1,
    )
    interconnect: float | None = setting(
        None, "with plan: Gbit/s of a GPU to other nodes; None is what is usual", above=0
    )


@dataclass
class AblateConfig(TrainConfig):
    """Train a recipe, the recipe without each of its ingredients, GPT-2, and GPT-2 with each of them.

    usage: python ablate.py config/train_shakespeare_cpu_modern.py [--setting=value ...]

    Takes all settings of train.py. Interrupted, it goes on where it was.
    """

    seeds: int = setting(3, "runs of each, with seeds from `seed` on", at_least=1)
    json: str = setting("ablate.json", "file of the runs made so far", path=True)
    plot: str = setting("ablate.png", "file of the plot", path=True)


@dataclass
class PlotConfig:
    """Draw the losses of runs beside each other, from their log.csv.

    usage: python plot.py OUT_DIR [OUT_DIR ...] [--setting=value ...]
    """

    by: str = setting("steps", "what goes to the right", choices=("steps", "tokens", "seconds"))
    output: str = setting("compare.png", "file of the picture: .png, .svg, .pdf", path=True)
    baseline_loss: float | None = setting(None, "a published val loss, as a line", above=0)
    baseline_hellaswag: float | None = setting(
        None, "a published share of HellaSwag's questions, as a line", at_least=0, at_most=1
    )
    follow: bool = setting(False, "redraw OUT_DIR/loss.png at each line on stdin, as train.py asks for it")

    def __post_init__(self) -> None:
        check_settings(self)


# what a sample's text depends on, beside its model and prompt, and how it is shown
SAMPLING_SETTINGS = (
    *("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"),
    *("stop", "stop_at_end", "best_of", "show_probs", "seed"),
)


@dataclass
class SampleConfig:
    """Sample text from a trained GPT, or from GPT-2.

    usage: python sample.py --out_dir=out-shakespeare-char [--setting=value ...]
           python sample.py --init_from=gpt2-xl --start="What is the answer?" --num_samples=5
    """

    init_from: str = setting(
        "resume", "resume (out_dir's checkpoint), gpt2[-medium|-large|-xl], or a folder", path=True
    )
    out_dir: str = setting("out", "folder of the checkpoint", path=True)
    start: str = setting("\n", "the prompt; FILE:path reads it from a file; empty starts a new document")
    prompts: str | None = setting(
        None,
        r"instead of start: a file of a prompt a line, or - for stdin; \n in a line is a newline, \t a tab",
        path=True,
    )
    interactive: bool = setting(False, "ask for prompts, one after another; /help there says more")
    num_samples: int = setting(10, "samples of each prompt; a single one is shown as it is made", at_least=1)
    batch_size: int = setting(64, "sequences at once; changes no text", at_least=1)
    max_new_tokens: int = setting(500, "tokens per sample, after the prompt", at_least=1)
    temperature: float = setting(
        0.8, "below 1 is safer, above 1 wilder, 0 always takes the likeliest", at_least=0
    )
    top_k: int | None = setting(200, "choose among this many likeliest tokens; None or 0 is all", at_least=0)
    top_p: float = setting(
        1.0, "choose among the likeliest that have this chance together; 1 is all", above=0, at_most=1
    )
    min_p: float = setting(
        0.0, "choose among those with this share of the likeliest one's chance", at_least=0, at_most=1
    )
    repetition_penalty: float = setting(
        1.0, "above 1, tokens that stand there already are less likely; 1 is off", at_least=0.01
    )
    seed: int = setting(1337, "same seed, same text", at_least=0, below=2**63)
    stop: tuple[str, ...] = setting((), r"a sample ends before this text; \n in it is a newline, \t a tab")
    stop_at_end: bool = setting(True, "a sample ends at the end-of-text token; False: it goes on")
    echo: bool = setting(True, "the prompt before each sample; False: only what is new")
    best_of: int = setting(
        1, "so many candidates for each sample: the one of the highest mean log-likelihood", at_least=1
    )
    show_probs: bool = setting(
        False, "each token's chance, nothing left out: as colours on a terminal, else in lines"
    )
    speak: str | None = setting(
        None, "say the samples too, in their order, into this .wav file; an older one is replaced", path=True
    )
    voice: str | None = setting(
        None,
        "of speak: a Piper voice, NAME.onnx with NAME.onnx.json beside it; system or None: the system's",
        path=True,
    )
    device: str = setting("auto", "auto (cuda, else mps, else cpu), cpu, cuda, cuda:1, mps")
    dtype: str = setting("auto", "of the arithmetic", choices=DTYPES)
    compile: bool = setting(False, "torch.compile the decoding of a token; on a CPU, it pays with int8")
    int8: bool = setting(
        False, "weights in 8 bits: less memory, a little less exact; faster on a CPU for a few samples"
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if (self.start != "\n") + (self.prompts is not None) + self.interactive > 1:
            raise ValueError("start, prompts and interactive all say what the prompt is; give one of them")
        if self.speak and self.interactive:
            raise ValueError("speak is for samples that come to an end; leave out interactive")
        if self.voice and not self.speak:
            raise ValueError("voice says nothing without speak; give --speak=out.wav, too")


@dataclass
class ServeConfig:
    """Serve a trained GPT, or GPT-2: a page to write with, and OpenAI's /v1/completions for other programs.

    usage: python serve.py --out_dir=out-shakespeare-char [--setting=value ...]
           python serve.py --init_from=gpt2 --host=0.0.0.0 --api_key=FILE:key.txt

    The page is at http://127.0.0.1:8000 and for this machine alone, unless host says otherwise.
    """

    init_from: str = setting(
        "resume", "resume (out_dir's checkpoint), gpt2[-medium|-large|-xl], or a folder", path=True
    )
    out_dir: str = setting("out", "folder of the checkpoint", path=True)
    host: str = setting("127.0.0.1", "address to listen on; 0.0.0.0 is all, and needs an api_key")
    port: int = setting(8000, "0 is any that is free", at_least=0, at_most=65535)
    api_key: str | None = setting(
        None,
        "what whoever asks has to know; FILE:path reads it from a file, which no list of processes shows",
    )
    batch_size: int = setting(16, "samples written at once; memory for their keys and values", at_least=1)
    queue: int = setting(64, "requests that may wait beside them; those above are refused", at_least=0)
    max_new_tokens: int = setting(4096, "the most that a request may ask for, of each sample", at_least=1)
    voice: str | None = setting(
        None, "reads texts aloud: a Piper voice, NAME.onnx; system is the system's; None: nobody", path=True
    )
    device: str = setting("auto", "auto (cuda, else mps, else cpu), cpu, cuda, cuda:1, mps")
    dtype: str = setting("auto", "of the arithmetic", choices=DTYPES)
    int8: bool = setting(False, "weights in 8 bits: less memory, a little less exact")

    def __post_init__(self) -> None:
        check_settings(self)
        if not self.host:
            raise ValueError("host is empty; name an address, such as 127.0.0.1")


@dataclass
class EvalConfig:
    """Measure a trained GPT, or GPT-2: its loss, what it knows, what it answers.

    usage: python eval.py --out_dir=out-addition [--setting=value ...]
           python eval.py --init_from=gpt2 --tasks=hellaswag
           python eval.py --out_dir=out --tasks=loss,next --stride=64 --start="To be or not"
    """

    init_from: str = setting(
        "resume", "resume (out_dir's checkpoint), gpt2[-medium|-large|-xl], or a folder", path=True
    )
    out_dir: str = setting("out", "folder of the checkpoint", path=True)
    tasks: str = setting(
        "auto",
        "some of loss, hellaswag, choice, accuracy, next, by comma; auto: accuracy after training with "
        "loss_after, else loss",
    )
    batch_size: int | None = setting(
        None, "sequences, questions or lines at once; None is 16, of lines 256", at_least=1
    )
    max_items: int | None = setting(
        None, "so many lines or questions, the first ones; None is all", at_least=1
    )
    show: int = setting(10, "wrong answers and next tokens to print", at_least=0)
    json: str | None = setting(None, "write the results to this file too", path=True)

    # loss, accuracy
    dataset: str | None = setting(None, "None is the one that the checkpoint names", path=True)
    split: str = setting("val", "of the dataset", choices=("train", "val"))
    block_size: int | None = setting(
        None, "loss: tokens of a window; None is what the model reads", at_least=1
    )
    stride: int | None = setting(
        None,
        "loss: tokens from window to window; a smaller one gives each token more context, and takes longer; "
        "None is block_size",
        at_least=1,
    )
    separator: str | None = setting(
        None, "accuracy: the token that ends a prompt; None is the checkpoint's loss_after, or else ="
    )
    # hellaswag, choice
    input: str | None = setting(
        None, 'file of JSON lines, {"ctx": "text", "endings": ["one", ...], "label": 0}', path=True
    )
    # next
    start: str = setting("\n", "the prompt; FILE:path reads it from a file; empty starts a new document")

    # the machine
    device: str = setting("auto", "auto (cuda, else mps, else cpu), cpu, cuda, cuda:1, mps")
    dtype: str = setting("auto", "of the arithmetic", choices=DTYPES)

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass
class ExportConfig:
    """Write a trained GPT in Hugging Face's format, a folder that transformers and others load.

    usage: python export.py --out_dir=out-shakespeare-char --to=my-model
           python export.py --init_from=gpt2 --to=gpt2-bf16 --dtype=bfloat16
    """

    init_from: str = setting(
        "resume", "resume (out_dir's checkpoint), gpt2[-medium|-large|-xl], or a folder", path=True
    )
    out_dir: str = setting("out", "folder of the checkpoint", path=True)
    to: str = setting("", "the folder to write", path=True)
    dtype: str = setting("float32", "of the weights", choices=DTYPES[1:])
    overwrite: bool = setting(False, "replace an export that is there")

    def __post_init__(self) -> None:
        check_settings(self)
        if not self.to:
            raise ValueError("to is empty; name the folder to write: --to=FOLDER")


def check_heads(n_embd: int, n_head: int, n_kv_head: int | None, rotary: bool) -> None:
    """Raises ValueError where the width cannot be shared among the heads, or the heads among fewer."""
    if n_embd % n_head:
        raise ValueError(
            f"n_embd={n_embd} is not divisible by n_head={n_head}; make it a multiple, or change n_head"
        )
    if n_head % (n_kv_head or n_head):
        raise ValueError(f"n_kv_head={n_kv_head} does not divide n_head={n_head}; choose a divisor")
    if rotary and n_embd // n_head % 2:
        raise ValueError(
            f"rotary turns pairs, but n_embd/n_head={n_embd // n_head} is odd; change n_embd or n_head"
        )
