"""What the kernels cost, as ratios to torch.clone of the same float32 tensor.

    python benchmarks/formats.py [--sizes 4096 16384] [--threads 1 2] [--repeats 11] [--only WORD]

Every round runs each case once, in turn, with the two floors among them: ``clone`` (a copy into
fresh memory) and ``copy_`` (into memory that is there). Figures are medians of the rounds divided
by the median of the clones. Targets are of the form "must / aim"; a figure above its "must" is
marked. ``--gpu`` measures the Triton kernels instead, against the copy bandwidth of the device.
"""

from __future__ import annotations

import argparse
import statistics
import time
import timeit
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from quark_native.formats import Format, Parameters
from quark_native.kernels import library
from quark_native.quantizers import TensorQuantizer
from torch import Tensor

from quark_core.spec import TensorSpec


@dataclass
class Case:
    """Something to time.

    Attributes:
        path: What it is, as a row of the table.
        must: The ratio it has to keep, or None.
        aim: The ratio hoped for.
        run: The work; the floors' names are reserved.
    """

    path: str
    must: float | None
    aim: float | None
    run: Callable[[], object]
    times: list[float] = field(default_factory=list)


def cases(x: Tensor) -> list[Case]:
    """All cases for a float32 tensor."""
    out, narrow = torch.empty_like(x), x.to(torch.bfloat16)
    narrow_out = torch.empty_like(narrow)
    found = [
        Case("clone", None, None, x.clone),
        Case("copy_ into memory that is there", None, None, lambda: out.copy_(x)),
    ]

    def add(
        name: str, must: tuple[float, float], aim: tuple[float, float], label: str = ""
    ) -> None:
        fmt = Format.parse(name)
        given = _parameters(fmt, x)
        title = f"{label or name} fake-quantize"
        found.append(Case(f"{title}, fresh", must[0], aim[0], lambda: fmt.fake_quantize(x, given)))
        run = Case(
            f"{title}, given out", must[1], aim[1], lambda: fmt.fake_quantize(x, given, out=out)
        )
        found.append(run)

    for name in ("mxfp8", "mxfp4", "mxint8", "bfp[8|8]{64}", "msfp12", "nvfp4_one_level"):
        add(name, (1.5, 0.6), (1.2, 0.45))
    for name in ("mxfp8", "mxfp4", "bfp[8|8]{64}"):
        fmt = Format.parse(name)
        found += [
            Case(f"{name} bfloat16, fresh", 1.0, 0.7, lambda fmt=fmt: fmt.fake_quantize(narrow)),
            Case(
                f"{name} bfloat16, given out",
                0.4,
                0.33,
                lambda fmt=fmt: fmt.fake_quantize(narrow, out=narrow_out),
            ),
        ]
    for name in ("mxfp4", "mxfp8"):
        fmt = Format.parse(name)
        packed = fmt.quantize(x)
        found += [
            Case(f"{name} pack", 1.0, 0.7, lambda fmt=fmt: fmt.quantize(x)),
            Case(f"{name} pack from bfloat16", None, None, lambda fmt=fmt: fmt.quantize(narrow)),
            Case(f"{name} unpack", 1.6, 1.0, packed.dequantize),
            Case(
                f"{name} unpack to bfloat16",
                None,
                None,
                lambda packed=packed: packed.dequantize(torch.bfloat16),
            ),
        ]
    for name in ("int8/tensor", "int8/channel", "int8/tensor/asym", "int8/group:128"):
        add(name, (1.5, 0.6), (1.2, 0.45))
    add("lpbq[4|8]{64}", (1.5, 0.6), (1.2, 0.45))
    for name in (
        "log[8]",
        "fp[1|4|3]/unit",
        "fp8_e4m3/channel",
        "block_minifloat[8|4|8]{16}",
        "block_log[8|8]{16}",
        "ternary",
        "binary",
    ):
        add(name, (2.0, 2.0), (1.5, 1.5))
    for name in ("mxfp4", "mxfp8", "bfp[8|8]{64}", "int8/channel"):
        fmt = Format.parse(name)
        given = _parameters(fmt, x)
        found.append(
            Case(
                f"{name} without a compiler",
                10,
                8,
                lambda fmt=fmt, given=given: fmt.specification(x, given),
            )
        )
    return found


def _parameters(fmt: Format, x: Tensor) -> Parameters | None:
    """Scales that a model would have fixed before."""
    call = fmt.call()
    return fmt.measure(x) if call is not None and call.given else None


def measure(found: list[Case], repeats: int) -> float:
    """Time every case ``repeats`` times, in turn; returns the median clone in seconds."""
    for round_number in range(repeats + 1):
        for case in found:
            start = time.perf_counter()
            result = case.run()
            spent = time.perf_counter() - start
            del result
            if round_number:
                case.times.append(spent)
    return statistics.median(found[0].times)


