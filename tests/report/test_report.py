"""Records, tables and the HTML page."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from quark_core.errors import RunFolderError
from quark_core.plan import Plan
from quark_core.report import format as text
from quark_core.report.charts import layer_bars, size_plot
from quark_core.report.html import write_report
from quark_core.report.record import load_records
from quark_core.report.tables import comparison_table, export_tables, plan_table

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
VOID = {"meta", "link", "br", "img", "input", "line", "circle", "rect"}


def _printed(table: object, width: int = 100) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table)
    return console.export_text()


def test_one_run_is_read_back(run_folder: Path) -> None:
    (record,) = load_records(run_folder)
    assert (record.name, record.quantizer, record.status) == ("small", "native", "finished")
    assert record.specs == "weight int8/channel, input int8"
    assert set(record.metrics) == {"accuracy", "sqnr"}
    assert record.float_bytes is not None
    assert record.quantized_bytes is not None
    assert record.quantized_bytes < record.float_bytes
    assert [layer["name"] for layer in record.layers] == ["first", "last"]


def test_what_exports_tell_of_themselves(run_folder: Path, tmp_path: Path) -> None:
    place = run_folder / "export" / "device"
    place.mkdir(parents=True)
    rows = [["<npu>", "12"]]
    table = {"title": "figures", "columns": ["core", "cycles"], "rows": rows}
    long = {"title": "long", "columns": ["layer"], "rows": [["x"]] * 50}
    told = {"title": "compiler", "facts": {"left over": "2 add"}, "tables": [table, long]}
    (place / "report.json").write_text(json.dumps(told))
    (record,) = load_records(run_folder)
    assert record.exports == [told]
    printed = "".join(_printed(part) for part in export_tables(record))
    assert "left over" in printed
    assert "cycles" in printed
    assert "long" not in printed
    page = write_report(run_folder, tmp_path / "report.html").read_text()
    assert "compiler" in page
    assert "&lt;npu&gt;" in page
    assert "<summary>long</summary>" in page


def test_a_comparison_keeps_its_failures(comparison_folder: Path) -> None:
    records = load_records(comparison_folder)
    assert [record.name for record in records] == ["small", "four", "bad"]
    assert records[2].error is not None
    assert "matches no layer" in records[2].error


def test_unfinished_run_can_be_read(run_folder: Path) -> None:
    for name in ("metrics.json", "plan.json"):
        (run_folder / name).unlink()
    (record,) = load_records(run_folder)
    assert record.metrics == {}
    assert "accuracy" in record.float_metrics
    assert write_report(run_folder).exists()


def test_damaged_and_missing_files(run_folder: Path, tmp_path: Path) -> None:
    (run_folder / "metrics.json").write_text("{")
    with pytest.raises(RunFolderError, match=r"metrics.json cannot be read"):
        load_records(run_folder)
    with pytest.raises(RunFolderError, match="holds no run"):
        load_records(tmp_path / "nowhere")


def test_comparison_table(comparison_folder: Path) -> None:
    printed = _printed(comparison_table(load_records(comparison_folder)))
    lines = {line.split()[0]: line for line in printed.splitlines() if line.strip()}
    assert "dB" in lines["small"]
    assert "1.00" in lines["float"]
    assert "failed" in lines["bad"]


def test_plan_table(run_folder: Path) -> None:
    plan = Plan.from_dict(json.loads((run_folder / "plan.json").read_text()))
    printed = _printed(plan_table(plan), 200)
    assert "int8/channel/sym" in printed
    assert "int8/tensor/asym" in printed
    assert "defaults" in printed


class _Checker(HTMLParser):
    """Notes whether tags close in order, and what the page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.scripts = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        self.fetched += [value or "" for key, value in attrs if key in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


@pytest.mark.parametrize("kind", ["run_folder", "comparison_folder"])
def test_the_page_is_whole_and_fetches_nothing(kind: str, request: pytest.FixtureRequest) -> None:
    page = write_report(request.getfixturevalue(kind)).read_text()
    checker = _Checker()
    checker.feed(page)
    assert checker.open == []
    assert checker.fetched == []
    assert checker.scripts == 0
    assert not re.search(r"(https?:)?//[a-z]", page)
    for words in (
        "Results",
        "against size",
        "Signal to noise by layer",
        "Plan",
        "version of torch",
    ):
        assert words in page


def test_the_page_tells_of_gates_and_failures(run_folder: Path, comparison_folder: Path) -> None:
    assert "(required &gt;= 500)" in write_report(run_folder).read_text()
    page = write_report(comparison_folder).read_text()
    assert "<strong>bad failed:</strong>" in page
    assert "matches no layer (nearest: last)" in page


def test_names_from_models_and_recipes_are_escaped(run_folder: Path) -> None:
    evil = "<script>alert(1)</script>"
    for name in ("metrics.json", "plan.json", "manifest.json"):
        file = run_folder / name
        file.write_text(file.read_text().replace('"first"', json.dumps(evil)))
    manifest = json.loads((run_folder / "manifest.json").read_text())
    manifest["name"], manifest["warnings"] = evil, [evil]
    (run_folder / "manifest.json").write_text(json.dumps(manifest))
    page = write_report(run_folder).read_text()
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 4


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: apt-get install chromium")
@pytest.mark.parametrize("width", [1280, 375])
def test_a_browser_draws_it_without_complaint(
    comparison_folder: Path, tmp_path: Path, width: int
) -> None:
    page = write_report(comparison_folder)
    # Sizes can be asked only from within: a copy of the page measures itself.
    probe = (
        "<script>const box = s => [...document.querySelectorAll(s)].map(e => "
        "e.getBoundingClientRect()).every(r => r.width > 0 && r.height > 0);"
        "document.title = [box('table#results'), box('svg.plot'), box('svg.plot circle'),"
        "box('details[open] svg.bars rect'), document.querySelectorAll('svg.plot circle').length,"
        "document.documentElement.scrollWidth <= innerWidth].join();</script></body>"
    )
    copy = tmp_path / "probe.html"
    copy.write_text(page.read_text().replace("</body>", probe))
    done = subprocess.run(
        [
            str(CHROMIUM),
            *FLAGS,
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--window-size={width},900",
            "--enable-logging=stderr",
            "--virtual-time-budget=3000",
            "--dump-dom",
            copy.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title is not None, done.stderr[-2000:]
    assert title[1] == "true,true,true,true,3,true"
    assert "CONSOLE" not in done.stderr
    shot = tmp_path / "shot.png"
    subprocess.run(
        [
            str(CHROMIUM),
            *FLAGS,
            f"--user-data-dir={tmp_path / 'other'}",
            f"--screenshot={shot}",
            f"--window-size={width},900",
            page.as_uri(),
        ],
        capture_output=True,
        timeout=120,
        check=True,
    )
    assert shot.stat().st_size > 5000


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("accuracy", 0.9155, "91.55 %"),
        ("sqnr", 38.123, "38.1 dB"),
        ("sqnr", float("inf"), "∞"),
        ("kl", 0.012345, "0.01235"),
        ("perplexity", 44.114, "44.11"),
        ("accuracy", None, "-"),
    ],
)
def test_metrics_as_people_read_them(name: str, value: float | None, expected: str) -> None:
    assert text.metric_text(name, value) == expected


@pytest.mark.parametrize(
    ("count", "expected"),
    [(None, "-"), (999, "999 B"), (229_223, "229 kB"), (1_500_000, "1.5 MB"), (2 * 10**9, "2 GB")],
)
def test_sizes_as_people_read_them(count: int | None, expected: str) -> None:
    assert text.bytes_text(count) == expected


@given(
    st.lists(
        st.tuples(
            st.from_regex(r"[a-z]{1,12}", fullmatch=True),
            st.integers(1, 10**10),
            st.floats(-1e3, 1e3),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_marks_stay_inside_and_labels_do_not_collide(points: list[tuple[str, int, float]]) -> None:
    svg = str(size_plot("accuracy", points, (10**6, 0.5)))
    for x, y in re.findall(r'cx="([-\d.]+)" cy="([-\d.]+)"', svg):
        assert 0 <= float(x) <= 640
        assert 0 <= float(y) <= 300
    labels = re.findall(
        r'class="label" x="([-\d.]+)" y="([-\d.]+)" text-anchor="(\w+)">(.*?)<', svg
    )
    rows: dict[float, list[tuple[float, float]]] = {}
    for x, y, anchor, words in labels:
        width = len(words) * 6.4
        left = float(x) if anchor == "start" else float(x) - width
        rows.setdefault(float(y), []).append((left, left + width))
    if len({(size, value) for _, size, value in points}) > 3:
        return  # a crowd in one spot may leave no free place
    for spans in rows.values():
        for (_, right), (left, _) in pairwise(sorted(spans)):
            assert left >= right - 1e-6


def test_many_layers_stay_readable() -> None:
    layers = [{"name": f"model.layers.{i}.mlp.down_proj", "sqnr": 20.0 + i % 7} for i in range(300)]
    svg = str(layer_bars(layers))
    assert svg.count("<rect") == 300
    assert 'class="bars dense"' in svg


def test_layers_without_a_figure() -> None:
    svg = str(layer_bars([{"name": "a", "sqnr": None}, {"name": "b", "sqnr": float("inf")}]))
    assert ">-<" in svg
    assert "∞" in svg
