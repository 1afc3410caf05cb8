"""Speculative decoding: the rule and the loop by enumeration, greedy as without it, transformers as judge."""

import itertools
import math
from collections import Counter
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from test_language_model import LLAMA, POSITIONS
from test_sampling import compare_frequencies
from test_stream import alone, build, gpt2, llama
from torch import nn

from companion.generate import (
    Copying,
    ModelDrafter,
    OneOf,
    PromptLookup,
    generate,
    repetition_penalty,
    speculative,
    speculative_generate,
    speculative_stream,
    speculative_verify,
    temperature,
    top_k,
)
from companion.models.language_model import LanguageModelConfig
from companion.position import RopeScaling

MODULE = "companion.generate.speculative."
UNCACHED = "LanguageModel without a cache"
FILTERS = (partial(repetition_penalty, penalty=1.6), partial(temperature, value=1.4), partial(top_k, k=2))


# --- The rule: every draft, every outcome -------------------------------------------------------------------


def chain(conditional, length: int) -> dict[tuple, float]:
    """The probability of each string, by the chain rule."""
    strings = {(): 1.0}
    for _ in range(length):
        strings = {(*s, x): p * q for s, p in strings.items() for x, q in enumerate(conditional(s))}
    return strings


def tree(vocab_size: int, depth: int) -> dict[tuple, list[float]]:
    """After each prefix a distribution in quarters, zeros included."""
    quarters = [q for q in itertools.product(range(5), repeat=vocab_size) if sum(q) == 4]
    prefixes = [s for n in range(depth + 1) for s in itertools.product(range(vocab_size), repeat=n)]
    picks = torch.randint(len(quarters), (len(prefixes),)).tolist()
    return {s: [x / 4 for x in quarters[pick]] for s, pick in zip(prefixes, picks, strict=True)}


@pytest.mark.verifies(MODULE + "speculative_verify", against="enumeration")
@pytest.mark.parametrize("k", [0, 1, 2])
@pytest.mark.parametrize("is_drawn", [True, False])
def test_over_all_drafts_and_all_uniform_numbers_the_outcome_has_the_targets_distribution(agree, k, is_drawn):
    """Ratios of quarters are twelfths at the finest, so that twelve midpoints stand for all of [0, 1)."""
    grid = [(i + 0.5) / 12 for i in range(12)]
    for _ in range(12):
        p, q = tree(3, k), tree(3, k)
        if not is_drawn:  # one proposal, with certainty
            q = {s: [float(x == row.index(max(row))) for x in range(3)] for s, row in q.items()}
        drafts = [(s, weight) for s, weight in chain(q.__getitem__, k).items() if weight]
        cases = [(s, weight / 12**k, u) for s, weight in drafts for u in itertools.product(grid, repeat=k)]
        target = torch.tensor([[p[s[:i]] for i in range(k + 1)] for s, _, _ in cases], dtype=torch.float64)
        draft = torch.tensor([[q[s[:i]] for i in range(k)] for s, _, _ in cases], dtype=torch.float64)
        tokens = torch.tensor([s for s, _, _ in cases], dtype=torch.long).reshape(len(cases), k)
        uniform = torch.tensor([u for _, _, u in cases], dtype=torch.float64).reshape(len(cases), k)
        draft = draft.reshape(len(cases), k, 3) if is_drawn else None
        accepted, rest = speculative._accept(target, draft, tokens, uniform)
        outcome = Counter()
        rest = rest / rest.sum(-1, keepdim=True)
        for (s, weight, _), n, row in zip(cases, accepted.tolist(), rest.tolist(), strict=True):
            for x, share in enumerate(row):
                kept = (*s[:n], x)
                after = {s[len(kept) :]: row for s, row in p.items() if s[: len(kept)] == kept}
                for end, p_end in chain(after.__getitem__, k + 1 - len(kept)).items():
                    outcome[(*kept, *end)] += weight * share * p_end
        truth = chain(p.__getitem__, k + 1)
        agree([outcome[s] for s in truth], list(truth.values()), tolerance=1e-12, quantity="whole strings")


