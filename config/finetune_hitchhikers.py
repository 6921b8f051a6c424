# GPT-2 learns to write as an audiobook sounds: some six hours, 300 kB of text, 75,000 of its tokens.
# It needs GPT-2's weights (0.5 GB, from the hub, or a folder) and a GPU, or some patience.
# python data/audio/prepare.py --input recordings/ --name hitchhikers --tokenizer=gpt2
# python train.py config/finetune_hitchhikers.py
# python sample.py --out_dir=out-hitchhikers-gpt2 --start= --num_samples=1 --speak=out.wav --voice=voice.onnx

from config.finetune_own_text import *

out_dir = "out-hitchhikers-gpt2"
dataset = "hitchhikers"
eval_interval = 10  # about once per epoch
eval_iters = 0  # all of val, each token once: it is a chapter or two
patience = 3  # evaluations without a lower val loss: a book is memorised in few epochs

# 16 sequences of 512 tokens a step, so that an epoch is 9 steps; if memory is short, batch_size=1
batch_size = 4
block_size = 512  # two or three minutes of speech; val must be longer
max_iters = 100  # eleven epochs at most
