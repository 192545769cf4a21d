"""Observers against brute force."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quark_native.encodings import CLIP_RATIOS, observer_for
from quark_native.formats import Format

from quark_core.errors import QuantizationError
from quark_core.spec import Observer as ObserverSpec

FORMATS = ("int8/tensor", "uint8/tensor/asym", "int4/channel", "int4/group:16/asym")


def observer(text: str, fmt: Format, *, stream: bool = False):
    return observer_for(ObserverSpec.model_validate(text), fmt, stream=stream)


def rows_that_share(fmt: Format, x: torch.Tensor) -> list[torch.Tensor]:
    """The values under each scale of a matrix, in the order of the compact scales."""
    if fmt.layout.kind == "tensor":
        return [x.flatten()]
    if fmt.layout.kind == "channel":
        return list(x)
    return [part for row in x for part in row.split(fmt.layout.size)]


@pytest.mark.parametrize("name", FORMATS)
def test_minmax_covers_all_batches(name):
    fmt = Format.parse(name)
    batches = [torch.randn(8, 32) * scale for scale in (1, 3, 2)]
    found = observer("minmax", fmt, stream=True)
    for batch in batches:
        found.observe(batch)
    stacked = torch.stack(batches)
    low, high = found.range()
    assert torch.equal(low, torch.stack([fmt.layout.extremes(x)[0] for x in stacked]).amin(0))
    assert torch.equal(high, torch.stack([fmt.layout.extremes(x)[1] for x in stacked]).amax(0))


def test_minmax_of_one_tensor_gives_the_scales_it_measures():
    fmt, x = Format.parse("uint4/channel/asym"), torch.randn(8, 32)
    found = observer("minmax", fmt)
    found.observe(x)
    measured = fmt.measure(x)
    assert torch.equal(found.scale_zero_point().scale, measured.scale)
    assert torch.equal(found.scale_zero_point().zero_point, measured.zero_point)


def test_moving_average_is_the_recurrence():
    fmt = Format.parse("int8/tensor/asym")
    found = observer("moving_average:0.25", fmt, stream=True)
    for low, high in ((-1.0, 2.0), (-3.0, 6.0), (-2.0, 0.0)):
        found.observe(torch.tensor([low, high]))
    low = 0.75 * (0.75 * -1 + 0.25 * -3) + 0.25 * -2
    high = 0.75 * (0.75 * 2 + 0.25 * 6) + 0.25 * 0
    assert [bound.item() for bound in found.range()] == [low, high]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("percent", [60, 99, 99.9, 100])
def test_percentile_of_a_weight_is_the_value_of_nearest_rank(name, percent):
    fmt, x = Format.parse(name), torch.randn(8, 40)
    found = observer(f"percentile:{percent}", fmt)
    found.observe(x)
    low, high = (bound.flatten() for bound in found.range())
    for index, values in enumerate(rows_that_share(fmt, x)):
        if fmt.symmetric:
            bound = values.abs().sort().values[math.ceil(len(values) * percent / 100 - 1e-9) - 1]
            expected = -bound, bound
        else:
            ordered = values.sort().values
            rank = math.ceil(len(values) * percent / 100 - 1e-9)
            expected = ordered[-rank], ordered[rank - 1]
        short = fmt.layout.kind == "group" and len(values) < fmt.layout.size
        smallest = min(values.min(), torch.tensor(0.0)) if short else values.min()
        largest = max(values.max(), torch.tensor(0.0)) if short else values.max()
        assert low[index] == max(expected[0], smallest)
        assert high[index] == min(expected[1], largest)


@pytest.mark.parametrize("name", ["int8/tensor", "uint8/tensor/asym"])
@given(
    percent=st.sampled_from([75, 99, 99.9, 100]),
    scale=st.floats(1e-3, 1e3),
    shift=st.floats(-5, 5),
    seed=st.integers(0, 1000),
)
def test_percentile_of_a_stream_is_the_edge_of_its_bucket(name, percent, scale, shift, seed):
    generator = torch.Generator().manual_seed(seed)
    batches = [(torch.randn(500, generator=generator) + shift) * scale for _ in range(3)]
    fmt = Format.parse(name)
    exact, counted = (
        observer(f"percentile:{percent}", fmt),
        observer(f"percentile:{percent}", fmt, stream=True),
    )
    exact.observe(torch.cat(batches))
    for batch in batches:
        counted.observe(batch)
    for found, expected in zip(counted.range(), exact.range(), strict=True):
        # A bucket is 1/512 of its power of two wide; its edge lies outside the exact value.
        assert (found - expected).abs() <= expected.abs() / 512
    assert counted.range()[0] <= exact.range()[0]
    assert counted.range()[1] >= exact.range()[1]


def test_the_order_of_batches_does_not_matter():
    fmt = Format.parse("int8/tensor/asym")
    batches = [torch.randn(100) * 10**power for power in range(-3, 3)]
    forth, back = (observer("percentile:99", fmt, stream=True) for _ in range(2))
    for batch in batches:
        forth.observe(batch)
    for batch in reversed(batches):
        back.observe(batch)
    assert forth.range() == back.range()


@pytest.mark.parametrize("name", [*FORMATS, "fp4_e2m1/group:8", "int3/channel/power_of_two"])
def test_mse_of_a_weight_is_the_best_ratio_for_each_scale(name):
    fmt = Format.parse(name)
    x = torch.randn(8, 40) ** 3
    found = observer("mse", fmt)
    found.observe(x)
    parameters = found.scale_zero_point()
    low, high = fmt.layout.extremes(x)
    errors = []
    for ratio in CLIP_RATIOS:
        quantized = fmt.fake_quantize(x, fmt.cover(low * ratio, high * ratio))
        parts = rows_that_share(fmt, (quantized - x).double() ** 2)
        errors.append(torch.stack([part.sum() for part in parts]))
    ours = rows_that_share(fmt, (fmt.fake_quantize(x, parameters) - x).double() ** 2)
    ours = torch.stack([part.sum() for part in ours])
    torch.testing.assert_close(ours, torch.stack(errors).amin(0), rtol=1e-5, atol=0)
    assert (ours <= errors[0] * (1 + 1e-5)).all()
    if fmt.number.bits < 8:  # with 8 bits the full range is best here
        assert (ours < errors[0] * 0.99).any()


@pytest.mark.parametrize("name", ["int8/tensor", "int4/tensor/asym", "fp8_e4m3/tensor"])
def test_mse_of_a_stream_is_close_to_the_best(name):
    fmt = Format.parse(name)
    batches = [torch.randn(2000) ** 3 for _ in range(3)]
    exact, counted = observer("mse", fmt), observer("mse", fmt, stream=True)
    whole = torch.cat(batches)
    exact.observe(whole)
    for batch in batches:
        counted.observe(batch)

    def error(found):
        return (fmt.fake_quantize(whole, found.scale_zero_point()) - whole).square().sum()

    assert error(counted) <= error(exact) * 1.02


@pytest.mark.parametrize("name", ["minmax", "moving_average", "percentile:99", "mse"])
def test_nothing_observed_is_an_error(name):
    found = observer(name, Format.parse("int8/tensor"), stream=True)
    found.observe(torch.empty(0, 4))
    with pytest.raises(QuantizationError, match=r"no value was observed.*skip it by a rule"):
        found.scale_zero_point()


@pytest.mark.parametrize("name", ["minmax", "moving_average", "percentile:99", "mse"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("stream", [True, False])
def test_values_that_are_not_finite_are_an_error(name, value, stream):
    found = observer(name, Format.parse("int8/tensor"), stream=stream)
    found.observe(torch.tensor([1.0, value, 2.0]))
    with pytest.raises(QuantizationError, match="the observed values hold NaN or infinities"):
        found.scale_zero_point()


def test_an_observer_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="there is no observer entropy here: there are minmax"):
        observer("entropy", Format.parse("int8/tensor"))
    with pytest.raises(ValueError, match="observer mse needs granularity tensor for an input"):
        observer("mse", Format.parse("int8/channel"), stream=True)


def test_half_precision_values_are_observed_exactly():
    x = torch.randn(64).bfloat16()
    for name in ("minmax", "percentile:100"):
        found = observer(name, Format.parse("int8/tensor"), stream=True)
        found.observe(x)
        assert found.range()[1] == x.float().max()
