"""Searches against loops without a cache, all possible sequences, and a beam search in plain Python."""

import itertools

import pytest
import torch
from torch import nn

from companion.generate import Hypothesis, beam_search, greedy_search
from companion.generate.decoding import length_penalty
from companion.models.transformer import Transformer, TransformerConfig

PAD, BOS, EOS = 0, 1, 2
TOKENS = {"bos_id": BOS, "eos_id": EOS}
SEEDS = [2, 3, 4, 7]  # models over six tokens that end early, late and not at all


def model(vocab_size=5, seed=0, dtype=torch.float64, **changes) -> Transformer:
    """A Transformer whose logits depend on the source and on every token of the prefix, far apart."""
    torch.manual_seed(seed)
    sizes = {"d_model": 16, "num_heads": 2, "num_encoder_layers": 1, "num_decoder_layers": 2, "d_ff": 19}
    mine = Transformer(
        TransformerConfig(
            vocab_size, **{"norm_first": True, "tie_output": False, "dropout": 0.3, **sizes, **changes}
        )
    )
    for name, parameter in mine.named_parameters():
        std = 0.05 if parameter.dim() == 1 else 0.3 if "embedding" in name else 0.6
        nn.init.normal_(parameter, float(name.endswith("gain")), std)
    return mine.to(dtype).eval()


def sources(batch, n=6, vocab_size=5):
    ids = torch.randint(3, vocab_size, (batch, n))
    return ids.masked_fill(torch.arange(n) >= (n - torch.arange(batch) % n)[:, None], PAD)


def next_log_probs(mine, source, prefix):
    """log p of every token after each prefix, by running the whole model on it."""
    target = torch.tensor([[BOS, *prefix]])
    with torch.no_grad():
        return mine(source, target)[0, -1].double().log_softmax(-1).tolist()


def greedy_by_hand(mine, source, max_length):
    prefix = []
    while len(prefix) < max_length:
        scores = next_log_probs(mine, source, prefix)
        prefix.append(scores.index(max(scores)))
        if prefix[-1] == EOS:
            return prefix[:-1]
    return prefix


def every_sequence(mine, source, vocab_size, max_length, alpha):
    """All the model can say in max_length tokens as (score, log p, ids), best first."""
    strings = torch.tensor(list(itertools.product(range(vocab_size), repeat=max_length)))
    inputs = torch.cat((torch.full_like(strings[:, :1], BOS), strings[:, :-1]), dim=1)
    with torch.no_grad():
        log_probs = mine(source.expand(len(strings), -1), inputs).log_softmax(-1)
    log_probs = log_probs.gather(2, strings[..., None]).squeeze(-1).tolist()
    found = {}
    for ids, steps in zip(strings.tolist(), log_probs, strict=True):
        length = ids.index(EOS) + 1 if EOS in ids else max_length
        log_prob = sum(steps[:length])
        text = tuple(ids[: length - 1] if EOS in ids else ids)
        found[text, EOS in ids] = (log_prob / ((5 + length) / 6) ** alpha, log_prob, text)
    return sorted(found.values(), reverse=True)


def beam_by_hand(mine, source, beam_size, max_length, alpha):
    """Beam search from its definition: no cache, no batch, no stopping before max_length."""
    finished, beams = [], [((), 0.0)]
    for length in range(1, max_length + 1):
        penalty = ((5 + length) / 6) ** alpha
        candidates = sorted(
            (
                (log_prob + step, prefix, token)
                for prefix, log_prob in beams
                for token, step in enumerate(next_log_probs(mine, source, prefix))
            ),
            reverse=True,
        )
        finished += [(p / penalty, p, prefix) for p, prefix, token in candidates[:beam_size] if token == EOS]
        beams = [((*prefix, token), p) for p, prefix, token in candidates if token != EOS][:beam_size]
    finished += [(p / penalty, p, prefix) for prefix, p in beams]
    return sorted(finished, reverse=True)[:beam_size]


