# The modern recipe: GPT-2's network and optimizer with later improvements. A config that starts with
# `from config.modern import *` has these settings and can change some. docs/recipe.md explains each and names
# its paper; BENCHMARKS.md has its gain.

# the network
norm = "rmsnorm"  # without weights
rotary = True  # rotary position embeddings (RoPE) in every layer
qk_norm = True  # bounds the attention logits, which allows a higher learning rate
activation = "swiglu"  # a lower loss than relu2, which is a little faster
tied = False  # a separate lm_head, which costs little with a small vocabulary
logit_softcap = 15.0  # bounds the logits and so the gradients, which makes large models more stable
embedding_skip = True  # each block reads a learned mix of the residual stream and the embeddings
key_offset = True  # half of each key is that of the position before, which teaches to copy early
zero_init = True  # residual projections start at zero: the first steps train the head, later ones the blocks

# the optimizer
optimizer = "muon"  # the largest gain of all
muon_lr = 0.01
momentum = 0.9  # below Muon's usual 0.95, as the run is short
learning_rate = 3e-3  # of AdamW, which trains embeddings, head and vectors
lr_schedule = "wsd"
cooldown = 0.5
min_lr = 0.0
warmup_iters = 0  # not needed with zero_init and Muon's bounded updates
weight_decay = 0.1