def drawn(table: torch.Tensor, prefix: list[torch.Tensor], generator) -> tuple[torch.Tensor, torch.Tensor]:
    rows = table[tuple(prefix)] if prefix else table.expand(200_000, -1)
    return torch.multinomial(rows, 1, generator=generator).squeeze(-1), rows


def chance_of(counts: torch.Tensor, probs: torch.Tensor) -> float:
    """The probability of a χ² as large, if these are the probabilities."""
    n, degrees = counts.sum(), torch.tensor((probs.numel() - 1) / 2, dtype=torch.float64)
    statistic = ((counts - n * probs).square() / (n * probs)).sum().double()
    return float(torch.special.gammaincc(degrees, statistic / 2))


@pytest.mark.verifies(MODULE + "speculative_verify", against="enumeration")
def test_200_000_draws(agree):
    generator, k, v = torch.Generator().manual_seed(2), 2, 4
    p, q = ([(1.3 * torch.randn((v,) * (i + 1))).softmax(-1) for i in range(k + 1)] for _ in range(2))
    drafts, rows = [], []
    for i in range(k):
        token, row = drawn(q[i], drafts, generator)
        drafts.append(token)
        rows.append(row)
    target = torch.stack(
        [p[i][tuple(drafts[:i])] if i else p[0].expand(200_000, -1) for i in range(k + 1)], 1
    )
    tokens, truth = torch.stack(drafts, 1), p[0][:, None, None] * p[1][:, :, None] * p[2]
    claims = ((torch.stack(rows, 1), True), (None, True), (torch.full((200_000, k, v), 1 / v), False))
    kept = []
    for draft, is_right in claims:
        accepted, token = speculative_verify(target, draft, tokens, generator)
        strings = []
        for i in range(k + 1):
            after, _ = drawn(p[i], strings, generator)
            early = tokens[:, i] if i < k else token
            strings.append(torch.where(accepted > i, early, torch.where(accepted == i, token, after)))
        index = sum(x * v ** (k - i) for i, x in enumerate(strings))
        counts = torch.bincount(index, minlength=v ** (k + 1)).reshape(truth.shape)
        chance = chance_of(counts, truth)
        assert chance > 1e-3 if is_right else chance < 1e-9
        if is_right:
            agree(counts / 200_000, truth, tolerance=0.004, quantity="frequencies of 200,000 draws")
        kept.append(accepted.double().mean())
    assert 0.1 < kept[1] < 0.8 * kept[0]  # to say how the proposals were drawn keeps more of them


