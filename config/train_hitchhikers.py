# Train a small GPT on the transcript of an audiobook: about six hours, 50,000 to 60,000 words, 300 kB.
# python data/audio/prepare.py --input recordings/ --name hitchhikers --tokenizer=bpe:1024
# python train.py config/train_hitchhikers.py
# python sample.py --out_dir=out-hitchhikers --start= --num_samples=1 --speak=out.wav --voice=voice.onnx

from config.train_own_text import *

out_dir = "out-hitchhikers"
dataset = "hitchhikers"
eval_interval = 100
eval_iters = 0  # the whole val split, which is a chapter or two

# With a vocabulary of 1,024, block_size 256 is about a hundred words. 1.1 M parameters are four per byte of
# text; larger networks memorise it.
dropout = 0.1  # the run is nine epochs
max_iters = 1000
