# Sums of numbers of up to two digits, learned from 9,000 of the 10,000: 40 seconds on 2 CPU cores.
# python data/addition/prepare.py; python train.py train_addition; python eval.py --out_dir=out-addition

from config.modern import *

out_dir = "out-addition"
dataset = "addition"
device = "cpu"
compile = False  # compiling takes as long as the run

sampling = "lines"  # each window begins with a line, as eval.py's prompts do, and each line once per epoch
loss_after = "="  # problems are random and cannot be predicted: learn the answers alone

eval_interval = 500
eval_iters = 0  # a window for each held-out line
log_interval = 100
always_save_checkpoint = True  # the last, not the best on the lines that eval.py asks: those choose nothing

gradient_accumulation_steps = 1
batch_size = 64  # lines, of 9,000: 28 epochs; 128 in half the steps err more often
block_size = 16  # the longest line has 10 characters
n_layer = 2
n_head = 4
n_embd = 64  # 0.1 M parameters suffice
dropout = 0.0

activation = "relu2"  # faster than swiglu
logit_softcap = 0.0
muon_lr = 0.02
momentum = 0.95
cooldown = 0.5  # the loss jumps while the rate is high; the last errors go in the cooldown
max_iters = 4000  # the last errors are the few sums of two numbers below 10
