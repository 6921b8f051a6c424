# GPT-2 124M's size with what came since, on OpenWebText, for 8 GPUs with 40 GB or more:
# python data/openwebtext/prepare.py; torchrun --standalone --nproc_per_node=8 train.py train_gpt2_modern

# The values are those of the published speed runs; BENCHMARKS.md tells what was measured here.

out_dir = "out-gpt2-modern"
wandb_project = "owt"
wandb_run_name = "gpt2-124M-modern"

# 491,520 tokens a step, as train_gpt2.py has them, so that losses compare step by step
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8

n_layer = 12
n_head = 6  # 128 channels a head, which attention kernels are made for
n_embd = 768  # with a head of its own, 163 M parameters; as many products per token as GPT-2's 124 M
norm = "rmsnorm"  # no weights to learn
rotary = True  # positions relative to each other, at every layer
qk_norm = True  # scores cannot grow large, so the learning rate can be higher
activation = "relu2"  # no slower than GELU, and learns a little more
tied = False  # reading and writing need different tables
logit_softcap = 15.0  # keeps the logits, and so the gradients, from running away
embedding_skip = True  # later layers need not carry the token itself
zero_init = True  # the first steps train the head, then block after block

optimizer = "muon"
muon_lr = 0.02  # Muon's own; its updates have the same size whatever the gradient's
learning_rate = 3e-3  # of tables and vectors, with AdamW
weight_decay = 0.0  # one time through the text: there is nothing to unlearn
lr_schedule = "wsd"
cooldown = 0.4  # until it begins, a run can be prolonged: stop it, and resume with a larger max_iters
min_lr = 0.0
warmup_iters = 250
max_iters = 19_000  # 9.3 billion tokens, once through OpenWebText

eval_interval = 1000
eval_iters = 200
log_interval = 10

# published for GPT-2 124M: nanoGPT's README, on OpenWebText; acc_norm by build-nanogpt's method
baseline_loss = 3.12
baseline_hellaswag = 0.2955