def compare(agree, mine: list[Hypothesis], theirs, *, tolerance, quantity):
    agree([h.ids for h in mine], [ids for _, _, ids in theirs], tolerance=0, quantity=f"{quantity}: ids")
    agree(
        [h.log_prob for h in mine],
        [p for _, p, _ in theirs],
        tolerance=tolerance,
        quantity=f"{quantity}: log p",
    )
    agree(
        [h.score for h in mine],
        [s for s, _, _ in theirs],
        tolerance=tolerance,
        quantity=f"{quantity}: scores",
    )


@pytest.mark.verifies("companion.generate.decoding.length_penalty", against="closed form")
def test_length_penalty(agree):
    cases = {(1, 0.6): 1.0, (7, 1.0): 2.0, (19, 0.5): 2.0, (13, 2.0): 9.0, (8, 0.0): 1.0, (43, 1 / 3): 2.0}
    agree([length_penalty(*case) for case in cases], list(cases.values()), tolerance=1e-15, quantity="values")


@pytest.mark.verifies("companion.generate.decoding.greedy_search", against="uncached loop")
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    "variant",
    [{}, {"norm_first": False, "position": "learned", "max_length": 12}, {"target_vocab_size": 7}],
    ids=str,
)
def test_greedy_search_is_the_loop_without_a_cache(agree, seed, variant):
    mine, source = model(6, seed, **variant), sources(6, vocab_size=6)
    alone = [greedy_by_hand(mine, source[i : i + 1, : 6 - i], 12) for i in range(6)]
    for use_cache in (True, False):
        batch = greedy_search(mine, source, **TOKENS, max_length=12, use_cache=use_cache)
        for a, b in zip(batch, alone, strict=True):
            agree(a, b, tolerance=0, quantity="tokens of padded batches against one by one, uncached")


@pytest.mark.verifies("companion.generate.decoding.beam_search", against="enumeration")
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("vocab_size", "max_length"), [(4, 4), (5, 3), (4, 1)])
@pytest.mark.parametrize("alpha", [0.0, 0.6, 2.0])
def test_a_wide_beam_finds_the_best_of_all_sequences(agree, seed, vocab_size, max_length, alpha):
    mine, source = model(vocab_size, seed), sources(3, vocab_size=vocab_size)
    width = vocab_size * (vocab_size - 1) ** (max_length - 1)  # no prefix is ever dropped
    options = {**TOKENS, "max_length": max_length, "alpha": alpha, "beam_size": width}
    best = beam_search(mine, source, **options)
    every = beam_search(mine, source, **options, return_all=True)
    for row in range(3):
        theirs = every_sequence(mine, source[row : row + 1], vocab_size, max_length, alpha)
        compare(agree, best[row : row + 1], theirs[:1], tolerance=2e-6, quantity="best of all sequences")
        compare(agree, every[row][:20], theirs[:20], tolerance=2e-6, quantity="twenty best of all sequences")


@pytest.mark.verifies("companion.generate.decoding.beam_search", against="uncached loop")
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("beam_size", [1, 2, 4])
@pytest.mark.parametrize("alpha", [0.0, 0.6, 3.0])
def test_beam_search_is_the_plain_search_that_never_stops_early(agree, seed, beam_size, alpha):
    mine, source = model(6, seed, norm_first=seed != 4), sources(3, vocab_size=6)
    options = {**TOKENS, "max_length": 7, "alpha": alpha, "beam_size": beam_size}
    best = beam_search(mine, source, **options)
    every = beam_search(mine, source, **options, return_all=True)
    for row in range(3):
        theirs = beam_by_hand(mine, source[row : row + 1, : 6 - row], beam_size, 7, alpha)
        compare(agree, best[row : row + 1], theirs[:1], tolerance=2e-6, quantity="best, padded batch")
        compare(agree, every[row], theirs, tolerance=2e-6, quantity="n best, padded batch")


