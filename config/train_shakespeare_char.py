# A character-level GPT on tiny Shakespeare, for one GPU; nanoGPT's shape and length.
# python data/shakespeare_char/prepare.py; python train.py config/train_shakespeare_char.py

out_dir = "out-shakespeare-char"
dataset = "shakespeare_char"
eval_interval = 250  # often, as the model overfits within the run
eval_iters = 200
log_interval = 10
always_save_checkpoint = False  # keep the checkpoint with the lowest val loss
wandb_project = "shakespeare-char"
wandb_run_name = "mini-gpt"

gradient_accumulation_steps = 1
batch_size = 64
block_size = 256
n_layer = 6
n_head = 6
n_embd = 384  # 10.7 M parameters
activation = "gelu"  # as in nanoGPT; on CPUs several times as fast as GPT-2's tanh GELU
dropout = 0.2  # ten times more parameters than characters

learning_rate = 1e-3  # small models allow more than GPT-2's 6e-4
max_iters = 5000
lr_decay_iters = 5000
min_lr = 1e-4
beta2 = 0.99  # few tokens per step make noisy gradients, which need a longer average
warmup_iters = 100
