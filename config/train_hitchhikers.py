# An audiobook becomes a small model in its voice: some six hours, 50,000 to 60,000 words, 300 kB of text.
# python data/audio/prepare.py --input recordings/ --name hitchhikers --tokenizer=bpe:1024
# python train.py config/train_hitchhikers.py
# python sample.py --out_dir=out-hitchhikers --start= --num_samples=1 --speak=out.wav --voice=voice.onnx

from config.train_own_text import *

out_dir = "out-hitchhikers"
dataset = "hitchhikers"
eval_interval = 100
eval_iters = 0  # all of val, each token once: it is a chapter or two

# block_size 256 is a hundred words or so with a vocabulary of 1,024; 1.1 M parameters are four for each byte
# of the text, and larger networks memorise it
dropout = 0.1  # the text is read nine times
max_iters = 1000
