# The loss of OpenAI's GPT-2 1558M on OpenWebText: python train.py eval_gpt2_xl

from config.eval_gpt2 import *

init_from = "gpt2-xl"
baseline_train_loss = 2.56
baseline_loss = 2.54
baseline_hellaswag = 0.4893
