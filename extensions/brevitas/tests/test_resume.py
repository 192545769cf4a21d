"""Algorithms that go layer by layer take up where a run was cut short."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from quark_brevitas.config import BrevitasConfig
from quark_brevitas.quantizer import BrevitasQuantizer
from torch import Tensor, nn

from quark_core.errors import QuantizationError
from quark_core.partial import Partial

SKIPS = [{"name": "last", "skip": True}]
ALGORITHMS: dict[str, dict[str, Any]] = {
    "gptq": {"algorithm": {"name": "gptq", "act_order": True}},
    "gpfq": {"algorithm": "gpfq"},
    "qronos": {"algorithm": "qronos", "input": "int8"},
    "learned_round": {"algorithm": {"name": "learned_round", "iterations": 20}, "input": "int8"},
    "blocks": {
        "algorithm": {
            "name": "learned_round",
            "iterations": 20,
            "blocks": "blocks",
            "learn_scale": True,
        },
        "input": "int8",
    },
    "blocks, weights only": {
        "algorithm": {"name": "learned_round", "iterations": 20, "blocks": "blocks"}
    },
    "magr": {"magr": {"steps": 5}, "algorithm": "gptq"},
}


class Stack(nn.Module):
    """Four blocks of two layers, and one layer before and behind."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 32), nn.ReLU(inplace=True), nn.Linear(32, 16))
            for _ in range(4)
        )
        self.last = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        out: Tensor = self.last(x)
        return out


def network() -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    model, mixing = Stack().eval(), torch.randn(5, 16)
    return model, [torch.randn(6, 5) @ mixing + 0.1 * torch.randn(6, 16) for _ in range(3)]


class StoppedError(Exception):
    """Whatever ends a run."""


class Counting(BrevitasQuantizer):
    """Counts batches, and may end the run in the middle of a pass."""

    batches = 0
    until = 10**9

    def calibrate(self, prepared: Any, batch: Any) -> None:
        self.batches += 1
        if self.batches > self.until:
            raise StoppedError
        super().calibrate(prepared, batch)


def quantizer(fields: dict[str, Any], until: int = 10**9) -> Counting:
    config = BrevitasConfig(**{"name": "brevitas", "weight": "int3", "rules": SKIPS, **fields})
    made = Counting(config)
    made.until = until
    return made


def weights(model: Any) -> dict[str, Tensor]:
    return dict(model.module.state_dict())


@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_a_run_ended_by_an_error_goes_on_with_the_same_result(tmp_path: Path, name: str) -> None:
    fields = ALGORITHMS[name]
    model, data = network()
    whole = quantizer(fields)
    expected = weights(whole.quantize(model, data))
    for until in (whole.batches // 2, whole.batches - 1):
        folder = tmp_path / str(until)
        with pytest.raises(QuantizationError, match="StoppedError"):
            quantizer(fields, until).quantize(model, data, partial=folder)
        resumed = quantizer(fields)
        found = weights(resumed.quantize(model, data, partial=folder))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
        assert resumed.batches < whole.batches
    # All steps but the one that was under way are known, and a pass for ranges if inputs have them.
    assert resumed.batches <= 2 * len(data)


def test_progress_goes_on_where_the_run_was_cut_short(tmp_path: Path) -> None:
    model, data = network()
    with pytest.raises(QuantizationError, match="StoppedError"):
        quantizer(ALGORITHMS["gptq"], until=13).quantize(model, data, partial=tmp_path)
    seen: list[str] = []
    quantizer(ALGORITHMS["gptq"]).quantize(
        model, data, progress=lambda task, _done, _total: seen.append(task), partial=tmp_path
    )
    assert list(dict.fromkeys(seen)) == [f"gptq {count}/9" for count in range(5, 10)]


def test_what_does_not_fit_the_layers_is_done_again(tmp_path: Path) -> None:
    model, data = network()
    expected = weights(quantizer(ALGORITHMS["gptq"]).quantize(model, data))
    Partial(tmp_path).put("gptq/1", {"first": torch.zeros(2, 2)})
    Partial(tmp_path).put("gptq/2", {"blocks.0.0": torch.zeros(32, 16)})  # without the first
    found = weights(quantizer(ALGORITHMS["gptq"]).quantize(model, data, partial=tmp_path))
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_killed_process_goes_on_with_the_same_result(tmp_path: Path) -> None:
    script = textwrap.dedent(
        f"""
        import os, signal, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import torch
        torch.set_num_threads(1)
        from pathlib import Path
        from safetensors.torch import save_file
        from test_resume import ALGORITHMS, network, quantizer, weights
        folder, left = Path(sys.argv[1]), int(sys.argv[2])

        def progress(task, done, total):
            if task == "gpfq 6/9" and done == 2 and left:
                os.kill(os.getpid(), signal.SIGKILL)

        made = quantizer(ALGORITHMS["gpfq"])
        model, data = network()
        found = weights(made.quantize(model, data, progress=progress, partial=folder))
        save_file({{key: value.clone() for key, value in found.items()}}, folder / "all")
        print(made.batches)
        """
    )

    def run(folder: Path, kill: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", script, str(folder), str(kill)]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    killed = run(cut, 1)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(list(cut.glob("*.safetensors"))) == 5
    resumed, once = run(cut, 0), run(whole, 0)
    assert once.returncode == resumed.returncode == 0, resumed.stderr
    assert int(resumed.stdout) == 12  # passes 6 to 9 with three batches each
    assert int(once.stdout) == 27
    assert (cut / "all").read_bytes() == (whole / "all").read_bytes()
