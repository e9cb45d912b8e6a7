"""What small state and parameters of 16 bits do to training: final loss and test accuracy of AdamW over several seeds.

    python bench/quality.py                                                     the UCI digits
    python bench/quality.py --data DIR --epochs 15 --batch-size 256             IDX files, for example Fashion-MNIST's, which
                                                                                Debian's dataset-fashion-mnist has

All begin with the same weights and see the same batches, seed by seed. The learning rate goes down to 0 along a cosine:
where it stays, final losses differ by more from seed to seed than there is to see. Other options are those of ``train``.
"""

import argparse
import statistics

import numpy as np

from fusedstep.demo import train
from fusedstep.demo.data import load
from fusedstep.progress import progress

SEEDS = range(5)
BFLOAT16 = ["--precision", "bfloat16", "--low-precision"]
WAYS = {
    "float32": [],
    "state in bfloat16": ["--state-dtype", "bfloat16"],
    "state in 8 bits": ["--state-dtype", "int8"],
    "parameters in bfloat16, nearest": [*BFLOAT16, "nearest"],
    "parameters in bfloat16, stochastic": [*BFLOAT16, "stochastic"],
    "parameters in bfloat16, kahan": [*BFLOAT16, "kahan"],
    "parameters in bfloat16, split": [*BFLOAT16, "split"],
    "parameters in bfloat16, master": [*BFLOAT16, "master"],
    "both in bfloat16, stochastic": [*BFLOAT16, "stochastic", "--state-dtype", "bfloat16"],
    "stochastic, state in 8 bits": [*BFLOAT16, "stochastic", "--state-dtype", "int8"],
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    train.add_arguments(parser)
    parser.set_defaults(rule="adamw", schedule="cosine")
    data = load(parser.parse_args().data, np.float32)
    rows = {}
    for way, options in progress(WAYS.items()):
        args = parser.parse_args(options, parser.parse_args())
        runs = []
        for seed in SEEDS:
            args.seed = seed
            runs.append(train.train(train.Loop(args, data, args.rule)))
        rows[way] = runs
    print(f"{data.name}, {args.rule}, {args.epochs} epochs, seeds {SEEDS[0]} to {SEEDS[-1]}\n")
    print(f"{'':36} loss (least to most)         of float32's   test accuracy (least to most)")
    of_float32 = statistics.mean(run.train_loss for run in rows["float32"])
    for way, runs in rows.items():
        losses, accuracies = [run.train_loss for run in runs], [run.test_accuracy for run in runs]
        print(
            f"{way:36} {statistics.mean(losses):.5f} ({min(losses):.5f} to {max(losses):.5f}) "
            f"{statistics.mean(losses) / of_float32:10.4f}   "
            f"{statistics.mean(accuracies):10.2%} ({min(accuracies):.2%} to {max(accuracies):.2%})"
        )


if __name__ == "__main__":
    main()
