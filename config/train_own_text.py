# A small GPT learns to write like you. data/text/prepare.py prints this command with what fits your text:
# python data/text/prepare.py --input mybook.txt --name mybook
# python train.py config/train_own_text.py --dataset=mybook --out_dir=out-mybook

out_dir = "out-own-text"
dataset = "mybook"
init_from = "auto"  # the same command goes on where it was interrupted

eval_interval = 400
eval_iters = 100  # batches; 0 is all of val, each token once
log_interval = 50
always_save_checkpoint = False  # ckpt.pt is the best so far: what comes after it was learned by heart

# for a megabyte or so; more text bears a larger network and more steps, a few pages not even these
gradient_accumulation_steps = 1
batch_size = 4  # few tokens a step and many steps: larger ones learn less in the same time
block_size = 256  # what the network can look back to
sampling = "epochs"  # each passage once before any a second time
n_layer = 4
n_head = 4
n_embd = 128
dropout = 0.0
max_iters = 4000

# the modern recipe, explained in train_shakespeare_cpu_modern.py
norm = "rmsnorm"
rotary = True
qk_norm = True
activation = "swiglu"
tied = False
logit_softcap = 15.0
embedding_skip = True
zero_init = True
optimizer = "muon"
muon_lr = 0.01
momentum = 0.9
learning_rate = 3e-3
weight_decay = 0.1  # a text that is read more than ten times may want 1 or 2
lr_schedule = "wsd"
cooldown = 0.5
min_lr = 0.0
warmup_iters = 0
