# Continue arithmetic sequences (17,20,23=26,29,32): a minute on 2 CPU cores.
# python data/sequence/prepare.py; python train.py train_sequence; python eval.py --out_dir=out-sequence

from config.train_addition import *

out_dir = "out-sequence"
dataset = "sequence"
batch_size = 64  # lines; 35 epochs of 7,290 lines. 128 lines and half the steps make more errors
block_size = 24  # the longest line has 24 characters
max_iters = 4000  # the last errors are the few lines that begin below 10
