"""Recipes against the same passes called on Brevitas directly, on the demo network.

    python benchmarks/brevitas_direct.py [--repeats 3] [--epochs 3]

For each row: accuracy on the test images, SQNR of logits against float, whether both models return
the same bits, shortest processor time of both on one thread, their ratio, and in brackets the
quartiles of ratios of neighbouring calls, which scatter by a fifth on a virtual machine. The last
column is what scatters less: the share of its own time that a recipe spends on what a direct call
has no counterpart of, the plan and the checks of model and result.

The calibration images are read ``--epochs`` times over. Brevitas's learned rounding needs
``pip install accelerate``, and draws other samples: its row tells quality and time, not bits.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import gc
import io
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from quark_brevitas.config import BrevitasConfig
from quark_brevitas.quantizer import BrevitasQuantizer
from torch import Tensor, nn

from quark_core import _checks
from quark_core.batch import as_batch
from quark_core.recipe.load import load_recipe

EXAMPLE = Path(__file__).resolve().parents[1] / "examples/fashion_mnist/brevitas-int8.yaml"
INPUT = "int8/sym/percentile:99.999"
LEARNED = "layerwise w4a8 learned round"
# name: (our fields, arguments of Brevitas's quantize_model, passes after calibration)
ROWS: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]] = {
    "layerwise w8a8": (
        {"weight": "int8", "input": INPUT, "bias": "int32", "bias_correction": True},
        {"backend": "layerwise", "bias_bit_width": 32},
        ("bias",),
    ),
    "fx w8a8": (
        {
            "backend": "fx",
            "weight": "int8",
            "input": INPUT,
            "bias": "int32",
            "bias_correction": True,
        },
        {"backend": "fx", "bias_bit_width": 32},
        ("bias",),
    ),
    "fx power of two": (
        {
            "backend": "fx",
            "weight": "int8/power_of_two",
            "input": f"{INPUT}/power_of_two",
            "bias": "int32",
            "bias_correction": True,
        },
        {"backend": "fx", "bias_bit_width": 32, "scale_factor_type": "po2_scale"},
        ("bias",),
    ),
    "layerwise w4a8 gptq": (
        {
            "weight": "int4",
            "input": INPUT,
            "algorithm": {"name": "gptq", "engine": "brevitas"},
            "bias_correction": True,
        },
        {"backend": "layerwise", "weight_bit_width": 4},
        ("gptq", "bias"),
    ),
    LEARNED: (
        {
            "weight": "int4",
            "input": INPUT,
            "algorithm": {"name": "learned_round", "iterations": 300, "learning_rate": 0.01},
            "bias_correction": True,
        },
        {"backend": "layerwise", "weight_bit_width": 4},
        ("learned", "bias"),
    ),
    "layerwise fp8 (ocp)": (
        {"weight": "fp8_e4m3", "input": "fp8_e4m3"},
        {"backend": "layerwise", "quant_format": "float_ocp"},
        (),
    ),
    "layerwise mxfp8": (
        {"weight": "mxfp8_e4m3", "input": "mxfp8_e4m3"},
        {
            "backend": "layerwise",
            "quant_format": "float_ocp",
            "scale_factor_type": "po2_scale",
            "weight_quant_granularity": "per_group",
            "act_quant_granularity": "per_group",
            "act_scale_computation_type": "dynamic",
        },
        (),
    ),
}
# Ours alone.
OWN: dict[str, dict[str, Any]] = {
    "layerwise w4a8 gptq, fast": {
        "weight": "int4",
        "input": INPUT,
        "algorithm": "gptq",
        "bias_correction": True,
    },
    "layerwise w4a8 nearest": {"weight": "int4", "input": INPUT, "bias_correction": True},
}


def direct(model: nn.Module, batches: list[Tensor], row: str) -> nn.Module:
    """What a user of Brevitas would write."""
    from brevitas.graph.quantize import preprocess_for_quantize
    from brevitas_examples.imagenet_classification.ptq import ptq_common

    _, changes, passes = ROWS[row]
    data = [(batch, None) for batch in batches]
    arguments = {
        "weight_bit_width": 8,
        "act_bit_width": 8,
        "bias_bit_width": None,
        "weight_quant_granularity": "per_channel",
        "act_quant_percentile": 99.999,
        "act_quant_type": "sym",
        "scale_factor_type": "float_scale",
        "quant_format": "int",
        "weight_exponent_bit_width": 4,
        "weight_mantissa_bit_width": 3,
        "act_exponent_bit_width": 4,
        "act_mantissa_bit_width": 3,
        "layerwise_first_last_exponent_bit_width": 4,
        "layerwise_first_last_mantissa_bit_width": 3,
        **changes,
    }
    prepared = preprocess_for_quantize(copy.deepcopy(model), equalize_iters=20)
    found = ptq_common.quantize_model(prepared, **arguments).eval()
    with torch.no_grad():
        found(batches[0])
        if arguments.get("act_scale_computation_type") != "dynamic":
            ptq_common.calibrate(data, found)
        if "gptq" in passes:
            ptq_common.apply_gptq(data, found, create_weight_orig=True)
        if "learned" in passes:
            _learn(found, batches, ROWS[row][0]["algorithm"])
        if "bias" in passes:
            ptq_common.apply_bias_correction(data, found)
    return found


def _learn(model: nn.Module, batches: list[Tensor], options: dict[str, Any]) -> None:
    """Brevitas's own learned rounding, with the settings of its example."""
    from argparse import Namespace

    from brevitas_examples.imagenet_classification.ptq import learned_round_utils

    arguments = Namespace(
        learned_round="hard_sigmoid",
        learned_round_mode="layerwise",
        learned_round_loss="regularised_mse",
        learned_round_lr_scheduler=None,
        learned_round_lr=options["learning_rate"],
        learned_round_iters=options["iterations"],
        learned_round_batch_size=8,
    )
    config = learned_round_utils.parse_args_to_dataclass(arguments)
    config.training_args.use_amp = False
    data = [(batch, None) for batch in batches]
    layers = functools.partial(
        learned_round_utils.get_blocks, block_check_fn=learned_round_utils.is_layer
    )
    with torch.enable_grad():
        learned_round_utils.LearnedRoundTrainer(config).train(
            model,
            learned_round_utils.vision_forward,
            learned_round_utils.vision_block_forward,
            data,
            learned_round_utils.CacheVision(),
            layers,
        )


