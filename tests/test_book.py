"""`start` makes a page repeatable, `show` shows source."""

import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from companion.book import Source, show, start


def _draws():
    return random.random(), np.random.rand(), torch.rand(3).tolist()


def test_start_seeds_every_generator_and_uses_one_thread():
    start(seed=7)
    first = _draws()
    torch.set_num_threads(2)
    start(seed=7)
    assert _draws() == first
    assert torch.get_num_threads() == 1
    start(seed=8)
    assert _draws() != first


@pytest.mark.parametrize("seed", [1.5, True, "0", -1, 2**32])
def test_start_refuses_a_bad_seed_and_changes_nothing(seed):
    start(seed=3)
    expected = _draws()
    start(seed=3)
    with pytest.raises((TypeError, ValueError), match="seed must be"):
        start(seed)
    assert _draws() == expected


def test_start_sets_a_style_that_reads_on_light_and_dark_pages():
    import matplotlib

    start()
    style = matplotlib.rcParams
    assert style["figure.facecolor"] == style["savefig.facecolor"] == "white"
    assert style["figure.constrained_layout.use"]
    assert style["axes.prop_cycle"].by_key()["color"][0] == "#0072B2"


def test_start_leaves_pyplot_to_pages_that_draw():
    code = "import sys, companion.book; companion.book.start(); sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_show_prints_the_source(capsys):
    show(Source.__repr__)
    assert capsys.readouterr().out == "def __repr__(self) -> str:\n    return self.code\n"


def test_source_is_highlighted_in_a_notebook_and_plain_in_a_terminal():
    bundle = Source("x = 1")._repr_mimebundle_()
    assert bundle == {"text/plain": "x = 1", "text/markdown": "```python\nx = 1\n```"}


@pytest.mark.parametrize("obj", [3, torch.ones(2), len])
def test_show_refuses_what_has_no_source(obj):
    with pytest.raises(TypeError, match="obj must be a class, function"):
        show(obj)
