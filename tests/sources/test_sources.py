"""Models and data by name: what loads, what is refused, and the words for it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from quark_core.errors import DataError, MissingDependencyError, UntrustedContentError
from quark_core.sources import checkpoint, code, data, models
from quark_core.sources.context import Context
from quark_core.sources.options import (
    ArrayOptions,
    HuggingFaceOptions,
    ImageFolderOptions,
    PythonDataOptions,
    PythonModelOptions,
    TextOptions,
    TimmOptions,
)

CODE = """
import helper
import torch

class Net(torch.nn.Linear):
    pass

def build(width=3):
    return Net(2, width)

def number():
    return 3

def fails():
    raise RuntimeError("no weights today")

def batches(count=4):
    for index in range(count):
        yield torch.full((2, 2), float(index))

VALUE = 7
"""


@pytest.fixture
def context(tmp_path: Path) -> Context:
    """A recipe folder with code in it."""
    (tmp_path / "code.py").write_text(CODE)
    (tmp_path / "helper.py").write_text("X = 1\n")
    return Context(tmp_path)


def _model(context: Context, factory: str, **more: Any) -> torch.nn.Module:
    return models.from_python(PythonModelOptions(factory=factory, **more), context)


def test_python_model_with_arguments(context: Context) -> None:
    model = _model(context, "code.py:build", kwargs={"width": 5})
    assert not model.training
    assert model.get_parameter("weight").shape == (5, 2)


def test_python_model_of_an_installed_module(context: Context) -> None:
    model = _model(context, "torch.nn:Linear", kwargs={"in_features": 2, "out_features": 1})
    assert isinstance(model, torch.nn.Linear)


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        ("nowhere.py:build", "nowhere.py does not exist"),
        ("code.py:biuld", "code.py has no 'biuld'. Did you mean 'build'"),
        ("code.py:VALUE", "'code.py:VALUE' is int, not callable. Name a function or a class"),
        ("code.py:number", "'code.py:number' returned int, not a torch.nn.Module"),
        ("code.py:fails", "'code.py:fails' raised RuntimeError (no weights today)"),
        ("no_such_module:build", "importing no_such_module raised ModuleNotFoundError"),
    ],
)
def test_python_model_errors(context: Context, factory: str, words: str) -> None:
    with pytest.raises(DataError) as caught:
        _model(context, factory)
    assert str(caught.value).startswith("model.factory: ")
    assert words in str(caught.value)


def test_code_that_fails_to_import(context: Context) -> None:
    (context.folder / "bad.py").write_text("import helper\n1 / 0\n")
    with pytest.raises(DataError, match=r"importing .*bad.py raised ZeroDivisionError"):
        _model(context, "bad.py:build")


def test_no_code_means_no_code(context: Context) -> None:
    with pytest.raises(UntrustedContentError, match="asks for the Python code 'code.py:build'"):
        _model(Context(context.folder, allow_code=False), "code.py:build")


def test_import_path_is_as_before(context: Context) -> None:
    import sys

    before = list(sys.path)
    code.load_callable("code.py:build", context, "here")
    assert sys.path == before


def test_two_files_of_one_name_are_two_modules(tmp_path: Path) -> None:
    for folder, width in (("a", 1), ("b", 2)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "m.py").write_text(f"def f(): return {width}\n")
    found = [code.call("m.py:f", {}, Context(tmp_path / name), "x") for name in ("a", "b")]
    assert found == [1, 2]


class _Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


def test_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    marker = tmp_path / "it-ran"
    torch.save({"weight": _Evil(marker)}, tmp_path / "evil.pt")
    with pytest.raises(UntrustedContentError) as caught:
        checkpoint.read_state(tmp_path / "evil.pt")
    assert not marker.exists()
    assert "asks for code to be run, which is refused" in str(caught.value)
    assert "system" in str(caught.value)
    assert "safetensors.torch.save_file(model.state_dict(), 'model.safetensors')" in str(
        caught.value
    )


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_checkpoints_of_tensors_load(tmp_path: Path, suffix: str) -> None:
    model, other = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
    file = tmp_path / f"m.{suffix}"
    if suffix == "pt":
        torch.save({"state_dict": model.state_dict()}, file)
    else:
        save_file(model.state_dict(), file)
    checkpoint.load_into(other, file)
    assert torch.equal(model.weight, other.weight)


def test_checkpoint_that_does_not_fit(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(4, 2), "extra": torch.zeros(1)}, tmp_path / "m.safetensors")
    with pytest.raises(DataError) as caught:
        checkpoint.load_into(torch.nn.Linear(2, 3), tmp_path / "m.safetensors")
    for words in ("missing: bias", "unexpected: extra", "weight [4, 2] for [3, 2]"):
        assert words in str(caught.value)


@pytest.mark.parametrize("name", ["m.safetensors", "m.pt"])
def test_damaged_checkpoint(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"not a checkpoint at all")
    with pytest.raises((DataError, UntrustedContentError), match="model.checkpoint: "):
        checkpoint.read_state(tmp_path / name)


def test_checkpoint_without_names(tmp_path: Path) -> None:
    torch.save([torch.zeros(1)], tmp_path / "m.pt")
    with pytest.raises(DataError, match="holds list, not tensors by name"):
        checkpoint.read_state(tmp_path / "m.pt")


def test_timm_says_what_to_install(context: Context) -> None:
    try:
        import timm  # type: ignore[import-not-found] # noqa: F401
    except ImportError:
        with pytest.raises(MissingDependencyError, match=r'pip install "quark-core\[timm\]"'):
            models.from_timm(TimmOptions(model="resnet18"), context)


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """Ten samples of images with labels."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, size=(10, 3, 4, 4), dtype=np.uint8)
    np.savez(tmp_path / "d.npz", images=images, labels=np.arange(10), short=np.arange(4))
    return tmp_path / "d.npz"


