# A character-level GPT on tiny Shakespeare, small enough for a laptop's CPU; nanoGPT's settings for a CPU.
# python data/shakespeare_char/prepare.py; python train.py config/train_shakespeare_cpu.py

out_dir = "out-shakespeare-cpu"
dataset = "shakespeare_char"
device = "cpu"
compile = False  # compiling takes half a minute, as long as the run
eval_interval = 250
eval_iters = 20  # batches; --eval_iters=0 is the whole val split
log_interval = 50
always_save_checkpoint = False  # keep the checkpoint with the lowest val loss

gradient_accumulation_steps = 1
batch_size = 12
block_size = 64
n_layer = 4
n_head = 4
n_embd = 128  # 0.8 M parameters
activation = "gelu"  # as in nanoGPT; on a CPU, GPT-2's tanh GELU takes a tenth of the step
dropout = 0.0  # too few parameters to overfit in 2000 steps

learning_rate = 1e-3  # small models allow more than GPT-2's 6e-4
max_iters = 2000
lr_decay_iters = 2000
min_lr = 1e-4
beta2 = 0.99  # few tokens per step make noisy gradients, which need a longer average
warmup_iters = 100
