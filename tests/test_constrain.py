"""companion.generate.constrain: nothing but what is allowed can be said, and all of it can."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from companion.generate import generate
from companion.generate.constrain import Copying, OneOf
from companion.models.language_model import LanguageModel, LanguageModelConfig

STOP, VOCAB = 0, 12
SEQUENCES = st.lists(
    st.lists(st.integers(1, VOCAB - 1), min_size=1, max_size=5), min_size=1, max_size=6, unique_by=tuple
)


def _allowed(filter_, said):
    """The tokens that a filter leaves after an answer so far, behind a prompt of two tokens."""
    logits = torch.randn(1, VOCAB)
    kept = filter_(logits, torch.tensor([[7, 7, *said]]))
    left = kept.isfinite()[0].nonzero()[:, 0].tolist()
    assert torch.equal(kept[0, left], logits[0, left])  # what is left is as the model said it
    return set(left)


@given(SEQUENCES)
def test_one_of_allows_exactly_the_options(options):
    constraint = OneOf(options, 2, [STOP])
    for said in {tuple(option[:n]) for option in options for n in range(len(option) + 1)}:
        going_on = {
            option[len(said)] for option in options if tuple(option[: len(said)]) == said != tuple(option)
        }
        whole = {STOP} if list(said) in options else set()
        assert _allowed(constraint, said) == going_on | whole


@given(SEQUENCES, st.data())
def test_copying_allows_exactly_the_substrings(sources, data):
    starts = [sorted(data.draw(st.sets(st.integers(0, len(s) - 1), min_size=1))) for s in sources]
    ends = [sorted(data.draw(st.sets(st.integers(0, len(s) - 1)))) for s in sources]
    constraint = Copying(sources, 2, [STOP], starts=starts, ends=ends, alternatives=[[11, 11]])
    pieces = {  # every beginning of a quotation → whether it may end there
        (i, first, last): last in ends[i]
        for i, source in enumerate(sources)
        for first in starts[i]
        for last in range(first, len(source))
    }
    texts = {tuple(sources[i][first : last + 1]) for i, first, last in pieces} | {(11,), (11, 11)}
    first_tokens = {sources[i][first] for i, places in enumerate(starts) for first in places} | {11}
    assert _allowed(constraint, ()) == first_tokens
    for said in texts:
        places = [(i, last) for (i, first, last) in pieces if tuple(sources[i][first : last + 1]) == said]
        expected = {sources[i][last + 1] for i, last in places if last + 1 < len(sources[i])}
        expected |= {11} if said == (11,) else set()
        stops = any(last in ends[i] for i, last in places) or said == (11, 11)
        if stops or not expected:
            expected.add(STOP)
        assert _allowed(constraint, said) == expected


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LanguageModelConfig(VOCAB, d_model=16, num_layers=2, num_heads=2, d_ff=32, max_length=40)
    return LanguageModel(config).eval()


@pytest.mark.verifies(
    "companion.generate.constrain.OneOf", against="transformers PrefixConstrainedLogitsProcessor"
)
@pytest.mark.verifies(
    "companion.generate.constrain.Copying", against="transformers PrefixConstrainedLogitsProcessor"
)
@pytest.mark.parametrize("kind", [OneOf, Copying])
def test_the_library_allows_the_same(agree, kind):
    from transformers.generation.logits_process import PrefixConstrainedLogitsProcessor

    sequences = [[3, 4, 5], [3, 4], [3, 6, 4, 5], [9]]

    def allowed(_, ids):
        said = ids[2:].tolist()
        texts = [tuple(s) for s in sequences]
        if kind is Copying:
            texts = [t[i:j] for t in texts for i in range(len(t)) for j in range(i + 1, len(t) + 1)]
        begun = [t for t in texts if list(t[: len(said)]) == said]
        return sorted(
            {t[len(said)] for t in begun if len(t) > len(said)} | ({STOP} if tuple(said) in texts else set())
        )

    judge, mine = PrefixConstrainedLogitsProcessor(allowed, 1), kind(sequences, 2, [STOP])
    for said in ([], [3], [3, 4], [9], [3, 6], [3, 6, 4]):
        ids, logits = torch.tensor([[7, 7, *said], [7, 7, *said]]), torch.randn(2, VOCAB)
        ours, theirs = (
            torch.nan_to_num(f(*a), neginf=-1e9) for f, a in ((mine, (logits, ids)), (judge, (ids, logits)))
        )
        agree(ours, theirs, tolerance=0, quantity="logits")


def test_a_model_says_nothing_else(model):
    options = [[3, 4, 5], [3, 4], [8, 8, 1]]
    said = set()
    for seed in range(40):
        ids = generate(
            model,
            torch.tensor([[7, 2]]),
            max_new_tokens=6,
            eos_id=STOP,
            filters=[OneOf(options, 2, [STOP])],
            generator=torch.Generator().manual_seed(seed),
        )
        answer = ids[0, 2:].tolist()
        said.add(tuple(answer[: answer.index(STOP)]))
    assert said == {tuple(option) for option in options}


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: OneOf([], 1, [0]), "options must hold at least one"),
        (lambda: OneOf([[1], []], 1, [0]), "none of them empty"),
        (lambda: OneOf([[1]], 0, [0]), "prompt_length must be at least 1"),
        (lambda: OneOf([[1]], 1, []), "stop_ids must hold at least one id"),
        (lambda: Copying([[]], 1, [0]), "sources must hold at least one token"),
        (lambda: Copying([[1]], 1, [0], starts=[]), "starts must be 1, one for each source, got 0"),
        (lambda: Copying([[1]], 1, [0], ends=[[1]]), r"ends must lie in the source, in 0 … 0"),
        (lambda: _allowed(OneOf([[1]], 2, [0]), [2]), "is the beginning of no option"),
        (lambda: _allowed(Copying([[1]], 2, [0]), [2]), "stands in no source"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
