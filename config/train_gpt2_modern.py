# The modern recipe in the size of GPT-2 124M, on OpenWebText, for 8 GPUs with 40 GB or more:
# python data/openwebtext/prepare.py; torchrun --standalone --nproc_per_node=8 train.py train_gpt2_modern
# The values are from published speed runs; for measurements of this repository, see BENCHMARKS.md.

from config.modern import *
from config.train_gpt2 import *  # the same batches, so that losses can be compared step by step

out_dir = "out-gpt2-modern"
wandb_run_name = "gpt2-124M-modern"

n_head = 6  # head dimension 128, for which attention kernels are optimised
activation = "relu2"  # as fast as GELU, with a slightly lower loss
# with tied=False, 163 M parameters, but as many FLOPs per token as GPT-2 124M

muon_lr = 0.02  # the size of Muon's updates does not depend on the gradient
momentum = 0.95
weight_decay = 0.0  # a single epoch
cooldown = 0.4  # to prolong a run, stop it before the cooldown, and resume with a larger max_iters
warmup_iters = 250
max_iters = 19_000  # 9.3 billion tokens, one epoch of OpenWebText
lr_decay_iters = None  # at max_iters