def _arrays(archive: Path, **options: Any) -> data.Batches:
    return data.from_npz(ArrayOptions(path=archive.name, **options), Context(archive.parent))


def test_npz_batches_are_cut_and_normalized(archive: Path) -> None:
    normalize = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7]}
    found = _arrays(archive, input="images", target="labels", batch_size=4, normalize=normalize)
    assert len(found) == 3
    assert [len(batch) for batch in found] == [4, 4, 2]
    raw = torch.from_numpy(np.load(archive)["images"]).float() / 255
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.6, 0.7])
    expected = (raw - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)
    assert torch.equal(torch.cat([batch.args[0] for batch in found]), expected)
    assert torch.equal(found[2].target, torch.tensor([8, 9]))
    assert torch.equal(next(iter(found)).args[0], found[0].args[0])


def test_npz_limits_samples_and_names_arguments(archive: Path) -> None:
    found = _arrays(archive, input={"pixels": "images"}, samples=5, batch_size=5)
    assert len(found) == 1
    assert set(found[0].kwargs) == {"pixels"}
    assert found[0].target is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"input": "imags"}, "data.input: d.npz has no array 'imags'. Did you mean 'images'?"),
        ({"input": "images", "target": "y"}, "data.target: d.npz has no array 'y'. It has images"),
        ({"input": "images", "target": "short"}, "the arrays differ in length: images 10, short 4"),
    ],
)
def test_npz_errors(archive: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError) as caught:
        _arrays(archive, **options)
    assert words in str(caught.value)


def test_normalize_must_fit_the_channels(archive: Path) -> None:
    found = _arrays(archive, input="images", normalize={"mean": [0, 0], "std": [1, 1]})
    with pytest.raises(DataError, match="normalize has 2 channels, the data 3"):
        found[0]


def test_damaged_npz(tmp_path: Path) -> None:
    (tmp_path / "d.npz").write_text("nothing")
    with pytest.raises(DataError, match="cannot be read as npz"):
        _arrays(tmp_path / "d.npz", input="x")


