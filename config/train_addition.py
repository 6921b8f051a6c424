# Sums of numbers of up to two digits, learned from 9,000 of the 10,000: 40 seconds on 2 CPU cores.
# python data/addition/prepare.py; python train.py train_addition; python eval.py --out_dir=out-addition

from config.modern import *

out_dir = "out-addition"
dataset = "addition"
device = "cpu"
compile = False  # compiling takes as long as the run

sampling = "lines"  # each window starts with a line, as eval.py's prompts do; each line once per epoch
loss_after = "="  # only the answers count for the loss, as the problems are random

eval_interval = 500
eval_iters = 0  # all held-out lines, one window each
log_interval = 100
always_save_checkpoint = True  # keep the last checkpoint: the lines of eval.py must not choose the best one

gradient_accumulation_steps = 1
batch_size = 64  # lines; 28 epochs of 9,000 lines. 128 lines and half the steps make more errors
block_size = 16  # the longest line has 10 characters
n_layer = 2
n_head = 4
n_embd = 64  # 0.1 M parameters are enough
dropout = 0.0

activation = "relu2"  # faster than swiglu
logit_softcap = 0.0
muon_lr = 0.02
momentum = 0.95
cooldown = 0.5  # the loss is noisy at a high rate; the cooldown removes the last errors
max_iters = 4000  # the last errors are the few sums of two numbers below 10
