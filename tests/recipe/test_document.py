"""Reading recipe files: plain data only, with exact lines, and overrides."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from quark_core.errors import ConfigError
from quark_core.recipe.document import MAX_BYTES, read, walk
from quark_core.recipe.overrides import apply, split_path


def _read(tmp_path: Path, text: str, name: str = "r.yaml") -> object:
    file = tmp_path / name
    file.write_text(text)
    return read(file)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: 2\na: 3\n", ":3: recipe: the key 'a' stands there twice"),
        ("a: !!python/object/apply:os.system ['true']\n", "!!python/object/apply:os.system is not"),
        ("a: !mine 3\n", "the tag !mine is not accepted: a recipe is plain data"),
        ("a: &x {b: 1}\nc:\n  <<: *x\n", "keys are plain words: merges and complex keys"),
        ("a: [1, 2\nb: 3\n", "not YAML: while parsing a flow sequence"),
        ("- 1\n- 2\n", ":1: recipe: must be a mapping with keys, not list"),
        ("a:\n  b: '${HOME}/x'\n", ":2: a.b: '${HOME}/x' asks for an environment variable"),
        ("a: &a [*a]\n", "refers to itself"),
    ],
)
def test_refused_yaml(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        _read(tmp_path, text)
    assert words in str(caught.value)


def test_alias_bomb_is_refused(tmp_path: Path) -> None:
    lines = ["a0: &a0 [1,1,1,1,1,1,1,1,1]"]
    lines += [f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
    with pytest.raises(ConfigError, match="holds more than 20000 values, aliases expanded"):
        _read(tmp_path, "\n".join(lines))


def test_large_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a recipe has at most 1000000"):
        _read(tmp_path, "a: " + "x" * MAX_BYTES)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read(tmp_path / "nowhere.yaml")


def test_bad_toml(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"r.toml:2: recipe: not TOML"):
        _read(tmp_path, "a = 1\nb = = 2\n", "r.toml")


def test_plain_values_come_as_yaml_has_them(tmp_path: Path) -> None:
    text = "a: 1\nb: 1.5\nc: true\nd: null\ne: text\nf: [1, {g: 2}]\nh: 1e-3\n"
    document = _read(tmp_path, text)
    assert document.data == yaml.safe_load(text)  # type: ignore[attr-defined]


def test_lines_of_values_and_of_what_is_missing(tmp_path: Path) -> None:
    document = read_text(tmp_path, "a:\n  b:\n    - c: 1\n      d: 2\n    - c: 3\ne: 4\n")
    assert document.line("a.b[0].d") == 4
    assert document.line("a.b[1].c") == 5
    assert document.line("a.b[1].missing") == 5
    assert document.line("e") == 6


def read_text(tmp_path: Path, text: str):  # type: ignore[no-untyped-def]
    return _read(tmp_path, text)


names = st.from_regex(r"[a-z][a-z0-9_]{0,5}", fullmatch=True)
trees = st.recursive(
    st.one_of(st.integers(), st.booleans(), st.none(), names),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(names, inner, max_size=3)),
    max_leaves=12,
)


@given(st.dictionaries(names, trees, min_size=1, max_size=4))
def test_every_path_leads_back_to_its_value(data: dict[str, object]) -> None:
    for path, value in walk(data):
        if path:
            here: object = data
            for step in split_path(path):
                here = here[step]  # type: ignore[index]
            assert here is value


@given(st.dictionaries(names, trees, min_size=1, max_size=4), st.integers())
def test_override_changes_one_value_and_leaves_the_original(
    data: dict[str, object], value: int
) -> None:
    before = repr(data)
    for path, _ in walk(data):
        if path:
            changed, given_paths = apply(data, [f"{path}={value}"])
            here: object = changed
            for step in split_path(path):
                here = here[step]  # type: ignore[index]
            assert here == value
            assert given_paths == {path}
    assert repr(data) == before


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("quantizer.weight", "has no '=': write --set PATH=VALUE"),
        ("a..b=1", "'a..b' is no path such as quantizer.rules[0].weight"),
        ("rules[3].skip=true", "[3] is past the end: the list has 1 entries"),
        ("name.inner=1", "'inner' needs a mapping before it, found str"),
        ("name[0]=1", "[0] needs a list before it, found str"),
        ("name=[1", "is no value"),
    ],
)
def test_bad_override(argument: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        apply({"name": "x", "rules": [{"glob": "*"}]}, [argument])
    assert f"--set {argument}: " in str(caught.value)
    assert words in str(caught.value)


def test_override_makes_what_is_missing() -> None:
    changed, _ = apply({}, ["a.b.c=int8", "l[0].x=true", "l[1]={glob: '*', skip: true}"])
    assert changed == {"a": {"b": {"c": "int8"}}, "l": [{"x": True}, {"glob": "*", "skip": True}]}
