# The modern recipe on tiny Shakespeare, for 2 CPU cores: three minutes, including startup and evaluations.
# python data/shakespeare_char/prepare.py; python train.py config/train_shakespeare_cpu_modern.py
# To measure the gain of each ingredient: python ablate.py train_shakespeare_cpu_modern (see BENCHMARKS.md)

from config.modern import *

out_dir = "out-shakespeare-cpu-modern"
dataset = "shakespeare_char"
device = "cpu"
compile = False  # compiling takes a sixth of the run
eval_interval = 1000
eval_iters = 0  # the whole val split: no noise from sampling batches
log_interval = 50
always_save_checkpoint = False  # ckpt.pt has the lowest val loss

gradient_accumulation_steps = 1
batch_size = 4  # few tokens per step and many steps: larger batches learn less in the same time
block_size = 256  # a longer context gains more than its attention costs
sampling = "epochs"  # each window once per epoch
n_layer = 4
n_head = 4  # two heads are a tenth faster, but end with a higher loss
n_embd = 128  # 0.8 M parameters; larger models run too few steps in three minutes
dropout = 0.0  # five epochs are too few to memorise the text; 0.1 ends with a higher loss
max_minutes = 3  # about 4,500 steps on a Zen 5; the schedule is fitted to the machine
