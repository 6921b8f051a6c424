# Finetune GPT-2 on the transcript of an audiobook: about six hours, 300 kB of text, 75,000 tokens.
# It needs GPT-2's weights (0.5 GB, from the Hugging Face hub or a folder). A GPU is recommended.
# python data/audio/prepare.py --input recordings/ --name hitchhikers --tokenizer=gpt2
# python train.py config/finetune_hitchhikers.py
# python sample.py --out_dir=out-hitchhikers-gpt2 --start= --num_samples=1 --speak=out.wav --voice=voice.onnx

from config.finetune_own_text import *

out_dir = "out-hitchhikers-gpt2"
dataset = "hitchhikers"
eval_interval = 10  # about once per epoch
eval_iters = 0  # the whole val split, which is a chapter or two
patience = 3  # stop after 3 evaluations without a lower val loss, as a book is memorised in a few epochs

# 16 sequences of 512 tokens per step: an epoch is 9 steps. If memory is short, use batch_size=1
batch_size = 4
block_size = 512  # two or three minutes of speech; val must be longer
max_iters = 100  # eleven epochs at most
