# The modern recipe on tiny Shakespeare, for 2 CPU cores: three minutes, start and evaluations included.
# python data/shakespeare_char/prepare.py; python train.py config/train_shakespeare_cpu_modern.py
# What each ingredient gains: python ablate.py train_shakespeare_cpu_modern (a result is in BENCHMARKS.md)

out_dir = "out-shakespeare-cpu-modern"
dataset = "shakespeare_char"
device = "cpu"
compile = False  # compiling takes a sixth of the run

eval_interval = 1000
eval_iters = 0  # all of val, each token once: no luck in the draw of batches
log_interval = 50
always_save_checkpoint = False  # stop at the best: ckpt.pt is it

gradient_accumulation_steps = 1
batch_size = 4  # few tokens a step and many steps: larger ones learn less in the same time
block_size = 256  # a longer context gains more than its attention costs
sampling = "epochs"  # each window once before any a second time
n_layer = 4
n_head = 4  # two heads are a tenth faster, but end higher
n_embd = 128  # 0.8 M parameters: larger models make too few steps in three minutes
dropout = 0.0  # five times through the text do not suffice to learn it by heart; 0.1 ends higher

# the network
norm = "rmsnorm"  # no weights to learn
rotary = True  # positions relative to each other, at every layer
qk_norm = True  # lets the learning rate be higher
activation = "swiglu"  # learns more than relu2, which is a little faster
tied = False  # 65 characters: a second table is nearly free
logit_softcap = 15.0  # costs nothing; large models are steadier with it
embedding_skip = True  # later layers need not carry the character itself
zero_init = True  # the first steps train the head, then block after block

# the optimizer
optimizer = "muon"  # the largest gain of all
muon_lr = 0.01
momentum = 0.9  # a short run should follow its gradients sooner than with Muon's usual 0.95
learning_rate = 3e-3  # of the tables and vectors
lr_schedule = "wsd"
cooldown = 0.5
min_lr = 0.0
warmup_iters = 0  # zero_init and Muon's bounded steps make it needless
weight_decay = 0.1  # against what the later epochs learn by heart
max_iters = 4000
