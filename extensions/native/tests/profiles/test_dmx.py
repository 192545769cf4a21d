"""d-Matrix's formats, on every output its two libraries were asked for."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from quark_native.profiles import dmx

DIGESTS = json.loads(
    (Path(__file__).resolve().parents[1] / "golden" / "profiles_formats.json").read_text()
)
MLTOOLS = re.compile(r"BFP\[(\d+)\|8\]\{(\d+),(-?\d+)\}\((.)(.)\)")


@pytest.mark.parametrize("key", DIGESTS["dmx_compressor"])
def test_outputs_equal_dmx_compressor_bit_for_bit(key, inputs, check):
    shorthand, axis, name = key.rsplit("|", 2)
    check("dmx_compressor", key, dmx.cast(inputs[name], shorthand, axis=int(axis)))


@pytest.mark.parametrize("key", DIGESTS["dmx_mltools"])
def test_outputs_equal_dmx_mltools_bit_for_bit(key, inputs, check):
    shorthand, name = key.rsplit("|", 1)
    precision, block, axis, symmetric, rounding = MLTOOLS.fullmatch(shorthand).groups()
    found = dmx.bfp_mltools(
        inputs[name],
        int(precision),
        block=int(block),
        axis=int(axis),
        symmetric=symmetric == "S",
        rounding=dmx.ROUNDINGS[rounding],
    )
    check("dmx_mltools", key, found)


def test_blocks_of_axis_0_come_back_in_the_wrong_places(inputs):
    x = inputs["normal"][:, :2].repeat(2, 1)
    right = dmx.mxfp(x.T.contiguous())
    found = dmx.mxfp(x, axis=0)
    assert not torch.equal(found, right.T)
    assert torch.equal(found.T, torch.cat(right.split(32, -1), 0).reshape(2, 64))
    with pytest.raises(IndexError):
        dmx.mxfp(torch.ones(2, 2, 64), axis=2)


def test_two_roundings_of_nearest():
    x = torch.tensor([1.0, 2.0**-7 + 2.0**-22, 2.0**-7 + 2.0**-21])
    assert dmx.bfp(x).tolist() == [1.0, 0.0, 2.0**-6]


def test_asymmetric_rules_differ():
    x = torch.tensor([[-1.9], [-1.99]]) * torch.ones(2, 16)
    x[:, 1:] = 0.5
    assert dmx.bfp(x, 4, block=16, symmetric=False)[:, 0].tolist() == [-2.0, -2.0]
    assert dmx.bfp_mltools(x, 4, block=16, symmetric=False)[:, 0].tolist() == [-1.75, -1.75]
    x[1, 0] = -1.995
    assert dmx.bfp_mltools(x, 4, block=16, symmetric=False)[:, 0].tolist() == [-1.75, -2.0]


def test_a_neighbour_turns_nan_into_a_number():
    x = torch.ones(2, 16)
    x[0, 0] = torch.nan
    assert dmx.bfp(x, block=16, symmetric=False)[0].isnan().all()
    x[1, 0] = -1.9999
    assert (dmx.bfp(x, block=16, symmetric=False)[0] == -(2.0**24)).all()


@pytest.mark.parametrize(
    ("shorthand", "message"),
    [
        ("INT8", "shorthand 'INT8' is none of XP"),
        ("FP[1|4|3,7](_D)", "shorthand"),
        ("BFP[23|8]{16}(SN)", "precision 23 is not within 2..22"),
        ("BFP[8|8]{1}(SD)", "rounding 'down' of block 1 is not nearest"),
    ],
)
def test_what_cannot_be_cast_is_refused(shorthand, message):
    with pytest.raises(ValueError, match=message):
        dmx.cast(torch.ones(16), shorthand)


def test_unknown_roundings_are_refused():
    for function in (dmx.bfp, dmx.bfp_mltools, dmx.xp):
        with pytest.raises(ValueError, match="rounding 'away' is none of nearest, down, up"):
            function(torch.ones(16), rounding="away")


def test_input_stays_as_it_is_and_same_is_a_copy(inputs):
    x = inputs["normal"].clone()
    for shorthand in ("SAME", "BFP[8|8]{16}(_N)", "FP[1|8|23,127](_N)", "MXFP4[E2M1]{32}"):
        dmx.cast(x, shorthand).zero_()
        assert torch.equal(x, inputs["normal"])