def test_npz_with_pickled_objects_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.array([{"a": 1}], dtype=object))
    with pytest.raises(DataError, match="without object arrays"):
        _arrays(tmp_path / "d.npz", input="x")


def test_safetensors_data(tmp_path: Path) -> None:
    save_file({"x": torch.arange(6.0).reshape(3, 2)}, tmp_path / "d.safetensors")
    options = ArrayOptions(path="d.safetensors", input="x", batch_size=2)
    found = data.from_safetensors(options, Context(tmp_path))
    assert torch.equal(found[1].args[0], torch.tensor([[4.0, 5.0]]))


def test_python_data_from_a_generator_can_be_read_twice(context: Context) -> None:
    found = data.from_python(PythonDataOptions(factory="code.py:batches", batches=3), context)
    assert len(list(found)) == len(list(found)) == 3


def test_python_data_that_is_none(context: Context) -> None:
    with pytest.raises(DataError, match="'code.py:number' returned int, not batches"):
        data.from_python(PythonDataOptions(factory="code.py:number"), context)


def test_images_in_class_folders(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    for index, name in enumerate(["cat", "dog"]):
        (tmp_path / name).mkdir()
        array = np.full((4, 6, 3), index * 100, dtype=np.uint8)
        image.fromarray(array).save(tmp_path / name / "a.png")
    options = ImageFolderOptions(path=".", size=(8, 8), batch_size=2)
    (batch,) = data.from_image_folder(options, Context(tmp_path))
    assert batch.args[0].shape == (2, 3, 8, 8)
    assert batch.target.tolist() == [0, 1]
    (tmp_path / "dog" / "b.png").write_text("no image")
    with pytest.raises(DataError, match="b.png is no image"):
        list(data.from_image_folder(options, Context(tmp_path)))


def test_image_folder_without_images(tmp_path: Path) -> None:
    pytest.importorskip("PIL.Image")
    with pytest.raises(DataError, match="has no images in subfolders"):
        data.from_image_folder(ImageFolderOptions(path="."), Context(tmp_path))


@pytest.mark.llm
def test_text_windows_with_next_tokens(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = {"[UNK]": 0, **{f"w{index}": index + 1 for index in range(50)}}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=model, unk_token="[UNK]")
    fast.save_pretrained(tmp_path / "tok")
    lines = [json.dumps({"text": " ".join(f"w{i}" for i in range(25))}) for _ in range(2)]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    options = TextOptions(path="t.jsonl", tokenizer="tok", length=10, batch_size=2)
    found = data.from_text(options, Context(tmp_path))
    assert len(found) == 3
    ids = found[0].kwargs["input_ids"]
    assert ids[0].tolist() == list(range(1, 11))
    assert found[0].target[0].tolist() == [*range(2, 11), -100]
    with pytest.raises(DataError, match="fewer than one window of 1000"):
        data.from_text(options.model_copy(update={"length": 1000}), Context(tmp_path))
    with pytest.raises(DataError, match="line 1 of t.jsonl has no text under 'body'"):
        data.from_text(options.model_copy(update={"field": "body"}), Context(tmp_path))


@pytest.mark.llm
def test_huggingface_folder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "m")
    model = models.from_huggingface(HuggingFaceOptions(path="m"), Context(tmp_path))
    assert not model.training
    with pytest.raises(DataError, match="transformers has no class 'AutoModl'"):
        models.from_huggingface(
            HuggingFaceOptions(path="m", auto_class="AutoModl"), Context(tmp_path)
        )
    remote = HuggingFaceOptions(path="m", trust_remote_code=True)
    with pytest.raises(UntrustedContentError, match="trust_remote_code asks for code that comes"):
        models.from_huggingface(remote, Context(tmp_path, allow_code=False))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="transformers cannot load 'empty'"):
        models.from_huggingface(HuggingFaceOptions(path="empty"), Context(tmp_path))
