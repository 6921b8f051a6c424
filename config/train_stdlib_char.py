# The demo: a small GPT that writes Python-like code, trained on the standard library of this machine.
# python data/stdlib_char/prepare.py; python train.py config/train_stdlib_char.py
# On 2 CPU cores it takes a minute or two.

out_dir = "out-stdlib-char"
dataset = "stdlib_char"
init_from = "auto"  # the same command goes on where it was interrupted

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
dropout = 0.0  # 8 million characters are more than this model can learn by heart

# the modern recipe, explained in train_shakespeare_cpu_modern.py; ablate.py shows what each of it gains
norm = "rmsnorm"
rotary = True
qk_norm = True
activation = "swiglu"
tied = False
embedding_skip = True
zero_init = True
optimizer = "muon"
muon_lr = 0.01
momentum = 0.9
learning_rate = 3e-3
weight_decay = 0.0
lr_schedule = "wsd"
cooldown = 0.5
min_lr = 0.0
warmup_iters = 0
max_iters = 2000
