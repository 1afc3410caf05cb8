"""The table of evidence is complete: a row for every mark, a mark for every row, a row for every mechanism.

That a fresh run is no worse than a row's tolerance is asserted where it is measured, in the fixture `agree`.
"""

import importlib
import inspect
import json
import pkgutil

import pytest
from conftest import MARKS, VERIFIED, resolve

import companion

KEYS = {"mechanism", "against", "version", "quantity", "max_error", "tolerance", "cases"}
FLOORS = (
    "attention",
    "masks",
    "position",
    "norm",
    "feedforward",
    "recurrent",
    "autograd",
    "embeddings",
    "tokenizers",
    "models",
    "train",
    "generate",
    "measure",
    "quantize",
    "rag",
)

# Public names that compute nothing of their own, or that are proven through the mechanism they serve.
EXCEPTIONS = {
    "companion.autograd.Cost": "a record of counts, proven with cost",
    "companion.masks.check_mask": "refuses bad input; tested with the masks",
    "companion.models.transformer.TransformerConfig": "a record of sizes",
    "companion.models.transformer.LayerCache": "a record of two caches",
    "companion.models.transformer.DecoderCache": "a list of caches, proven with Transformer.decode",
    "companion.recurrent.Seq2SeqConfig": "a record of sizes",
    "companion.recurrent.Seq2SeqCache": "a record of a state, proven with Seq2SeqLSTM.decode",
    "companion.models.language_model.LanguageModelConfig": "a record of sizes",
    "companion.models.bert.BertConfig": "a record of sizes",
    "companion.generate.decoding.Hypothesis": "a record of a result",
    "companion.generate.speculative.Drafter": "a protocol",
    "companion.generate.speculative.Round": "a record of a result",
    "companion.generate.speculative.Speculation": "a record of a result",
    "companion.generate.stream.Tokenizer": "a protocol",
    "companion.generate.stream.Piece": "a record of a result",
    "companion.generate.stream.Completion": "a record of a result",
    "companion.train.checkpoint.Checkpoint": "a record of a state",
    "companion.train.checkpoint.load_weights": "storage; proven with save_weights",
    "companion.train.checkpoint.save_checkpoint": "storage; proven by resuming to the same weights",
    "companion.train.checkpoint.read_checkpoint": "storage; proven by resuming to the same weights",
    "companion.train.checkpoint.restore": "storage; proven by resuming to the same weights",
    "companion.train.checkpoint.random_state": "bookkeeping; proven by resuming to the same weights",
    "companion.train.checkpoint.set_random_state": "bookkeeping; proven by resuming to the same weights",
    "companion.train.loop.History": "a record of a run",
    "companion.train.loop.local_device": "reads the environment of torchrun",
    "companion.measure.params.Parameters": "a record of counts",
    "companion.measure.flops.Flops": "a record of counts",
    "companion.measure.flops.Traffic": "a record of counts",
    "companion.quantize.gguf.TensorInfo": "a record of a place",
    "companion.rag.clicks.swap_at_random": "a shuffle, proven with estimate_propensities",
    "companion.rag.commands.index": "the command line",
    "companion.rag.commands.ask": "the command line",
    "companion.rag.commands.encoder": "loads the encoder of the command line",
    "companion.rag.construct.Schema": "a record of names, proven with run_query",
    "companion.rag.construct.TableQuery": "a record of a question, proven with run_query",
    "companion.rag.construct.ConstructionError": "an error",
    "companion.rag.construct.check_query": "refuses bad input; tested with parse_query",
    "companion.rag.construct.parse_query": "reads a query, proven with run_query",
    "companion.rag.construct.to_sql": "writes a query, proven with run_query",
    "companion.rag.construct.run_select": "runs a statement, proven with run_query",
    "companion.rag.construct.construct_query": "a prompt around parse_query",
    "companion.rag.evaluate.Estimate": "a record of a result",
    "companion.rag.evaluate.score_rankings": "a metric for each query, proven with the metrics",
    "companion.rag.graph.Triple": "a record of a fact",
    "companion.rag.prompt.PromptMemory": "a cache; choose with it is held against choose without",
    "companion.rag.graph.Mention": "a record of a place",
    "companion.rag.graph.CommunitySummary": "a record of a result, proven with summarise_community",
    "companion.rag.load.Document": "a record of a text",
    "companion.rag.load.DocumentError": "an error",
    "companion.rag.pipeline.Stage": "a record of a step",
    "companion.rag.pipeline.Trace": "a record of steps",
    "companion.rag.pipeline.Answer": "a record of a result",
    "companion.rag.prompt.Claim": "a record of a result",
    "companion.rag.prompt.CitationReport": "a record of a result, proven with check_citations",
    "companion.rag.prompt.Quotation": "a record of a result",
    "companion.rag.route.Route": "a record of a decision",
    "companion.rag.split.Passage": "a record of a place",
    "companion.rag.index.ivf.nearest": "the step of kmeans, proven with it",
    "companion.quantize.uniform.QuantisationError": "a record of a result",
}


