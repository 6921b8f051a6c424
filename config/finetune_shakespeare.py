# GPT-2 xl learns to write like Shakespeare. It needs the weights (6 GB, from the hub) and a large GPU;
# --init_from=gpt2 does for smaller ones.
# python data/shakespeare/prepare.py; python train.py config/finetune_shakespeare.py

out_dir = "out-shakespeare"
dataset = "shakespeare"
init_from = "gpt2-xl"
eval_interval = 5
eval_iters = 40
log_interval = 1
always_save_checkpoint = False  # it overfits soon: keep the best on val
wandb_project = "shakespeare"
wandb_run_name = "finetune-gpt2-xl"

# 1 sequence * 1024 tokens * 32 micro-steps = 32,768 tokens a step, so that an epoch is 9 steps
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20

learning_rate = 3e-5  # a twentieth of pretraining's: the weights are nearly right
decay_lr = False
