# The loss of OpenAI's GPT-2 774M on OpenWebText: python train.py eval_gpt2_large

from config.eval_gpt2 import *

init_from = "gpt2-large"
baseline_train_loss = 2.66
baseline_loss = 2.67
baseline_hellaswag = None  # not published