@pytest.mark.parametrize("seed", SEEDS)
def test_a_beam_of_one_without_length_penalty_is_greedy_search(seed):
    mine, source = model(6, seed, dtype=torch.float32), sources(6, vocab_size=6)
    beam = beam_search(mine, source, **TOKENS, max_length=15, beam_size=1, alpha=0.0)
    assert [list(h.ids) for h in beam] == greedy_search(mine, source, **TOKENS, max_length=15)


@pytest.mark.verifies("companion.generate.decoding.beam_search", against="uncached loop")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 2e-5)])
def test_log_prob_is_that_of_the_sequence_and_its_end(agree, dtype, tolerance):
    mine, source = model(6, 2, dtype), sources(3, vocab_size=6)
    lengths = set()
    for row, hypotheses in enumerate(
        beam_search(mine, source, **TOKENS, max_length=5, beam_size=6, return_all=True)
    ):
        for hypothesis in hypotheses:
            steps = [*hypothesis.ids, EOS][:5]  # cut off at five tokens, it has no end
            total = sum(
                next_log_probs(mine, source[row : row + 1], steps[:i])[token] for i, token in enumerate(steps)
            )
            agree(hypothesis.log_prob, total, tolerance=tolerance, quantity="log p")
            lengths.add(len(hypothesis.ids))
    assert 5 in lengths and min(lengths) < 4


def counted(mine: Transformer) -> dict[str, list]:
    """What runs, by name: the encoder, the decoder's number of new tokens, the memory's projections."""
    calls = {"encoder": [], "decoder": [], "memory": []}
    mine.encoder.register_forward_hook(lambda *_: calls["encoder"].append(1))
    mine.decoder.register_forward_hook(lambda _, inputs, __: calls["decoder"].append(inputs[0].shape[:2]))
    for layer in mine.decoder.layers:
        layer.cross_attention.key_proj.register_forward_hook(lambda *_: calls["memory"].append(1))
    return calls


@pytest.mark.parametrize("search", [greedy_search, lambda *a, **k: beam_search(*a, **k, beam_size=3)])
def test_the_encoder_runs_once_and_the_decoder_one_token_a_step(search):
    mine, source = model(6, 2), sources(4, vocab_size=6)
    calls = counted(mine)
    search(mine, source, **TOKENS, max_length=9)
    assert len(calls["encoder"]) == 1
    assert len(calls["memory"]) == 2  # once in each of the two layers
    assert 1 < len(calls["decoder"]) <= 9 and all(new == 1 for _, new in calls["decoder"])


def test_the_search_ends_when_nothing_can_overtake_the_best():
    mine, source = model(6, 2), sources(3, vocab_size=6)
    calls = counted(mine)
    beam_search(mine, source, **TOKENS, max_length=30, beam_size=2)
    assert len(calls["decoder"]) > 1
    with torch.no_grad():  # now the end is all but certain
        mine.output.weight.zero_()
        mine.output.weight[EOS] = 4.0
        mine.decoder.norm.gain.zero_()
        mine.decoder.norm.bias.fill_(1.0)
    calls["decoder"].clear()
    best = beam_search(mine, source, **TOKENS, max_length=30, beam_size=2)
    assert [h.ids for h in best] == [()] * 3 and len(calls["decoder"]) == 1


def test_finished_sentences_leave_the_batch():
    mine, source = model(6, 7), sources(6, vocab_size=6)
    calls = counted(mine)
    beam_search(mine, source, **TOKENS, max_length=40, beam_size=2)
    rows = [batch for batch, _ in calls["decoder"]]
    assert rows[0] == 12 and rows == sorted(rows, reverse=True) and rows[-1] < 12


