# The demo: a small GPT that writes Python-like code, trained on the standard library of this machine.
# python data/stdlib_char/prepare.py; python train.py config/train_stdlib_char.py
# On 2 CPU cores it takes under 3 minutes.

out_dir = "out-stdlib-char"
dataset = "stdlib_char"
init_from = "auto"  # the same command goes on where it was interrupted

eval_interval = 250
eval_iters = 20  # batches; enough to see the trend, and cheap
log_interval = 50
always_save_checkpoint = False  # ckpt.pt is the best so far

compile = False  # the run would be over before compiling pays

gradient_accumulation_steps = 1
batch_size = 12
block_size = 128  # about four lines of code
n_layer = 4
n_head = 4
n_embd = 128  # 0.8 M parameters
activation = "gelu"  # on a CPU, GPT-2's tanh GELU takes a tenth of the step
dropout = 0.0  # 8 million characters are more than this model can learn by heart

learning_rate = 4e-3  # a model this small bears much more than GPT-2's 6e-4; 2e-3 ends 0.06 higher
max_iters = 2000
warmup_iters = 100
beta2 = 0.99  # few tokens a step make noisy gradients; average over more of them
