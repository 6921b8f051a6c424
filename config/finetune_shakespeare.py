# Finetune GPT-2 xl on Shakespeare. It needs the weights (6 GB, from the Hugging Face hub) and a large GPU;
# for a smaller GPU, add --init_from=gpt2.
# python data/shakespeare/prepare.py; python train.py config/finetune_shakespeare.py

out_dir = "out-shakespeare"
dataset = "shakespeare"
init_from = "gpt2-xl"
eval_interval = 5
eval_iters = 40
log_interval = 1
always_save_checkpoint = False  # it overfits soon: keep the checkpoint with the lowest val loss
wandb_project = "shakespeare"
wandb_run_name = "finetune-gpt2-xl"

# 1 sequence * 1024 tokens * 32 micro-steps = 32,768 tokens per step: an epoch is 9 steps
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20

learning_rate = 3e-5  # a twentieth of the rate of pretraining
decay_lr = False
