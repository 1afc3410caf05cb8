"""The marker `verifies`, the fixture `agree` and the option `--evidence`: how the book measures its claims.

A test marked `@pytest.mark.verifies("companion.norm.LayerNorm", against="torch.nn.LayerNorm")` compares
with `agree(mine, theirs, tolerance=1e-6, quantity="output")`. Each comparison is recorded; `make evidence`
writes book/reference/_data/verified.json, one row for each mechanism, judge and quantity.

Hypothesis draws 100 examples a test, the same in every run; with `--hypothesis-profile=random` others each
time, with `--hypothesis-profile=thorough` 100,000: name the tests to run so.
"""

import contextlib
import functools
import importlib
import importlib.metadata
import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

VERIFIED = Path(__file__).parents[1] / "book" / "reference" / "_data" / "verified.json"
_RECORDS: list[list] = []  # of [mechanism, against, quantity, error, tolerance], in the process that reports
_MESSAGE = pytest.StashKey[str]()
MARKS = pytest.StashKey[dict]()  # (mechanism, against) → the file of a test that carries this mark

settings.register_profile("steady", derandomize=True, deadline=None)
settings.register_profile("random", deadline=None)
settings.register_profile("thorough", max_examples=100_000, deadline=None)
settings.load_profile("steady")


def pytest_addoption(parser):
    parser.addoption("--evidence", metavar="PATH", help="write what the fixture `agree` measured to PATH")


def pytest_configure(config):
    config.stash[MARKS] = {}
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    """Every test draws the same numbers, alone or among others, in whatever order."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def pytest_itemcollected(item):
    for mechanism, against in _marks(item):
        item.config.stash[MARKS][mechanism, against] = item.path.name


def pytest_collection_modifyitems(config, items):
    """A run for the evidence needs the measuring tests alone."""
    if config.getoption("--evidence"):
        config.hook.pytest_deselected(
            items=[item for item in items if not item.get_closest_marker("verifies")]
        )
        items[:] = [item for item in items if item.get_closest_marker("verifies")]


def resolve(name: str):
    """The object that a dotted name means: companion.norm.LayerNorm.forward → the function."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        with contextlib.suppress(ModuleNotFoundError):
            found = importlib.import_module(".".join(parts[:cut]))
            return functools.reduce(getattr, parts[cut:], found)
    raise ModuleNotFoundError(f"{name} names no module")


def _marks(node) -> list[tuple[str, str]]:
    """The (mechanism, judge) pairs of a test, each mechanism by the name of the module that defines it."""
    pairs = []
    for mark in node.iter_markers("verifies"):
        try:
            mechanism = resolve(mark.args[0])
        except (AttributeError, ModuleNotFoundError) as error:
            raise pytest.UsageError(
                f"{node.nodeid} verifies {mark.args[0]}, which does not exist: {error}"
            ) from None
        pairs.append((f"{mechanism.__module__}.{mechanism.__qualname__}", mark.kwargs["against"]))
    return pairs


@pytest.fixture
def agree(request):
    """`agree(mine, theirs, *, tolerance, quantity)`: assert that the largest error is within the tolerance.

    Tensors, arrays and floats: the largest absolute difference, shapes equal, NaN nowhere. Sequences of ints
    or strings (ids, merges, tokens): the number of places that differ. Mappings: the same keys, the values
    compared. Also fails where the error exceeds the tolerance recorded in verified.json.
    """
    marks = _marks(request.node)
    if not marks:
        pytest.fail(f"{request.node.nodeid} uses `agree` without the mark `verifies(mechanism, against=)`")
    recorded = {} if request.config.getoption("--evidence") else _recorded_tolerances()

    def compare(mine, theirs, *, tolerance: float, quantity: str) -> None:
        error = _error(mine, theirs, quantity)
        assert error <= tolerance, f"{quantity}: error {error:.3g} exceeds the tolerance {tolerance:.3g}"
        for mechanism, against in marks:
            limit = recorded.get((mechanism, against, quantity), math.inf)
            assert error <= limit, (
                f"{quantity}: error {error:.3g} exceeds {limit:.3g}, the tolerance in verified.json; "
                "if the looser tolerance is right, run `make evidence`"
            )
            record = [mechanism, against, quantity, error, tolerance]
            request.node.user_properties.append(("evidence", record))

    return compare


def _recorded_tolerances() -> dict[tuple[str, str, str], float]:
    if not VERIFIED.exists():
        return {}
    rows = json.loads(VERIFIED.read_text(encoding="utf-8"))
    return {(row["mechanism"], row["against"], row["quantity"]): row["tolerance"] for row in rows}