def test_a_search_leaves_the_model_and_the_generator_as_they_were():
    mine, source = model(6, 0), sources(2, vocab_size=6)
    weights, state, ids = [p.clone() for p in mine.parameters()], torch.get_rng_state(), source.clone()
    greedy_search(mine, source, **TOKENS, max_length=4)
    beam_search(mine, source, **TOKENS, max_length=4, beam_size=2)
    assert all(torch.equal(a, b) for a, b in zip(weights, mine.parameters(), strict=True))
    assert torch.equal(state, torch.get_rng_state()) and torch.equal(source, ids)
    assert not mine.training and all(p.grad is None for p in mine.parameters())


def test_a_beam_wider_than_the_vocabulary_returns_what_there_is():
    mine, source = model(4, 0), sources(1, vocab_size=4)
    (hypotheses,) = beam_search(mine, source, **TOKENS, max_length=1, beam_size=9, return_all=True)
    assert sorted(h.ids for h in hypotheses) == [(), (0,), (1,), (3,)]
    assert sum(torch.tensor([h.log_prob for h in hypotheses]).exp()).item() == pytest.approx(1)


SOURCE = torch.tensor([[3, 4, 0]])


@pytest.mark.parametrize("search", [greedy_search, lambda *a, **k: beam_search(*a, **k, beam_size=2)])
@pytest.mark.parametrize(
    ("source", "options", "error", "match"),
    [
        (SOURCE.tolist(), {}, TypeError, "source_ids must be a torch.Tensor, got list"),
        (SOURCE.float(), {}, TypeError, "source_ids must be an integer tensor"),
        (SOURCE[0], {}, ValueError, "source_ids must have 2 dimensions"),
        (SOURCE[:0], {}, ValueError, "source_ids must not be empty"),
        (SOURCE * 2, {}, ValueError, "source_ids must lie in 0 … 4, got values from 0 to 8"),
        (SOURCE, {"max_length": 0}, ValueError, "max_length must be at least 1, got 0"),
        (SOURCE, {"max_length": 9.0}, TypeError, "max_length must be an int, got float"),
        (SOURCE, {"max_length": 11}, ValueError, "max_length must be at most the model's 10, got 11"),
        (SOURCE, {"bos_id": 7}, ValueError, "bos_id must lie in 0 … 6, got 7"),
        (SOURCE, {"eos_id": -1}, ValueError, "eos_id must lie in 0 … 6, got -1"),
        (SOURCE, {"eos_id": 2.0}, TypeError, "eos_id must be an int, got float"),
    ],
)
def test_bad_input_is_named_before_the_encoder_runs(search, source, options, error, match):
    mine = model(target_vocab_size=7, position="learned", max_length=10)
    calls = counted(mine)
    with pytest.raises(error, match=match):
        search(mine, source, **{**TOKENS, "max_length": 5, **options})
    assert not calls["encoder"]


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"beam_size": 0}, ValueError, "beam_size must be at least 1, got 0"),
        ({"beam_size": 2.0}, TypeError, "beam_size must be an int, got float"),
        ({"alpha": -0.5}, ValueError, "alpha must be at least 0, got -0.5"),
        ({"alpha": float("nan")}, ValueError, "alpha must be at least 0, got nan"),
        ({"alpha": "0.6"}, TypeError, "alpha must be a number, got str"),
    ],
)
def test_bad_beams_are_named(options, error, match):
    with pytest.raises(error, match=match):
        beam_search(model(), SOURCE, **{**TOKENS, "max_length": 5, "beam_size": 2, **options})


@pytest.mark.parametrize("search", [greedy_search, lambda *a, **k: beam_search(*a, **k, beam_size=2)])
def test_a_model_in_training_is_refused(search):
    with pytest.raises(ValueError, match="model must be in evaluation mode"):
        search(model().train(), SOURCE, **TOKENS, max_length=5)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((0, 0.6), ValueError, "length must be at least 1"),
        ((4, -1), ValueError, "alpha must be at least 0, got -1"),
    ],
)
def test_bad_lengths_are_named(arguments, error, match):
    with pytest.raises(error, match=match):
        length_penalty(*arguments)
