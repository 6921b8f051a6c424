# Tiny Shakespeare in ten seconds on 2 CPU cores, including startup: the loss of nanoGPT's CPU run after 75 s.
# python data/shakespeare_char/prepare.py; python train.py config/train_shakespeare_10s.py

from config.train_shakespeare_cpu_modern import *

out_dir = "out-shakespeare-10s"
eval_interval = 100_000  # evaluate at the start and at the end
eval_iters = 20  # batches; --eval_iters=0 is the whole val split and takes a second more
always_save_checkpoint = True
loss_plot = False  # it takes half a second of the ten
batch_size = 12  # batch_size and block_size are nanoGPT's for a CPU
block_size = 64
logit_softcap = 0.0
weight_decay = 0.0
max_minutes = 1 / 6
