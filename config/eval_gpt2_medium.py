# The loss of OpenAI's GPT-2 350M on OpenWebText: python train.py eval_gpt2_medium

init_from = "gpt2-medium"
eval_only = True
eval_iters = 500  # batches of each split; the loss is then good to about 0.01
batch_size = 8
wandb_log = False
# as published, told beside what is found: the losses by nanoGPT
baseline_train_loss = 2.85
baseline_loss = 2.84
