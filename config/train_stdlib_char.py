# The demo: a small GPT that writes Python-like code, trained on the standard library of this machine.
# python data/stdlib_char/prepare.py; python train.py config/train_stdlib_char.py
# On 2 CPU cores it takes a minute or two.

from config.modern import *

out_dir = "out-stdlib-char"
dataset = "stdlib_char"
init_from = "auto"  # the same command resumes a run that was interrupted

eval_interval = 500
eval_iters = 20  # batches; enough to see the trend, and cheap
log_interval = 50
always_save_checkpoint = False  # ckpt.pt is the best so far

compile = False  # the run would be over before compiling pays

gradient_accumulation_steps = 1
batch_size = 4
block_size = 256  # about eight lines of code
n_layer = 4
n_head = 4
n_embd = 128  # 0.8 M parameters
dropout = 0.0  # 8 million characters are more than this model can memorise
logit_softcap = 0.0
weight_decay = 0.0
max_iters = 2000
