# The loss of OpenAI's GPT-2 774M on OpenWebText: python train.py eval_gpt2_large

init_from = "gpt2-large"
eval_only = True
eval_iters = 500  # batches of each split; the loss is then good to about 0.01
batch_size = 8
wandb_log = False
# as published, told beside what is found: the losses by nanoGPT
baseline_train_loss = 2.66
baseline_loss = 2.67
