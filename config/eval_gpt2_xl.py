# The loss of OpenAI's GPT-2 1558M on OpenWebText: python train.py eval_gpt2_xl

init_from = "gpt2-xl"
eval_only = True
eval_iters = 500  # batches of each split; the loss is then good to about 0.01
batch_size = 8
wandb_log = False
# as published, told beside what is found: losses by nanoGPT; acc_norm, with --eval_hellaswag=True, by
# build-nanogpt
baseline_train_loss = 2.56
baseline_loss = 2.54
baseline_hellaswag = 0.4893