class HostTime:
    """Processor time within the host's own functions."""

    def __init__(self) -> None:
        self.spent = 0.0
        places: list[tuple[Any, str]] = [(BrevitasQuantizer, "plan")]
        places += [
            (_checks, name) for name in ("signature", "tensor_table", "carried_out", "sound")
        ]
        for owner, name in places:
            setattr(owner, name, self._timed(getattr(owner, name)))

    def _timed(self, function: Any) -> Any:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.spent += time.process_time() - began

        return call


def sqnr(truth: Tensor, found: Tensor) -> float:
    return float(10 * torch.log10(truth.square().sum() / (truth - found).square().sum()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--only", action="append", choices=[*ROWS, *OWN])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    loaded = load_recipe(EXAMPLE)
    model = loaded.load_model().eval()
    batches = [as_batch(item).args[0] for item in loaded.load_data("calibration") or ()]
    batches = batches * arguments.epochs
    tests = [as_batch(item) for item in loaded.load_data("evaluation") or ()]
    images = torch.cat([batch.args[0] for batch in tests])
    labels = torch.cat([batch.target for batch in tests])
    with torch.no_grad():
        truth = model(images)
    accuracy = float((truth.argmax(1) == labels).double().mean())
    print(f"float: accuracy {accuracy:.4f}, {len(images)} images")
    print(
        "| row | accuracy | SQNR dB | direct's | same bits | recipe s | direct s | ratio | host |"
    )
    print("| --- " * 9 + "|")
    host = HostTime()
    for row in arguments.only or [*ROWS, *OWN]:
        tests = images, labels, truth
        print(_line(row, model, batches, tests, arguments.repeats, host), flush=True)


def _line(
    row: str,
    model: nn.Module,
    batches: list[Tensor],
    tests: tuple[Tensor, Tensor, Tensor],
    repeats: int,
    host: HostTime,
) -> str:
    images, labels, truth = tests
    fields = ROWS[row][0] if row in ROWS else OWN[row]
    config = BrevitasConfig(name="brevitas", equalize_iterations=20, **fields)
    ours: list[float] = []
    theirs: list[float] = []
    shares: list[float] = []
    said = io.StringIO()
    mine: Any = None
    other: Any = None
    for repeat in range(repeats + 1):
        for which in (0, 1) if repeat % 2 else (1, 0):
            gc.collect()
            began, host.spent = time.process_time(), 0.0
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                if which == 0:
                    mine = BrevitasQuantizer(config).quantize(model, batches)
                elif row in ROWS:
                    other = direct(model, batches, row)
            spent = time.process_time() - began
            (theirs if which else ours).append(spent)
            if which == 0:
                shares.append(host.spent / spent)
    with torch.no_grad():
        found = mine(images)
        theirs_out = other(images) if other is not None else None
    right = float((found.argmax(1) == labels).double().mean())
    share = statistics.median(shares[1:])
    line = f"| {row} | {right:.4f} | {sqnr(truth, found):.2f} "
    if theirs_out is None:
        return f"{line}| | | {min(ours[1:]):.2f} | | | {share:.1%} |"
    ratios = [a / b for a, b in zip(ours[1:], theirs[1:], strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    same = "yes" if torch.equal(found, theirs_out) else "no"
    line += f"| {sqnr(truth, theirs_out):.2f} | {same} | {min(ours[1:]):.2f} "
    line += f"| {min(theirs[1:]):.2f} | {min(ours[1:]) / min(theirs[1:]):.3f} "
    return f"{line}({low:.3f} to {high:.3f}) | {share:.1%} |"


if __name__ == "__main__":
    main()