@pytest.mark.verifies(
    MODULE + "speculative_verify", against="transformers.generation.utils._speculative_sampling"
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_under_one_seed_the_tokens_are_those_of_transformers(agree, dtype):
    from transformers.generation.utils import _speculative_sampling

    seen = Counter()
    for seed, k in itertools.product(range(60), (1, 3, 5)):
        generator = torch.Generator().manual_seed(seed)
        p, q = (2 * torch.randn(n, 11, generator=generator, dtype=dtype) for n in (k + 1, k))
        q = 0.3 * q + 0.7 * p[:-1]
        p[torch.rand(p.shape, generator=generator) < 0.2] = -torch.inf
        tokens = torch.multinomial(q.softmax(-1), 1, generator=generator).T  # (1, k)
        torch.manual_seed(seed)
        accepted, token = speculative_verify(p.softmax(-1), q.softmax(-1), tokens[0])
        torch.manual_seed(seed)
        theirs, matches = _speculative_sampling(tokens, q[None], k, p[None])  # with no fifth argument
        mine = [*tokens[0, :accepted].tolist(), int(token)]
        agree(mine, theirs[0].tolist(), tolerance=0, quantity="tokens under one seed")
        assert accepted == matches
        seen[k, int(accepted)] += 1
    assert {n for k, n in seen if k == 3} == {0, 1, 2, 3}


def test_equal_distributions_keep_everything_and_disjoint_ones_nothing():
    p = torch.randn(3000, 6, 9).softmax(-1)
    tokens = torch.multinomial(p[:, :-1].flatten(0, 1), 1).reshape(3000, 5)
    accepted, _ = speculative_verify(p, p[:, :-1], tokens)
    assert (accepted == 5).all()
    low, high = p.clone(), p[:, :-1].clone()
    low[..., 4:], high[..., :4] = 0, 0
    low, high = low / low.sum(-1, keepdim=True), high / high.sum(-1, keepdim=True)
    accepted, token = speculative_verify(low, high, tokens % 5 + 4)
    assert (accepted == 0).all() and (token < 4).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_rule_in_every_dtype_and_shape(dtype):
    """Certain proposals are kept, impossible ones are not, in whatever shape they come."""
    for leading, k in itertools.product([(), (3,), (2, 3)], (0, 1, 4)):
        best = torch.randint(7, (*leading, k + 1))
        target = nn.functional.one_hot(best, 7).to(dtype)
        for tokens, count in ((best[..., :-1], k), ((best[..., :-1] + 1) % 7, 0)):
            flat = torch.full((*leading, k, 7), 1 / 7, dtype=dtype)
            for draft in (None, flat, flat.double()):
                accepted, token = speculative_verify(target, draft, tokens.int())
                assert accepted.shape == token.shape == leading and (accepted == count).all()
                assert torch.equal(token, best[..., count])


def test_rounding_that_leaves_no_residual_leaves_the_target():
    p = torch.tensor([[0.5, 0.5 - 1e-6], [0.5, 0.5]], dtype=torch.float64)
    q = torch.tensor([[0.5, 0.5]], dtype=torch.float64)
    accepted, rest = speculative._accept(p, q, torch.tensor([1]), torch.ones(1, dtype=torch.float64))
    assert accepted == 0 and torch.equal(rest, p[0])


# --- The whole loop -----------------------------------------------------------------------------------------


def every_run(run) -> Counter:
    """All outcomes of a program that asks `pick(weights)`, with their probabilities."""
    outcomes, scripts = Counter(), [[]]
    while scripts:
        script, taken, prob = scripts.pop(), [], 1.0

        def pick(weights, script=script, taken=taken):
            nonlocal prob
            options = [i for i, weight in enumerate(weights) if weight > 0]
            if len(taken) == len(script):
                scripts.extend([*taken, other] for other in options[1:])
                script.append(options[0])
            taken.append(script[len(taken)])
            prob *= weights[taken[-1]] / math.fsum(weights)
            return taken[-1]

        outcomes[run(pick)] += prob
    return outcomes


def steered(monkeypatch, pick):
    """Put `pick` in the place of all chance: the draws, and whether a uniform number is below p / q."""
    accept = speculative._accept

    def choosing(target, draft, tokens, uniform):
        uniform = torch.zeros_like(uniform)
        for i, x in enumerate(tokens.tolist()):
            q = 1.0 if draft is None else float(draft[i, x])
            ratio = min(1.0, float(target[i, x]) / q)
            uniform[i] = pick([ratio, 1 - ratio])
            if uniform[i]:
                break
        return accept(target, draft, tokens, uniform)

    def multinomial(weights, count, generator=None):
        chosen = torch.tensor([pick(weights.flatten().tolist())])
        return chosen if weights.dim() == 1 else chosen[:, None]

    monkeypatch.setattr(speculative, "_accept", choosing)
    monkeypatch.setattr(torch, "multinomial", multinomial)


@torch.no_grad()
def truth(model, prompt, length, filters, stop_ids) -> dict[tuple, float]:
    going, done = {(): 1.0}, {}
    for _ in range(length):
        grown = {}
        for said, prob in going.items():
            ids = torch.tensor([[*prompt, *said]])
            logits = model(ids)[:, -1]
            for each in filters:
                logits = each(logits, ids)
            for token, share in enumerate(logits.softmax(-1)[0].tolist()):
                if share:
                    (done if token in stop_ids else grown)[(*said, token)] = prob * share
        going = grown
    return done | going


def small(seed, vocab_size=3, **changes):
    torch.manual_seed(seed)
    sizes = {"d_model": 8, "num_layers": 1, "num_heads": 2, "d_ff": 5, "tie_output": False}
    return build(vocab_size=vocab_size, **sizes | changes)


class Always:
    """Proposes one token again and again, and says so, whatever the text."""

    vocab_size = 3

    def __init__(self, token, vocab_size=3):
        self.token, self.vocab_size = token, vocab_size

    def propose(self, ids, count, choose, stop_ids=()):
        tokens = ids.new_full((count,), self.token)
        return tokens, nn.functional.one_hot(tokens, self.vocab_size).float()


DRAFTERS = {
    "another model": lambda model: ModelDrafter(small(9)),
    "itself": ModelDrafter,
    "lookup": lambda model: PromptLookup(2),
    "a stopped clock": lambda model: Always(2),
}


@pytest.mark.verifies(MODULE + "speculative_stream", against="enumeration")
@pytest.mark.verifies(MODULE + "speculative_generate", against="enumeration")
@pytest.mark.verifies(MODULE + "ModelDrafter", against="enumeration")
@pytest.mark.parametrize("filters", [(), FILTERS], ids=["plain", "filtered"])
@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize(("num_draft", "stop_ids"), [(1, (1,)), (5, ())])
def test_over_all_its_runs_the_loop_has_the_models_distribution(
    agree, monkeypatch, filters, drafter, num_draft, stop_ids
):
    model, prompt = small(4), [0, 1, 0]
    guess, passes = DRAFTERS[drafter](model), set()

    def run(pick):
        with monkeypatch.context() as patch:
            steered(patch, pick)
            got = speculative_generate(
                model,
                guess,
                torch.tensor([prompt]),
                max_new_tokens=3,
                num_draft=num_draft,
                filters=filters,
                stop_ids=stop_ids,
            )
        passes.add(got.passes)
        return tuple(got.ids[0, 3:].tolist())

    outcome, expected = every_run(run), truth(model, prompt, 3, filters, stop_ids)
    mine = {
        text: p for text, p in outcome.items() if text in expected or p > 1e-14
    }  # 1e-16 of a p > q by rounding
    agree(mine, expected, tolerance=1e-12, quantity="distribution over whole continuations")
    assert sum(outcome.values()) == pytest.approx(1, abs=1e-12) and min(passes) < 3


class Bigram(nn.Module):
    """A table behind the interface of a language model: quick enough for many runs."""

    def __init__(self, vocab_size, temperature=1.5):
        super().__init__()
        self.config = LanguageModelConfig(vocab_size, position="none")
        self.embedding = nn.Embedding(vocab_size, vocab_size)
        self.embedding.weight.data *= temperature
        self.eval()

    def hidden(self, ids, mask=None, cache=None, positions=None):
        cache.length += ids.shape[1]
        return ids

    def logits(self, hidden):
        return self.embedding.weight.detach()[hidden]

    def new_cache(self, capacity=None):
        cache = SimpleNamespace(length=0)
        cache.truncate = lambda length: setattr(cache, "length", length)
        return cache

    def forward(self, ids):
        return self.logits(ids)


@pytest.mark.verifies(MODULE + "speculative_generate", against="enumeration")
@pytest.mark.parametrize("num_draft", [1, 3])
@pytest.mark.parametrize("drafter", ["model", "lookup"])
def test_drawn_continuations_have_the_models_frequencies(agree, num_draft, drafter):
    model, other, prompt = Bigram(4), Bigram(4), [3, 0, 1, 2, 2, 0]
    guess = ModelDrafter(other) if drafter == "model" else PromptLookup()
    generator, drawn = torch.Generator().manual_seed(5), []
    for _ in range(1000):
        options = {"num_draft": num_draft, "stop_ids": (3,), "generator": generator}
        got = speculative_generate(model, guess, torch.tensor([prompt]), max_new_tokens=3, **options)
        drawn.append(tuple(got.ids[0, 6:].tolist()))
    compare_frequencies(agree, drawn, truth(model, prompt, 3, (), (3,)))


@pytest.mark.verifies(MODULE + "speculative_generate", against=UNCACHED)
@pytest.mark.verifies(MODULE + "speculative_stream", against=UNCACHED)
@pytest.mark.verifies(MODULE + "ModelDrafter", against=UNCACHED)
@pytest.mark.verifies(MODULE + "PromptLookup", against=UNCACHED)
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("variant", [{}, LLAMA], ids=["GPT", "Llama"])
def test_greedy_is_greedy_whatever_is_proposed(agree, position, variant):
    model = build(vocab_size=13, max_length=30, **variant | {"position": position})
    other = build(vocab_size=13, num_layers=1)  # ends at position 24
    prompt, state = [4, 7, 7, 12, 4, 7], torch.get_rng_state()
    expected, _ = alone(model, prompt, 25)
    stop = expected[9]
    stopped = expected[: expected.index(stop) + 1]
    accepted = set()
    for drafter in (ModelDrafter(model), ModelDrafter(other), PromptLookup(), Always(7, 13)):
        for num_draft, (stop_ids, wanted) in itertools.product(
            (1, 3, 5), (((), expected), ((stop,), stopped))
        ):
            options = {"max_new_tokens": 25, "num_draft": num_draft, "greedy": True, "stop_ids": stop_ids}
            got = speculative_generate(model, drafter, torch.tensor([prompt]), **options)
            agree(got.ids[0, 6:].tolist(), wanted, tolerance=0, quantity=f"greedy tokens, {position}")
            accepted.add(got.accepted)
            assert got.accepted <= got.proposed and got.passes + got.accepted - len(wanted) in (0, 1)
    assert len(accepted) > 3 and torch.equal(state, torch.get_rng_state())


@pytest.mark.verifies(MODULE + "speculative_generate", against="transformers.GenerationMixin.generate")
@pytest.mark.verifies(MODULE + "ModelDrafter", against="transformers.GenerationMixin.generate")
@pytest.mark.verifies(MODULE + "PromptLookup", against="transformers.GenerationMixin.generate")
@pytest.mark.parametrize("pair", [gpt2, llama])
def test_greedy_tokens_are_those_of_transformers(agree, pair):
    mine, theirs = pair(torch.float32)
    small, assistant = pair(torch.float32)
    theirs.generation_config.eos_token_id = assistant.generation_config.eos_token_id = None
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    prompt, count = torch.tensor([[7, 3, 20, 7, 3]]), 19
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": count, "do_sample": False}
    for num_draft in (2, 5):
        assistant.generation_config.num_assistant_tokens = num_draft
        cases = (
            (ModelDrafter(small), {"assistant_model": assistant}, "with a second model"),
            (PromptLookup(), {"prompt_lookup_num_tokens": num_draft}, "with prompt lookup"),
        )
        for drafter, extra, how in cases:
            got = speculative_generate(
                mine, drafter, prompt, max_new_tokens=count, num_draft=num_draft, greedy=True
            )
            wanted = theirs.generate(prompt, pad_token_id=0, **options, **extra)
            agree(got.ids[0].tolist(), wanted[0].tolist(), tolerance=0, quantity=f"greedy tokens, {how}")


# --- What it takes ------------------------------------------------------------------------------------------


def counted(model) -> list[int]:
    """The number of tokens of each pass from now on."""
    passes = []
    model.layers[0].register_forward_pre_hook(lambda _, args: passes.append(args[0].shape[1]))
    return passes


@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.parametrize("num_draft", [1, 3, 5])
def test_a_drafter_that_is_right_leaves_few_passes(greedy, num_draft):
    model, twin = build(vocab_size=11, max_length=40), build(vocab_size=11, max_length=40)
    twin.load_state_dict(model.state_dict())
    passes, drafts = counted(model), counted(twin)
    options = {"max_new_tokens": 23, "num_draft": num_draft, "greedy": greedy}
    got = speculative_generate(model, ModelDrafter(twin), torch.tensor([[1, 2, 3]]), **options)
    assert got.ids.shape == (1, 26) and got.passes == math.ceil(23 / (num_draft + 1)) == len(passes)
    assert got.accepted == got.proposed == 23 - got.passes
    assert sum(passes) == 3 + 22  # no token is read twice, and the last one never
    assert sum(drafts) <= 3 + 22 and drafts[0] == 3 and set(drafts[1:]) <= {1, 2}


@pytest.mark.parametrize("greedy", [True, False])
def test_a_drafter_that_is_wrong_costs_no_pass(greedy):
    model = build(vocab_size=11, max_length=40)

    def never(logits, ids):
        return logits.masked_fill(torch.arange(11) == 4, -torch.inf)

    options = {"filters": (never,), "greedy": greedy, "generator": torch.Generator().manual_seed(1)}
    rounds = list(
        speculative_stream(model, Always(4, 11), torch.tensor([[1, 2, 3]]), max_new_tokens=23, **options)
    )
    assert [(len(r.tokens), r.proposed, r.accepted) for r in rounds[:-4]] == [(1, 4, 0)] * 19
    assert [r.proposed for r in rounds[-4:]] == [3, 2, 1, 0]  # never beyond the limit
    assert all(4 not in r.tokens for r in rounds)


def first_and_probs(logits, ids):
    return logits.argmax(-1), logits.softmax(-1)


def test_a_drafter_goes_from_text_to_text():
    model, other = build(vocab_size=11, max_length=40), build(vocab_size=11, num_layers=1, max_length=40)
    drafter, passes = ModelDrafter(other), counted(other)
    for prompt in ([1, 2, 3, 4], [1, 2, 9], [5], [1, 2, 3, 4], [1, 2, 3, 4]):
        ids = torch.tensor(prompt)
        passes.clear()
        said, probs = drafter.propose(ids, 3, first_and_probs)
        read = list(passes)
        fresh, fresh_probs = ModelDrafter(other).propose(ids, 3, first_and_probs)
        assert torch.equal(said, fresh)
        torch.testing.assert_close(probs, fresh_probs, rtol=0, atol=1e-12)
    assert read == [1, 1, 1]  # what it has read, it keeps
    got, fresh = (
        list(speculative_stream(model, each, ids[None], max_new_tokens=9, greedy=True))
        for each in (drafter, ModelDrafter(other))
    )
    assert got == fresh


def test_learned_positions_to_the_last():
    model, short = build(max_length=24), build(max_length=9)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    for drafter in (ModelDrafter(short), ModelDrafter(model), PromptLookup()):
        got = speculative_generate(model, drafter, ids, max_new_tokens=20, greedy=True)
        assert torch.equal(got.ids, generate(model, ids, max_new_tokens=20, greedy=True))
        with pytest.raises(ValueError, match="max_new_tokens must be at most 20 after a prompt of 5 tokens"):
            speculative_stream(model, drafter, ids, max_new_tokens=21)
    drafter, ids = ModelDrafter(short), torch.arange(1, 6)
    said, _ = drafter.propose(ids, 3, first_and_probs)
    tokens, probs = drafter.propose(torch.arange(1, 13), 3, None)
    assert len(tokens) == 0 and probs is None
    again, _ = drafter.propose(torch.cat((ids, said[:2])), 3, first_and_probs)
    assert again[0] == said[2] and len(again) == 3
    assert len(drafter.propose(torch.cat((ids, said)), 3, first_and_probs)[0]) == 2  # to position 9


@pytest.mark.parametrize("greedy", [True, False])
def test_constraints_never_see_what_they_forbid(greedy):
    """OneOf and Copying refuse a text that they would not have allowed, and one that has ended."""
    model, other = build(vocab_size=11, max_length=60), build(vocab_size=11, num_layers=1, max_length=60)
    prompt = [3, 1, 4, 1, 5, 0, 2, 6, 5, 3, 5]
    options = [[1, 4, 1, 5, 9], [1, 4], [5, 9, 2], [6, 6, 6, 6, 6, 6]]
    filters = {
        "one of": OneOf(options, len(prompt), [0]),
        "copying": Copying([prompt[:5], prompt[6:]], len(prompt), [0]),
    }
    seen = set()
    for name, constraint in filters.items():
        wanted = generate(
            model, torch.tensor([prompt]), max_new_tokens=8, eos_id=0, filters=[constraint], greedy=True
        )
        for drafter, seed in itertools.product(
            (ModelDrafter(other), PromptLookup(1), Always(0, 11), Always(6, 11)), range(4)
        ):
            got = speculative_generate(
                model,
                drafter,
                torch.tensor([prompt]),
                max_new_tokens=8,
                filters=[constraint],
                greedy=greedy,
                stop_ids=[0],
                generator=torch.Generator().manual_seed(seed),
            )
            said = got.ids[0, len(prompt) :].tolist()
            assert 0 not in said[:-1]
            if greedy:
                assert torch.equal(got.ids, wanted)
            elif name == "one of":
                assert said[:-1] in options and said[-1] == 0
            seen.add((tuple(said), got.accepted))
    assert len(seen) > 4


def test_it_can_be_left_at_any_time_and_leaves_gradients_on():
    model = build(vocab_size=11)
    stream = speculative_stream(model, ModelDrafter(model), torch.tensor([[1, 2]]), max_new_tokens=9)
    next(stream)
    assert torch.is_grad_enabled()
    stream.close()
    assert torch.is_grad_enabled() and all(p.grad is None for p in model.parameters())


def test_half_precision():
    model = build(torch.bfloat16, vocab_size=11)
    got = speculative_generate(model, ModelDrafter(model), torch.tensor([[1, 2]]), max_new_tokens=9)
    assert got.ids.shape == (1, 11) and got.accepted > 0


# --- Lookup -------------------------------------------------------------------------------------------------


def looked_up(ids: list[int], count: int, ngram: int) -> list[int]:
    for size in range(min(ngram, len(ids) - 1), 0, -1):
        for start in range(len(ids) - size - 1, -1, -1):
            if ids[start : start + size] == ids[-size:]:
                text = list(ids)
                for i in range(count):
                    text.append(text[start + size + i])
                return text[len(ids) :]
    return []


@pytest.mark.verifies(MODULE + "PromptLookup", against="enumeration")
@pytest.mark.parametrize("ngram", [1, 2, 3, 5])
def test_lookup_is_that_by_hand(agree, ngram):
    texts = [list(t) for n in range(1, 8) for t in itertools.product(range(2), repeat=n)]
    texts += [torch.randint(9, (n,)).tolist() for n in range(5, 90)]
    lengths = set()
    for ids in texts:
        for count in (1, 4, 11):
            tokens, probs = PromptLookup(ngram).propose(torch.tensor(ids), count)
            agree(tokens.tolist(), looked_up(ids, count, ngram), tolerance=0, quantity="tokens proposed")
            assert probs is None
            lengths.add(len(tokens))
    assert lengths == {0, 1, 4, 11}


@pytest.mark.verifies(
    MODULE + "PromptLookup",
    against="transformers.generation.candidate_generator.PromptLookupCandidateGenerator",
)
def test_where_an_n_gram_occurs_once_lookup_is_that_of_transformers(agree):
    from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

    cases = 0
    for _ in range(400):
        ids = torch.randint(40, (60,))
        theirs = PromptLookupCandidateGenerator(num_output_tokens=5, max_matching_ngram_size=3, max_length=99)
        wanted = theirs.get_candidates(ids[None])[0][0, 60:].tolist()
        occurrences = ((ids.unfold(0, n, 1) == ids[-n:]).all(1).sum() - 1 for n in (3, 2, 1))
        if next(filter(None, occurrences), 1) > 1:
            continue
        tokens, _ = PromptLookup(3).propose(ids, 5)
        agree(tokens[: len(wanted)].tolist(), wanted, tolerance=0, quantity="tokens proposed")
        assert bool(wanted) == bool(len(tokens))
        cases += bool(wanted)
    assert cases > 100


# --- What cannot be -----------------------------------------------------------------------------------------

P, Q, TOKENS = torch.full((3, 4), 0.25), torch.full((2, 4), 0.25), torch.tensor([1, 2])


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((P.long(), Q, TOKENS), TypeError, "target must be a floating-point tensor"),
        (
            (P[0], Q, TOKENS),
            ValueError,
            r"target must be non-empty with shape \(..., k \+ 1, V\), got \(4,\)",
        ),
        ((P[:2], Q, TOKENS), ValueError, r"tokens must have shape \(1,\), one less .* got \(2,\)"),
        ((P, Q[:1], TOKENS), ValueError, r"draft must have shape \(2, 4\), got \(1, 4\)"),
        ((P, Q.long(), TOKENS), TypeError, "draft must be a floating-point tensor"),
        ((P, Q, [1, 2]), TypeError, "tokens must be a torch.Tensor, got list"),
        ((P, Q, TOKENS + 2), ValueError, "tokens must lie in 0 … 3, got values from 3 to 4"),
        ((P, Q, TOKENS.float()), TypeError, "tokens must be an integer tensor"),
        ((P.log(), Q, TOKENS), ValueError, "target must hold probabilities that sum to 1, got a smallest"),
        ((P, 2 * Q, TOKENS), ValueError, "draft must hold probabilities .* a sum that is 1 away"),
        ((P * torch.nan, Q, TOKENS), ValueError, "target must hold probabilities"),
    ],
)
def test_bad_verifications_are_named(arguments, error, match):
    state = torch.get_rng_state()
    with pytest.raises(error, match=match):
        speculative_verify(*arguments)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"drafter": None}, TypeError, "drafter must have a method propose, got NoneType"),
        ({"drafter": Always(1, 5)}, ValueError, "drafter must have the model's 11 tokens, got 5"),
        ({"ids": [[1, 2]]}, TypeError, "ids must be a torch.Tensor, got list"),
        ({"ids": torch.ones(2, 3).long()}, ValueError, r"ids must hold one prompt, \(1, n\), got \(2, 3\)"),
        ({"ids": torch.tensor([[11]])}, ValueError, "ids must lie in 0 … 10"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be at least 1, got 0"),
        ({"max_new_tokens": 24}, ValueError, "max_new_tokens must be at most 23 after a prompt of 2 tokens"),
        ({"num_draft": 0}, ValueError, "num_draft must be at least 1, got 0"),
        ({"stop_ids": 3}, TypeError, "stop_ids must be a sequence of ints, got one int"),
        ({"stop_ids": [11]}, ValueError, "stop_ids must lie in 0 … 10, got 11"),
        ({"filters": [0.7]}, TypeError, "filters must hold callables"),
        ({"generator": 3}, TypeError, "generator must be a torch.Generator, got int"),
    ],
)
def test_bad_arguments_are_named_before_the_model_runs(options, error, match):
    model = build(vocab_size=11)
    passes = counted(model)
    arguments = {"drafter": PromptLookup(), "ids": torch.tensor([[1, 2]]), "max_new_tokens": 4, **options}
    for call in (speculative_stream, speculative_generate):
        with pytest.raises(error, match=match):
            call(model, **arguments)
    assert not passes


