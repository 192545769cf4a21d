"""GPTQ over Brevitas's quantizers against Brevitas's own code, in one process.

    python benchmarks/brevitas_gptq.py [--repeat 2]

The model is a small Llama (4 blocks, 256 wide, 3.95 million parameters) with random weights and
some channels made large. Weights become int4 in groups of 16 with integer zero points; the output
layer stays float. Printed is the SQNR of logits and the time of quantizing, calibration included.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from quark_brevitas.config import BrevitasConfig
from quark_brevitas.quantizer import BrevitasQuantizer
from torch import Tensor, nn

LOUDER = 16
"""By how much the planted channels are louder."""


def tiny_llama() -> nn.Module:
    """A Llama with planted outlier channels."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1536,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for block in model.model.layers:
            for norm in (block.input_layernorm, block.post_attention_layernorm):
                norm.weight[torch.randperm(256)[:8]] *= LOUDER
    return model


def sqnr(truth: Tensor, found: Tensor) -> float:
    """Signal to noise in dB."""
    return float(10 * torch.log10(truth.square().sum() / (truth - found).square().sum()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = tiny_llama()
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{count / 1e6:.2f} million parameters, torch {torch.__version__}, 1 thread")
    tokens = [torch.randint(1536, (1, arguments.length)) for _ in range(arguments.batches + 4)]
    data = [{"input_ids": batch} for batch in tokens[4:]]
    held = torch.cat(tokens[:4])
    with torch.no_grad():
        truth = model(held).logits
    cases: list[tuple[str, Any]] = [("round to nearest", None)]
    for name in ("gptq", "gpfq", "qronos"):
        for order in (False, True):
            for engine in ("fast", "brevitas"):
                options = {"name": name, "act_order": order, "engine": engine}
                cases.append((f"{name}, act order {'on' if order else 'off'}, {engine}", options))
    for _ in range(arguments.repeat):
        for name, options in cases:
            config = BrevitasConfig(
                name="brevitas",
                weight="int4/group:16/asym",
                algorithm=options,
                rules=[{"name": "lm_head", "skip": True}],
            )
            began, worked = time.perf_counter(), time.process_time()
            quantized = BrevitasQuantizer(config).quantize(model, data)
            took, worked = time.perf_counter() - began, time.process_time() - worked
            with torch.no_grad():
                quality = sqnr(truth, quantized(held).logits)
            print(f"{name:35s} {took:6.2f} s (CPU {worked:6.2f} s)  {quality:6.2f} dB", flush=True)


if __name__ == "__main__":
    main()
