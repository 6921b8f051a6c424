"""Write the lines that nanoGPT prints as a log.csv, which plot.py draws beside runs of this repository:

python -u train.py config/train_shakespeare_char.py ... | python nanogpt_log.py TOKENS_PER_STEP > log.csv

Seconds are counted from the last line that nanoGPT prints before its training loop. The whole command is in
docs/data/README.md.
"""

import argparse
import csv
import re
import sys
import time

BEFORE_THE_LOOP = "parameter tensors"  # in the last lines that nanoGPT prints before it
EVALUATION = re.compile(r"step (\d+): train loss ([\d.]+), val loss ([\d.]+)")
STEP = re.compile(r"iter (\d+): loss ([\d.]+)")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tokens_per_step", type=int)
    tokens_per_step = parser.parse_args().tokens_per_step
    rows = csv.writer(sys.stdout, lineterminator="\n")
    rows.writerow(["step", "tokens", "seconds", "loss", "train_loss", "val_loss"])
    start = time.perf_counter()
    for line in sys.stdin:
        if BEFORE_THE_LOOP in line:
            start = time.perf_counter()
        seconds = round(time.perf_counter() - start, 3)
        if match := EVALUATION.match(line):
            step, train, val = match.groups()
            rows.writerow([step, int(step) * tokens_per_step, seconds, "", train, val])
        elif match := STEP.match(line):  # nanoGPT counts a step from 0, log.csv from 1
            step, loss = match.groups()
            rows.writerow([int(step) + 1, (int(step) + 1) * tokens_per_step, seconds, loss, "", ""])


if __name__ == "__main__":
    main()
