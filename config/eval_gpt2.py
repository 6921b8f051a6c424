# The loss of OpenAI's GPT-2 124M on OpenWebText: python train.py eval_gpt2

init_from = "gpt2"
eval_only = True
eval_iters = 500  # batches of each split; the loss is then accurate to about 0.01
batch_size = 8
wandb_log = False
# published values, printed beside the measured ones: losses from nanoGPT and, for --eval_hellaswag=True,
# acc_norm from build-nanogpt
baseline_train_loss = 3.11
baseline_loss = 3.12
baseline_hellaswag = 0.2955
