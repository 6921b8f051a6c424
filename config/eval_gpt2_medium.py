# The loss of OpenAI's GPT-2 350M on OpenWebText: python train.py eval_gpt2_medium

from config.eval_gpt2 import *

init_from = "gpt2-medium"
baseline_train_loss = 2.85
baseline_loss = 2.84
baseline_hellaswag = None  # not published
