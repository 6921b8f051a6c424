# The modern recipe: GPT-2's network and optimizer with the improvements since. A config that begins with
# `from config.modern import *` has these settings and changes some. README.md names the paper of each, and
# BENCHMARKS.md what each gains.

# the network
norm = "rmsnorm"  # no weights to learn
rotary = True  # relative positions, at every layer
qk_norm = True  # attention scores stay bounded, so the learning rate can be higher
activation = "swiglu"  # learns more than relu2, which is a little faster
tied = False  # a separate lm_head, nearly free with a small vocabulary
logit_softcap = 15.0  # keeps the logits and so the gradients bounded; large models are steadier with it
embedding_skip = True  # later layers need not carry the token itself
zero_init = True  # the first steps train the head, then block after block

# the optimizer
optimizer = "muon"  # the largest gain of all
muon_lr = 0.01
momentum = 0.9  # a short run should follow its gradients sooner than with Muon's usual 0.95
learning_rate = 3e-3  # of embeddings, head and vectors, with AdamW
lr_schedule = "wsd"
cooldown = 0.5
min_lr = 0.0
warmup_iters = 0  # not needed with zero_init and Muon's bounded steps
weight_decay = 0.1
