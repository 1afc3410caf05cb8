"""What every page of the book begins with: one seed, one thread, one style of print and plot.

Pages call `start()` once, and `show(obj)` where the reader should read the companion's own source.
No mechanism imports this module.
"""

import inspect
import random
import textwrap
from dataclasses import dataclass

import numpy as np
import torch

#: Okabe & Ito's (2008) colours, safe for colour-blind readers; without the yellow, faint on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")

_STYLE = {
    "figure.figsize": (6.4, 3.6),
    "figure.dpi": 130,
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
    "savefig.facecolor": "white",
    "axes.facecolor": "white",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 11,
    "axes.labelsize": 10,
    "font.size": 10,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "image.cmap": "viridis",
    "image.interpolation": "nearest",
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
}


def start(seed: int = 0) -> None:
    """Make a page repeatable: seed python, numpy and torch, use one thread, set print and plot style.

    Args:
        seed: any integer from 0 to 2**32 - 1, the range numpy accepts.

    Raises:
        TypeError, ValueError: if `seed` is no such integer; nothing has been changed then.
    """
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an int, got {type(seed).__name__}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be from 0 to 2**32 - 1, got {seed}")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    torch.set_printoptions(precision=4, sci_mode=False, linewidth=100)
    np.set_printoptions(precision=4, suppress=True, linewidth=100)
    _style_plots()


def _style_plots() -> None:
    import matplotlib  # pyplot, the slow part, is left to the pages that draw

    matplotlib.rcParams.update(_STYLE)
    matplotlib.rcParams["axes.prop_cycle"] = matplotlib.cycler(color=PALETTE)


@dataclass(frozen=True)
class Source:
    """Python source that a notebook highlights in the colours of its theme, and a terminal prints."""

    code: str

    def __repr__(self) -> str:
        return self.code

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict[str, str]:
        return {"text/plain": self.code, "text/markdown": f"```python\n{self.code}\n```"}


def show(obj) -> None:
    """Display the source of a class, function, method or module of the companion.

    Args:
        obj: anything `inspect.getsource` can find the source of.

    Raises:
        TypeError: if `obj` has no Python source (a number, a tensor, a built-in).
    """
    try:
        code = inspect.getsource(obj)
    except (TypeError, OSError) as error:
        raise TypeError(
            f"obj must be a class, function, method or module with Python source, got {type(obj).__name__}"
        ) from error
    source = Source(textwrap.dedent(code).rstrip())
    try:
        from IPython import get_ipython
        from IPython.display import display
    except ImportError:
        print(source)
        return
    if get_ipython() is None:
        print(source)
    else:
        display(source)
