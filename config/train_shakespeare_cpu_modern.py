# The modern recipe on tiny Shakespeare, for 2 CPU cores: three minutes, start and evaluations included.
# python data/shakespeare_char/prepare.py; python train.py config/train_shakespeare_cpu_modern.py
# What each line gains: python ablate.py config/train_shakespeare_cpu_modern.py (a result is in BENCHMARKS.md)

out_dir = "out-shakespeare-cpu-modern"
dataset = "shakespeare_char"
device = "cpu"
compile = False  # compiling takes a sixth of the run

eval_interval = 250
eval_iters = 0  # all of val, each token once: no luck in the draw of batches
log_interval = 50
always_save_checkpoint = False  # keep the best on val

gradient_accumulation_steps = 1
batch_size = 4  # small steps and many: on few tokens, that learns more than fewer large ones
block_size = 256  # rotary positions and a longer context gain more than the attention costs
n_layer = 6
n_head = 6
n_embd = 192  # 2.7 M parameters: the most that three minutes can train
dropout = 0.0  # two times through the text are too few to learn it by heart

# the network
norm = "rmsnorm"  # no weights to learn
rotary = True  # positions relative to each other, at every layer
qk_norm = True  # lets the learning rate be higher
activation = "relu2"  # no slower than GELU
tied = False  # 65 characters: a second table is nearly free
logit_softcap = 15.0  # no gain at this size, nor cost; large models are steadier with it
embedding_skip = True  # later layers need not carry the character itself
zero_init = True  # the first steps train the head, then block after block

# the optimizer
optimizer = "muon"  # the largest gain of all
muon_lr = 0.01
learning_rate = 3e-3  # of the tables and vectors
lr_schedule = "wsd"
cooldown = 0.5  # half of the run
min_lr = 0.0
warmup_iters = 0  # zero_init and Muon's bounded steps make it needless
weight_decay = 0.0
max_iters = 2000
