# Convert numbers up to 3,999 to Roman numerals, learned from 3,599 of them: half a minute on 2 CPU cores.
# python data/roman/prepare.py; python train.py train_roman; python eval.py --out_dir=out-roman

from config.train_addition import *

out_dir = "out-roman"
dataset = "roman"
batch_size = 128  # lines; 53 epochs of 3,599 lines
block_size = 24  # the longest line has 21 characters
max_iters = 1500  # enough to remove all errors
