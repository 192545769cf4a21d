"""Each metric against its definition written out in numpy."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quark_core.errors import DataError
from quark_core.metrics import fidelity, labels
from quark_core.sources.context import Context

seeds = st.integers(0, 2**31)


def _feed(metric: Any, *batches: tuple[Any, Any, Any]) -> float:
    for output, target, reference in batches:
        metric.update(output, target, reference)
    return float(metric.compute())


def _pieces(seed: int, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


@given(seeds, st.integers(1, 7))
@settings(max_examples=30, deadline=None)
def test_label_metrics_do_not_depend_on_batches(seed: int, cut: int) -> None:
    logits, _ = _pieces(seed, (8, 6))
    target = torch.randint(0, 6, (8,), generator=torch.Generator().manual_seed(seed))
    halves = [(logits[:cut], target[:cut], None), (logits[cut:], target[cut:], None)]
    rank = (logits.numpy() > logits.numpy()[np.arange(8), target][:, None]).sum(1)
    assert _feed(labels.Accuracy(), *halves) == pytest.approx((rank == 0).mean())
    assert _feed(labels.TopK(3), *halves) == pytest.approx((rank < 3).mean())
    z = logits.double().numpy()
    loss = np.log(np.exp(z).sum(1)) - z[np.arange(8), target]
    assert _feed(labels.Perplexity(), *halves) == pytest.approx(math.exp(loss.mean()), rel=1e-5)


@given(seeds, st.integers(1, 7))
@settings(max_examples=30, deadline=None)
def test_fidelity_metrics_do_not_depend_on_batches(seed: int, cut: int) -> None:
    output, truth = _pieces(seed, (8, 5))
    halves = [(output[:cut], None, truth[:cut]), (output[cut:], None, truth[cut:])]
    o, r = output.double().numpy(), truth.double().numpy()
    sqnr = 10 * math.log10((r**2).sum() / ((r - o) ** 2).sum())
    assert _feed(fidelity.Sqnr(), *halves) == pytest.approx(sqnr)
    assert _feed(fidelity.Mse(), *halves) == pytest.approx(((r - o) ** 2).mean())
    cosine = (r * o).sum(1) / np.linalg.norm(r, axis=1) / np.linalg.norm(o, axis=1)
    assert _feed(fidelity.Cosine(), *halves) == pytest.approx(cosine.mean())
    p, q = np.exp(r) / np.exp(r).sum(1, keepdims=True), np.exp(o) / np.exp(o).sum(1, keepdims=True)
    divergence = (p * np.log(p / q)).sum(1).mean()
    assert _feed(fidelity.KlDivergence(), *halves) == pytest.approx(divergence, rel=1e-4)
    assert _feed(fidelity.Top1Agreement(), *halves) == (r.argmax(1) == o.argmax(1)).mean()


def test_equal_outputs() -> None:
    same = torch.randn(4, 3)
    assert _feed(fidelity.Sqnr(), (same, None, same)) == math.inf
    assert _feed(fidelity.KlDivergence(), (same, None, same)) == 0
    assert _feed(fidelity.Cosine(), (same, None, same)) == pytest.approx(1)


def test_zero_vectors_have_a_cosine() -> None:
    zero, one = torch.zeros(1, 3), torch.ones(1, 3)
    assert _feed(fidelity.Cosine(), (zero, None, zero)) == 1
    assert _feed(fidelity.Cosine(), (one, None, zero)) == 0


def test_divergence_where_float_gives_no_probability() -> None:
    truth = torch.tensor([[0.0, -math.inf]])
    assert _feed(fidelity.KlDivergence(), (torch.zeros(1, 2), None, truth)) == pytest.approx(
        math.log(2)
    )


def test_ignored_labels_and_sequences() -> None:
    logits = torch.tensor([[[9.0, 0.0], [0.0, 9.0], [9.0, 0.0]]])
    target = torch.tensor([[0, 0, -100]])
    assert _feed(labels.Accuracy(), (logits, target, None)) == 0.5


def test_classes_on_the_second_axis() -> None:
    logits = torch.randn(2, 4, 3, 5)
    target = logits.argmax(1)
    assert _feed(labels.Accuracy(), (logits, target, None)) == 1


def test_perplexity_past_all_numbers_is_infinite() -> None:
    logits = torch.tensor([[0.0, 1e6]])
    assert _feed(labels.Perplexity(), (logits, torch.tensor([0]), None)) == math.inf


@pytest.mark.parametrize(
    ("metric", "batch", "words"),
    [
        (labels.Accuracy(), (torch.zeros(2, 3), None, None), "needs labels, the evaluation data"),
        (
            labels.Accuracy(),
            (torch.zeros(2, 3), torch.zeros(4, dtype=torch.int64), None),
            r"output \[2, 3\] does not fit labels \[4\]",
        ),
        (
            labels.TopK(9),
            (torch.zeros(2, 3), torch.tensor([0, 1]), None),
            "k is 9, the model has 3",
        ),
        (fidelity.Sqnr(), (torch.zeros(2, 3), None, torch.zeros(2, 4)), r"reference \[2, 4\]"),
        (fidelity.Sqnr(), (torch.zeros(2, 3), None, None), "needs the float model's outputs"),
    ],
)
def test_errors(metric: Any, batch: tuple[Any, Any, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        metric.update(*batch)


@pytest.mark.parametrize("metric", [labels.Accuracy(), fidelity.Cosine(), fidelity.KlDivergence()])
def test_nothing_seen_is_an_error(metric: Any) -> None:
    with pytest.raises(DataError, match="saw no samples"):
        metric.compute()


def test_python_metric_is_the_mean_over_samples(tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text(
        "def mean(output, target): return output.mean()\ndef bad(output, target): return 'x'\n"
    )
    metric = labels.PythonMetric("m.py:mean", Context(tmp_path))
    batches = [(torch.full((3, 1), 1.0), None, None), (torch.full((1, 1), 5.0), None, None)]
    assert _feed(metric, *batches) == 2
    broken = labels.PythonMetric("m.py:bad", Context(tmp_path))
    with pytest.raises(DataError, match="metric 'm.py:bad' raised ValueError"):
        broken.update(torch.zeros(1), None, None)
