# GPT-2 124M on OpenWebText, for 8 GPUs with 40 GB or more:
# python data/openwebtext/prepare.py; torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py

out_dir = "out-gpt2"
wandb_log = False  # True logs to wandb.ai
wandb_project = "owt"
wandb_run_name = "gpt2-124M"

# 12 sequences * 1024 tokens * 40 micro-steps (5 on each of 8 GPUs) = 491,520 tokens per step
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8

max_iters = 600_000  # 300 billion tokens
lr_decay_iters = 600_000
weight_decay = 1e-1

eval_interval = 1000
eval_iters = 200
log_interval = 10

# published for GPT-2 124M: the loss on OpenWebText by nanoGPT, acc_norm by build-nanogpt
baseline_loss = 3.12
baseline_hellaswag = 0.2955
