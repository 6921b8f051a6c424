# The demo: a small GPT that writes Python-like code, trained on the standard library of this machine.
# python data/stdlib_char/prepare.py; python train.py config/train_stdlib_char.py
# On 2 CPU cores it takes a minute or two.

from config.train_own_text import *

out_dir = "out-stdlib-char"
dataset = "stdlib_char"
eval_interval = 500
eval_iters = 20  # batches; enough to see the trend, and cheap
compile = False  # compiling takes longer than it saves
sampling = "random"  # the run is less than an epoch; block_size 256 is about eight lines of code
logit_softcap = 0.0
weight_decay = 0.0
max_iters = 2000