def test_models_that_cannot_draft_or_generate_are_refused():
    ids, options = torch.tensor([[1, 2]]), {"max_new_tokens": 3}
    causal, both = build(vocab_size=11), build(vocab_size=11, causal=False)
    for call in (ModelDrafter, lambda model: speculative_stream(model, PromptLookup(), ids, **options)):
        with pytest.raises(ValueError, match="model must be causal"):
            call(both)
        with pytest.raises(ValueError, match="model must be in evaluation mode"):
            call(build(vocab_size=11).train())
    with pytest.raises(ValueError, match="ngram must be at least 1, got 0"):
        PromptLookup(0)
    scaling = RopeScaling("dynamic", factor=4.0, original_length=8)
    stretched = build(vocab_size=11, **LLAMA | {"rope_scaling": scaling})
    with pytest.raises(ValueError, match="max_new_tokens must not lead beyond the 8 tokens .* got 8, .* 9"):
        speculative_stream(stretched, PromptLookup(), ids, max_new_tokens=8)
    got = speculative_generate(stretched, PromptLookup(), ids, max_new_tokens=7, greedy=True)
    assert torch.equal(got.ids, generate(stretched, ids, max_new_tokens=7, greedy=True))
    with pytest.raises(ValueError, match="drafter must propose at most 2 tokens, got 5"):
        drafter = SimpleNamespace(propose=lambda ids, count, choose, stop_ids: (torch.ones(5).long(), None))
        list(speculative_stream(causal, drafter, ids, **options))
