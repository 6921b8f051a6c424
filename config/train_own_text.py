# A small GPT learns to write like you. data/text/prepare.py prints this command with what fits your text:
# python data/text/prepare.py --input mybook.txt --name mybook
# python train.py config/train_own_text.py --dataset=mybook --out_dir=out-mybook

from config.modern import *

out_dir = "out-own-text"
dataset = "mybook"
init_from = "auto"  # the same command resumes a run that was interrupted
eval_interval = 400
eval_iters = 100  # batches; 0 is all of val, each token once
log_interval = 50
always_save_checkpoint = False  # ckpt.pt is the best so far: later the model only memorises

# for a megabyte or so; more text bears a larger network and more steps, a few pages not even these
gradient_accumulation_steps = 1
batch_size = 4  # few tokens a step and many steps: larger batches learn less in the same time
block_size = 256  # the context that the network can see
sampling = "epochs"  # each passage once before any a second time
n_layer = 4
n_head = 4
n_embd = 128
dropout = 0.0
weight_decay = 0.1  # more than ten epochs may want 1 or 2
max_iters = 4000
