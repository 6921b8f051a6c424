# Tiny Shakespeare in ten seconds on 2 CPU cores, start included: the loss of nanoGPT's CPU run after 75 s.
# python data/shakespeare_char/prepare.py; python train.py config/train_shakespeare_10s.py

from config.modern import *

out_dir = "out-shakespeare-10s"
dataset = "shakespeare_char"
device = "cpu"
compile = False  # compiling takes three times as long as the run

eval_interval = 500  # at the start and at the end
eval_iters = 20  # batches; --eval_iters=0 is the whole val set, a second more
log_interval = 50
loss_plot = False  # the picture takes half a second of the ten

# nanoGPT's shape for a CPU
gradient_accumulation_steps = 1
batch_size = 12
block_size = 64
sampling = "epochs"
n_layer = 4
n_head = 4
n_embd = 128
logit_softcap = 0.0
weight_decay = 0.0
max_iters = 240