def _rows() -> list[dict]:
    if not VERIFIED.exists():
        pytest.fail(f"{VERIFIED.name} is missing: run `make evidence`.")
    return json.loads(VERIFIED.read_text(encoding="utf-8"))


def _mechanisms() -> list[str]:
    """The public classes and functions of floors 1 and 2, each by the module that defines it."""
    found = []
    for info in pkgutil.walk_packages(companion.__path__, "companion."):
        parts = info.name.split(".")
        if parts[1] not in FLOORS or any(part.startswith("_") for part in parts):
            continue
        for name, value in vars(importlib.import_module(info.name)).items():
            is_own = getattr(value, "__module__", None) == info.name
            if is_own and not name.startswith("_") and (inspect.isclass(value) or inspect.isfunction(value)):
                found.append(f"{info.name}.{name}")
    return found


def test_rows_are_well_formed_and_within_their_tolerance():
    for row in _rows():
        name = f"verified.json, {row.get('mechanism')} against {row.get('against')}:"
        assert row.keys() == KEYS, f"{name} its keys must be {sorted(KEYS)}: run `make evidence`."
        assert 0 <= row["max_error"] <= row["tolerance"], (
            f"{name} {row['max_error']} exceeds {row['tolerance']}."
        )
        assert row["cases"] >= 1, f"{name} no case was compared."
        assert resolve(row["mechanism"]) is not None


def test_every_mark_has_a_row(request):
    rows = {(row["mechanism"], row["against"]) for row in _rows()}
    marked = request.config.stash[MARKS]
    missing = [f"{pair[0]} against {pair[1]} ({marked[pair]})" for pair in sorted(marked.keys() - rows)]
    assert not missing, f"no row for {missing}: compare with `agree` in the test and run `make evidence`."


def test_every_row_has_a_mark(request):
    marked = request.config.stash[MARKS]
    files = {
        path.name
        for path in VERIFIED.parents[3].glob("tests/test_*.py")
        if "verifies(" in path.read_text("utf-8")
    }
    if not files - {"test_pages.py"} <= set(marked.values()):
        pytest.skip("only a part of the tests was collected")
    stale = [row for row in _rows() if (row["mechanism"], row["against"]) not in marked]
    assert not stale, f"no test verifies {[row['mechanism'] for row in stale]} any more: run `make evidence`."


@pytest.mark.parametrize("mechanism", [name for name in _mechanisms() if name not in EXCEPTIONS])
def test_every_mechanism_has_evidence(mechanism):
    proven = {row["mechanism"] for row in _rows()}
    assert any(name == mechanism or name.startswith(f"{mechanism}.") for name in proven), (
        f"{mechanism} has no row in verified.json: mark an equality test with "
        f'`@pytest.mark.verifies("{mechanism}", against=…)`, compare with `agree`, run `make evidence`.'
    )


def test_exceptions_exist():
    gone = sorted(set(EXCEPTIONS) - set(_mechanisms()))
    assert not gone, f"EXCEPTIONS names {gone}, which do not exist: take them out."
