# Train a small GPT on your own text, with fixed settings; --minutes chooses them instead (docs/minutes.md).
# python data/text/prepare.py --input mybook.txt --name mybook
# python train.py config/train_own_text.py --dataset=mybook --out_dir=out-mybook

from config.modern import *

out_dir = "out-own-text"
dataset = "mybook"
init_from = "auto"  # run the same command again to resume
eval_interval = 400
eval_iters = 100  # batches; 0 is the whole val split
log_interval = 50
always_save_checkpoint = False  # ckpt.pt has the lowest val loss; later, the model memorises the text

# for about a megabyte of text; use a larger network and more steps for more text, fewer steps for less
gradient_accumulation_steps = 1
batch_size = 4  # few tokens per step and many steps: larger batches learn less in the same time
block_size = 256  # context length in tokens
sampling = "epochs"  # each window once per epoch
n_layer = 4
n_head = 4
n_embd = 128
dropout = 0.0
weight_decay = 0.1  # for more than ten epochs, try 1 or 2
max_iters = 4000
