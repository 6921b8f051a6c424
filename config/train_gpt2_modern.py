# GPT-2 124M's size with the improvements since, on OpenWebText, for 8 GPUs with 40 GB or more:
# python data/openwebtext/prepare.py; torchrun --standalone --nproc_per_node=8 train.py train_gpt2_modern
# The values are those of the published speed runs; BENCHMARKS.md has what was measured here.

from config.modern import *
from config.train_gpt2 import *  # the same batches, so that losses compare step by step

out_dir = "out-gpt2-modern"
wandb_run_name = "gpt2-124M-modern"

n_head = 6  # 128 channels a head, for which attention kernels are optimised
activation = "relu2"  # as fast as GELU, and learns a little more
# with tied=False 163 M parameters, with as many products per token as GPT-2's 124 M

muon_lr = 0.02  # Muon's updates have the same size whatever the gradient's
momentum = 0.95
weight_decay = 0.0  # a single epoch
cooldown = 0.4  # before it begins, a run can be prolonged: stop it, and resume with a larger max_iters
warmup_iters = 250
max_iters = 19_000  # 9.3 billion tokens, one epoch of OpenWebText
lr_decay_iters = None  # at max_iters