def cpu(sizes: list[int], threads: list[int], repeats: int, only: str) -> None:
    """Print one table for each size and number of threads."""
    library_, isa = library.load()
    print(f"torch {torch.__version__}, kernels: {isa if library_ else f'none ({isa})'}")
    for rows in sizes:
        x = torch.randn(rows, 4096, generator=torch.Generator().manual_seed(0))
        for count in threads:
            torch.set_num_threads(count)
            chosen = [case for case in cases(x) if only in case.path or case.path == "clone"]
            clone = measure(chosen, repeats)
            print(f"\n{rows} x 4096 float32, {count} thread(s); clone {clone * 1e3:.1f} ms\n")
            print("| path | x clone | must | aim | |\n| --- | --- | --- | --- | --- |")
            for case in chosen:
                ratio = statistics.median(case.times) / clone
                late = case.must is not None and ratio > case.must
                aimed = case.aim is not None and ratio <= case.aim
                mark = "missed" if late else "aim" if aimed else "must" if case.must else ""
                must, aim = (f"{limit:g}" if limit else "" for limit in (case.must, case.aim))
                print(f"| {case.path} | {ratio:.2f} | {must} | {aim} | {mark} |")


def tiny() -> None:
    """Print what a module adds to torch's own fake quantization of 8 elements."""
    torch.set_num_threads(1)
    x = torch.randn(8)

    def cost(work: Callable[[], object]) -> float:
        return min(timeit.repeat(work, number=2000, repeat=9)) / 2000 * 1e6

    own = cost(lambda: torch.fake_quantize_per_tensor_affine(x, 0.1, 0, -128, 127))
    print(
        f"\n8 elements through a module, beside torch.fake_quantize's {own:.1f} us (must: 15 us)\n"
    )
    print("| format | us more |\n| --- | --- |")
    for text in ("int8/tensor/sym", "int8/tensor", "fp8_e4m3/tensor", "mxfp4"):
        spec = TensorSpec.model_validate(text).resolve("input")
        module = TensorQuantizer(spec, Format.parse(text, role="input"), "x")
        module(x)
        module.freeze()
        print(f"| {text} | {cost(lambda m=module: m(x)) - own:.1f} |")


def gpu(rows: int, repeats: int) -> None:
    """Print the Triton kernels' share of the bandwidth that a copy reaches, on this GPU."""
    name = torch.cuda.get_device_name(0)
    x = torch.randn(rows, 4096, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    out, count = torch.empty_like(x), x.numel()
    narrow = x.to(torch.bfloat16)
    narrow_out = torch.empty_like(narrow)
    # path, bytes that have to be read and written, work
    work: list[tuple[str, float, Callable[[], object]]] = [
        ("copy_ float32", 8 * count, lambda: out.copy_(x)),
        ("copy_ bfloat16", 4 * count, lambda: narrow_out.copy_(narrow)),
    ]
    for text in ("mxfp4", "mxfp8", "bfp[8|8]{64}", "nvfp4_one_level", "block_log[8|8]{16}"):
        fmt = Format.parse(text)
        work += [
            (f"{text} float32", 8 * count, lambda f=fmt: f.fake_quantize(x, out=out)),
            (f"{text} bfloat16", 4 * count, lambda f=fmt: f.fake_quantize(narrow, out=narrow_out)),
        ]
    for text, size in (("mxfp4", 0.5), ("mxfp8", 1.0)):
        fmt = Format.parse(text)
        moved = (2 + size + 1 / 32) * count
        work.append((f"{text} pack from bfloat16", moved, lambda f=fmt: f.quantize(narrow)))
        packed = fmt.quantize(narrow)
        back = (size + 1 / 32 + 2) * count
        run = lambda p=packed: p.dequantize(torch.bfloat16)  # noqa: E731
        work.append((f"{text} unpack to bfloat16", back, run))
    fmt = Format.parse("int8/tensor")
    given = fmt.measure(x)
    work.append(("int8/tensor float32", 8 * count, lambda: fmt.fake_quantize(x, given, out=out)))
    for _, _, run in work:  # compile and tune
        run()
    times: list[list[float]] = [[] for _ in work]
    for _ in range(repeats):
        for spent, (_, _, run) in zip(times, work, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            spent.append(start.elapsed_time(end) / 1e3)
    speeds = [moved / statistics.median(t) for (_, moved, _), t in zip(work, times, strict=True)]
    print(f"{name}, torch {torch.__version__}; {rows} x 4096; must 85 %, aim 92 % of the copy\n")
    print("| path | us | TB/s | share of the float32 copy |\n| --- | --- | --- | --- |")
    for (path, _, _), spent, speed in zip(work, times, speeds, strict=True):
        microseconds = statistics.median(spent) * 1e6
        share = f"{100 * speed / speeds[0]:.0f} %"
        print(f"| {path} | {microseconds:.1f} | {speed / 1e12:.2f} | {share} |")


def main() -> None:
    """Read the arguments and measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--only", default="", help="paths that hold this word")
    parser.add_argument("--gpu", action="store_true", help="measure the Triton kernels")
    arguments = parser.parse_args()
    if arguments.gpu:
        if not torch.cuda.is_available():
            parser.error("there is no GPU that torch can use")
        gpu(max(arguments.sizes), max(arguments.repeats, 51))
        return
    tiny()
    cpu(arguments.sizes, arguments.threads, arguments.repeats, arguments.only)


if __name__ == "__main__":
    with torch.no_grad():
        main()