def _error(mine, theirs, quantity: str) -> float:
    if isinstance(mine, Mapping):
        assert mine.keys() == theirs.keys(), f"{quantity}: the keys differ: {mine.keys() ^ theirs.keys()}"
        return max((_error(mine[key], theirs[key], f"{quantity}[{key!r}]") for key in mine), default=0.0)
    if isinstance(mine, str) or _is_discrete(mine):
        mine, theirs = list(mine), list(theirs)
        return float(sum(a != b for a, b in zip(mine, theirs, strict=False)) + abs(len(mine) - len(theirs)))
    mine, theirs = _to_array(mine), _to_array(theirs)
    assert mine.shape == theirs.shape, f"{quantity}: shapes {mine.shape} and {theirs.shape} differ"
    assert not np.isnan(mine).any(), f"{quantity}: NaN in our result"
    assert not np.isnan(theirs).any(), f"{quantity}: NaN in the judge's result"
    unequal = mine != theirs  # two equal infinities agree
    return float(np.abs(mine[unequal] - theirs[unequal]).max(initial=0.0))


def _is_discrete(value) -> bool:
    if not isinstance(value, Sequence):
        return False
    return all(not isinstance(item, (float, torch.Tensor, np.ndarray, np.floating)) for item in value)


def _to_array(value) -> np.ndarray:
    if isinstance(value, (list, tuple)):
        return np.stack([_to_array(item) for item in value])
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = value.double() if value.is_floating_point() else value
        return value.numpy()
    return np.asarray(value, dtype=np.float64 if np.asarray(value).dtype.kind == "f" else None)


def pytest_runtest_logreport(report):
    """Runs in the process that reports, so it sees every record, with or without pytest-xdist."""
    if report.when != "call" or not report.passed:
        return
    _RECORDS.extend(record for name, record in report.user_properties if name == "evidence")


def pytest_sessionfinish(session, exitstatus):
    path = session.config.getoption("--evidence")
    if not path or hasattr(session.config, "workerinput"):
        return
    if exitstatus != 0:
        session.config.stash[_MESSAGE] = f"evidence not written to {path}: the run did not pass"
        return
    rows = _merge(_RECORDS)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    session.config.stash[_MESSAGE] = f"{len(rows)} rows of evidence written to {path}"


def pytest_terminal_summary(terminalreporter, config):
    if message := config.stash.get(_MESSAGE, None):
        terminalreporter.write_line(message)


def _merge(records: list[list]) -> list[dict]:
    rows: dict[tuple, dict] = {}
    for mechanism, against, quantity, error, tolerance in records:
        row = rows.setdefault(
            (mechanism, against, quantity),
            {
                "mechanism": mechanism,
                "against": against,
                "version": _version(against),
                "quantity": quantity,
                "max_error": 0.0,
                "tolerance": 0.0,
                "cases": 0,
            },
        )
        row["max_error"] = max(row["max_error"], float(f"{error:.1e}"))
        row["tolerance"] = max(row["tolerance"], float(f"{tolerance:.3g}"))
        row["cases"] += 1
    return [rows[key] for key in sorted(rows)]


def _version(against: str) -> str:
    """The version of the distribution a judge comes from; empty for enumeration and closed forms."""
    names = _distributions().get(against.split(".")[0])
    return importlib.metadata.version(names[0]).split("+")[0] if names else ""


@functools.cache
def _distributions() -> Mapping[str, list[str]]:
    return importlib.metadata.packages_distributions()


@pytest.fixture(scope="session")
def babbler():
    """A chat model with random weights and SmolLM2's vocabulary: without a constraint it says anything."""
    from companion.chat import LocalChatModel
    from companion.data.assets import asset_path
    from companion.models.language_model import LanguageModel, LanguageModelConfig
    from companion.quantize.gguf import GGUFFile
    from companion.tokenizers.bpe import BPETokenizer

    with GGUFFile.open(asset_path("smollm2")) as file:
        tokenizer = BPETokenizer.from_gguf(file.metadata)
    torch.manual_seed(0)
    sizes = {"d_model": 16, "num_layers": 1, "num_heads": 2, "d_ff": 32, "max_length": 2048}
    config = LanguageModelConfig(tokenizer.vocab_size, position="rotary", **sizes)
    return LocalChatModel(LanguageModel(config).eval(), tokenizer)


def mutate(path, data) -> None:
    """Replace up to 20 bytes of a file, wherever hypothesis likes, by up to 20 others."""
    from hypothesis import strategies as st

    whole = path.read_bytes()
    start = data.draw(st.integers(0, len(whole)))
    end = data.draw(st.integers(start, min(start + 20, len(whole))))
    path.write_bytes(whole[:start] + data.draw(st.binary(max_size=20)) + whole[end:])
