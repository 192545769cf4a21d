"""Measures the float model's perplexity on the evaluation text.

Run from the repository's root: python -m examples.smollm2.perplexity
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import nn

from examples.smollm2.model import evaluation, load


@torch.no_grad()
def perplexity(model: nn.Module, windows: int, seq: int) -> float:
    """Returns exp of the mean loss over every next token within each window."""
    total, count = 0.0, 0
    for inputs, following in evaluation(windows=windows, seq=seq):
        logits = model(**inputs).logits  # [batch, seq, vocabulary]
        loss = nn.functional.cross_entropy(
            logits.flatten(0, 1), following.flatten(), ignore_index=-100, reduction="sum"
        )
        total += loss.item()
        count += int((following != -100).sum())
    return math.exp(total / count)


def main() -> None:
    """Parses the command line and prints the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"perplexity {perplexity(load(), args.windows, args.seq):.3f}")


if __name__ == "__main__":
    main()
