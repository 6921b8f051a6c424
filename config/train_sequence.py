# Arithmetic sequences to continue (17,20,23=26,29,32): a minute on 2 CPU cores.
# python data/sequence/prepare.py; python train.py train_sequence; python eval.py --out_dir=out-sequence

out_dir = "out-sequence"
dataset = "sequence"
device = "cpu"
compile = False  # compiling takes as long as the run

sampling = "lines"  # a line at the begin of each window, as eval.py's prompts are, and each once per epoch
loss_after = "="  # problems are random, so what is before it cannot be predicted: learn the answers alone

eval_interval = 500
eval_iters = 0  # a window for each held-out line
log_interval = 100
always_save_checkpoint = True  # the last, not the best on the lines that eval.py asks: those choose nothing

gradient_accumulation_steps = 1
batch_size = 64  # lines, of 7,290: 35 epochs; 128 in half the steps err more often
block_size = 24  # the longest line has 24 characters
n_layer = 2
n_head = 4
n_embd = 64  # 0.1 M parameters suffice
dropout = 0.0

# the recipe, explained in train_shakespeare_cpu_modern.py
norm = "rmsnorm"
rotary = True
qk_norm = True
activation = "relu2"  # faster than swiglu
tied = False
embedding_skip = True
zero_init = True
optimizer = "muon"
muon_lr = 0.02
learning_rate = 3e-3
lr_schedule = "wsd"
cooldown = 0.5  # the loss jumps while the rate is high; the last errors go while it falls
min_lr = 0.0
warmup_iters = 0
weight_decay = 0.1
max_iters = 4000  # what errs at last are the few lines that begin below 10
