"""Fidelity of one cast of N(0, 1): signal to quantization noise in dB, beside known values.

    python benchmarks/sqnr.py

The known values were measured with the libraries themselves (microxcaling, torchao, dmx, AMD Quark,
Brevitas), on other random numbers; samples of this size repeat to about 0.05 dB.
"""

from __future__ import annotations

import torch
from quark_native.formats import Format
from torch import Tensor

ROWS = (
    # format, profile, known dB
    ("mxfp8", "ocp", 30.68),
    ("mxfp8/scale:even", "ocp", 31.18),
    ("mxfp8/scale:rceil", "ocp", 31.50),
    ("mxfp8/toward_zero", "ocp", 25.66),
    ("mxfp8", "dmx", 31.42),
    ("mxfp8", "brevitas", 30.68),
    ("mxfp8_e5m2", "ocp", 25.38),
    ("mxfp8_e5m2/scale:even", "ocp", 25.55),
    ("mxfp8_e5m2/scale:rceil", "ocp", 25.55),
    ("mxfp8_e5m2/toward_zero", "ocp", 20.16),
    ("mxfp6_e3m2", "ocp", 25.38),
    ("mxfp6_e3m2/scale:even", "ocp", 25.55),
    ("mxfp6_e3m2/toward_zero", "ocp", 20.16),
    ("mxfp6_e2m3", "ocp", 30.93),
    ("mxfp6_e2m3/scale:even", "ocp", 30.97),
    ("mxfp6_e2m3/scale:rceil", "ocp", 30.95),
    ("mxfp6_e2m3/scale:ceil", "ocp", 28.74),
    ("mxfp6_e2m3/toward_zero", "ocp", 25.30),
    ("mxfp4", "ocp", 18.81),
    ("mxfp4/scale:even", "ocp", 19.03),
    ("mxfp4/scale:rceil", "ocp", 18.74),
    ("mxfp4/scale:ceil", "ocp", 16.81),
    ("mxfp4/toward_zero", "ocp", 14.16),
    ("mxint8", "ocp", 41.64),
    ("mxint8/toward_zero", "ocp", 35.66),
    ("mxint8", "brevitas", 15.93),
    ("mxint4", "ocp", 17.54),
    ("mxint4/toward_zero", "ocp", 12.01),
    ("bfp[8|8]{64}", "ocp", 41.00),
    ("bfp[8|8]{16}", "ocp", 42.76),
    ("bfp[6|8]{64}", "ocp", 28.96),
    ("bfp[4|8]{64}", "ocp", 16.93),
    ("bfp[4|8]{16}", "ocp", 18.62),
    ("bfp[4|8]{16}(_N)", "ocp", 18.65),
    ("bfp[8|8]{64}(SD)", "ocp", 35.0),
    ("sbfp[4|4|4,7]{16}", "dmx", 21.28),
    ("bfp16", "ocp", 44.09),
    ("mx9", "ocp", 46.52),
    ("mx6", "ocp", 28.28),
    ("nvfp4_one_level", "torchao", 20.41),
    ("nvfp4_one_level", "ocp", 20.41),
    ("nvfp4", "ocp", 20.42),
)


def sample() -> Tensor:
    """4 million numbers of N(0, 1), in rows of 4096."""
    return torch.randn(1024, 4096, generator=torch.Generator().manual_seed(0))


def sqnr(x: Tensor, name: str, profile: str) -> float:
    """10 log10 of the power of x over that of its quantization error."""
    error = Format.parse(name, profile=profile).fake_quantize(x) - x
    ratio = x.double().square().sum() / error.double().square().sum()
    return float(10 * ratio.log10())


def main() -> None:
    """Print the table."""
    x = sample()
    print("| format | profile | here, dB | known, dB |\n| --- | --- | --- | --- |")
    for name, profile, known in ROWS:
        print(f"| {name} | {profile} | {sqnr(x, name, profile):.2f} | {known:.2f} |")


if __name__ == "__main__":
    main()
