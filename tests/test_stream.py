"""Text: batched as alone, cached as uncached, as transformers; characters and stop strings stay whole."""

import dataclasses
from functools import partial
from itertools import accumulate

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_attention import DTYPES, randomised
from test_language_model import GPT2, LLAMA, POSITIONS, filled, gpt2_layer, llama_layer, translated, weights

from companion.attention import KVCache
from companion.generate import (
    StopStrings,
    StreamDecoder,
    generate,
    generate_stream,
    generate_text,
    repetition_penalty,
    temperature,
    top_k,
)
from companion.models.language_model import LanguageModel, LanguageModelConfig
from companion.position import (
    LearnedPositionalEmbedding,
    RopeScaling,
    RotaryEmbedding,
    SinusoidalPositionalEncoding,
)
from companion.tokenizers import BPETokenizer

STREAM = "companion.generate.stream.generate_stream"
TEXT = "companion.generate.stream.generate_text"
ALONE = "LanguageModel without a cache, one prompt at a time"
unhurried = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
CORPUS = ["the cat sat on the mat", "le chat s'est assis là 猫坐在垫子上 🐈", "in the beginning, " * 3]
TOKENIZER = BPETokenizer.train(CORPUS, 300, special_tokens=["<pad>", "<eos>"])
SIZES = {"d_model": 24, "num_layers": 2, "num_heads": 3, "d_ff": 20, "max_length": 24}
PROMPTS = ([7, 31, 200], [44], [9, 12, 260, 77, 5, 130, 41], [280, 8])


def build(dtype: torch.dtype = torch.float64, vocab_size: int = 300, **options) -> LanguageModel:
    config = LanguageModelConfig(vocab_size, **{**SIZES, **options})
    return randomised(LanguageModel(config)).to(dtype).eval()


@torch.no_grad()
def alone(model, prompt, steps, stop_ids=()):
    """Greedy ids and their log-probabilities: the whole text is read again for each token."""
    ids, scores = list(prompt), []
    for _ in range(steps):
        log_probs = model(torch.tensor([ids]))[0, -1].log_softmax(-1)
        ids.append(int(log_probs.argmax()))
        scores.append(float(log_probs[ids[-1]]))
        if ids[-1] in stop_ids:
            break
    return ids[len(prompt) :], scores


def forced(tokens, start):
    """A filter that leaves one token, whatever the model thinks."""

    def only(logits, ids):
        kept = torch.full_like(logits, -torch.inf)
        kept[:, tokens[min(max(ids.shape[1] - start, 0), len(tokens) - 1)]] = 0.0
        return kept

    return only


# --- The same text, alone or among others, with a cache or without ------------------------------------------


def _agree_on(agree, got, wanted, tokens, scores):
    """Hold completions against pairs of ids and log-probabilities."""
    for mine, (ids, log_probs) in zip(got, wanted, strict=True):
        agree(list(mine.ids), ids, tolerance=0, quantity=f"greedy tokens, {tokens}")
        agree(
            torch.tensor(mine.log_probs, dtype=torch.float64),
            torch.tensor(log_probs, dtype=torch.float64),
            tolerance=1e-11,
            quantity=f"log-probabilities, {scores}",
        )


@pytest.mark.verifies(STREAM, against=ALONE)
@pytest.mark.verifies(TEXT, against=ALONE)
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("variant", [{}, LLAMA], ids=["GPT", "Llama"])
def test_batched_is_single(agree, position, variant, use_cache):
    model, steps = build(**variant | {"position": position}), 9
    expected = [alone(model, prompt, steps) for prompt in PROMPTS]
    stop_ids = {expected[0][0][2], expected[3][0][5]}  # texts end at different steps
    expected = [alone(model, prompt, steps, stop_ids) for prompt in PROMPTS]
    options = {"max_new_tokens": steps, "stop_ids": tuple(stop_ids), "greedy": True, "log_probs": True}
    for prompts, wanted in ((PROMPTS, expected), (PROMPTS[2:3], expected[2:3])):
        got = generate_text(model, TOKENIZER, prompts, use_cache=use_cache, **options)
        _agree_on(agree, got, wanted, "prompts of unequal length", f"{position} positions")
        for mine, (ids, _) in zip(got, wanted, strict=True):
            assert mine.finish == ("stop" if ids[-1] in stop_ids else "length")


@pytest.mark.parametrize("kind", ["linear", "ntk", "yarn", "dynamic"])
@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_batched_is_single_with_rotary_scaling(kind, layout):
    length = 64 if kind == "dynamic" else 4
    scaling = RopeScaling(kind, factor=4.0, original_length=length)
    model = build(**LLAMA | {"rope_scaling": scaling, "rope_layout": layout})
    got = generate_text(model, TOKENIZER, PROMPTS, max_new_tokens=6, greedy=True)
    assert [list(each.ids) for each in got] == [alone(model, prompt, 6)[0] for prompt in PROMPTS]


def test_dynamic_scaling_beyond_its_length_needs_prompts_of_one_length():
    scaling = RopeScaling("dynamic", factor=4.0, original_length=8)
    model = build(**LLAMA | {"rope_scaling": scaling})
    with pytest.raises(
        ValueError, match=r"prompts must be of one length with dynamic .* 8 tokens, got 1 … 7"
    ):
        generate_stream(model, TOKENIZER, PROMPTS, max_new_tokens=3)
    assert len(generate_text(model, TOKENIZER, PROMPTS, max_new_tokens=2)) == 4
    prompts = [[5, 6, 7], [7, 6, 5]]
    together = generate_text(model, TOKENIZER, prompts, max_new_tokens=9, greedy=True)
    assert together == [
        generate_text(model, TOKENIZER, [each], max_new_tokens=9, greedy=True)[0] for each in prompts
    ]


def test_the_longest_prompt_may_fill_the_learned_positions():
    model = build()
    prompts = [[5] * 20, [6]]
    got = generate_text(model, TOKENIZER, prompts, max_new_tokens=5, greedy=True)
    assert [list(each.ids) for each in got] == [alone(model, prompt, 5)[0] for prompt in prompts]
    with pytest.raises(ValueError, match="max_new_tokens must be at most 5 after a prompt of 20 tokens"):
        generate_stream(model, TOKENIZER, prompts, max_new_tokens=6)


# --- transformers -------------------------------------------------------------------------------------------


def gpt2(dtype):
    from transformers.models.gpt2 import GPT2Config, GPT2LMHeadModel

    mine = build(dtype, vocab_size=29, **GPT2)
    config = GPT2Config(vocab_size=29, n_positions=24, n_embd=24, n_layer=2, n_head=3, n_inner=20)
    rest = {
        "embedding.weight": "transformer.wte.weight",
        "position.weight": "transformer.wpe.weight",
        "norm.gain": "transformer.ln_f.weight",
        "norm.bias": "transformer.ln_f.bias",
    }
    state = translated(mine, weights(mine), gpt2_layer, "transformer.h", rest)
    state["lm_head.weight"] = state["transformer.wte.weight"]
    return mine, filled(GPT2LMHeadModel(config).to(dtype), state)


def llama(dtype):
    from transformers.models.llama import LlamaConfig, LlamaForCausalLM

    mine = build(dtype, vocab_size=29, **LLAMA | {"tie_output": False})
    config = LlamaConfig(
        vocab_size=29,
        hidden_size=24,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    rest = {
        "embedding.weight": "model.embed_tokens.weight",
        "norm.gain": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }
    state = translated(mine, weights(mine), llama_layer, "model.layers", rest)
    return mine, filled(LlamaForCausalLM(config).to(dtype), state)


@pytest.mark.verifies(STREAM, against="transformers.GenerationMixin.generate")
@pytest.mark.verifies(TEXT, against="transformers.GenerationMixin.generate")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pair", [gpt2, llama])
def test_as_transformers_with_left_padding(agree, pair, dtype):
    mine, theirs = pair(dtype)
    prompts = [[7, 3, 20], [11], [9, 12, 2, 28, 5, 13, 4]]
    ids = torch.tensor([[0] * (7 - len(prompt)) + prompt for prompt in prompts])
    keep = torch.arange(7) >= torch.tensor([[7 - len(prompt)] for prompt in prompts])
    theirs.generation_config.eos_token_id = None
    judged = theirs.generate(
        input_ids=ids,
        attention_mask=keep.long(),
        max_new_tokens=9,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    got = generate_text(mine, TOKENIZER, prompts, max_new_tokens=9, greedy=True, log_probs=True)
    theirs_ids = judged.sequences[:, 7:]
    log_probs = torch.stack(judged.logits, 1).double().log_softmax(-1).gather(-1, theirs_ids[..., None])
    for each, wanted, scores in zip(got, theirs_ids.tolist(), log_probs.squeeze(-1), strict=True):
        agree(list(each.ids), wanted, tolerance=0, quantity="greedy tokens, left padding")
        agree(
            torch.tensor(each.log_probs, dtype=torch.float64),
            scores,
            tolerance=2e-5,
            quantity=f"log-probabilities, left padding, {dtype}",
        )


# --- The loop -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("greedy", [True, False])
def test_prompts_of_equal_length_as_generate(greedy):
    model, prompts = build(), torch.randint(300, (3, 5))
    filters = (partial(repetition_penalty, penalty=1.3), partial(temperature, value=0.7), partial(top_k, k=9))
    generators = [torch.Generator().manual_seed(4) for _ in range(2)]
    options = {"max_new_tokens": 12, "filters": filters, "greedy": greedy}
    wanted = generate(model, prompts, generator=generators[0], **options)[:, 5:]
    got = generate_text(model, TOKENIZER, list(prompts), generator=generators[1], **options)
    assert [list(each.ids) for each in got] == wanted.tolist()
    assert all(each.log_probs is None for each in got)


def test_a_filter_sees_no_padding():
    model, seen = build(), []

    def spy(logits, ids):
        seen.extend(ids.tolist())
        return logits

    generate_text(model, TOKENIZER, PROMPTS, max_new_tokens=1, greedy=True, filters=[spy])
    assert seen[1:] == list(PROMPTS)  # the first call is the check
    options = {"max_new_tokens": 8, "greedy": True, "filters": [partial(repetition_penalty, penalty=2.5)]}
    together = generate_text(model, TOKENIZER, PROMPTS, **options)
    assert together == [generate_text(model, TOKENIZER, [each], **options)[0] for each in PROMPTS]


def test_log_probabilities_are_the_models_own():
    model, options = build(), {"max_new_tokens": 6, "log_probs": True}
    filters = [partial(top_k, k=2), partial(temperature, value=3.0)]
    (got,) = generate_text(model, TOKENIZER, [[5, 9]], filters=filters, **options)
    ids = [5, 9, *got.ids]
    with torch.no_grad():
        log_probs = model(torch.tensor([ids])).log_softmax(-1)[0]
    wanted = [float(log_probs[i + 1, token]) for i, token in enumerate(got.ids)]
    assert got.log_probs == pytest.approx(wanted, abs=1e-11)


def test_logits_are_of_last_positions_and_each_token_is_read_once(monkeypatch):
    model, read, projected = build(**LLAMA), [], []
    hidden, logits = model.hidden, model.logits
    monkeypatch.setattr(model, "hidden", lambda ids, *rest: read.append(ids.shape) or hidden(ids, *rest))
    monkeypatch.setattr(model, "logits", lambda x: projected.append(x.shape) or logits(x))
    stop = alone(build_like(model), PROMPTS[1], 3)[0][2]
    read.clear(), projected.clear()
    options = {"max_new_tokens": 6, "greedy": True, "stop_ids": [stop]}
    done = [len(each.ids) for each in generate_text(model, TOKENIZER, PROMPTS, **options)]
    assert min(done) < 6
    going = [sum(count > step for count in done) for step in range(max(done))]
    assert read == [(4, 7), *((count, 1) for count in going[1:])]  # a text that has ended leaves the batch
    assert projected == [(count, 24) for count in going]


def build_like(model):
    other = LanguageModel(model.config).to(model.embedding.weight.dtype).eval()
    other.load_state_dict(model.state_dict())
    return other


def test_the_cache_is_allocated_once(monkeypatch):
    grown, grow = [], KVCache._grown
    monkeypatch.setattr(KVCache, "_grown", lambda *args: grown.append(1) or grow(*args))
    generate_text(build(position="rotary"), TOKENIZER, PROMPTS, max_new_tokens=40, greedy=True)
    assert len(grown) == 2 * 2  # keys and values of two layers


@pytest.mark.verifies("companion.attention.KVCache", against="torch.cat")
@pytest.mark.parametrize("capacity", [None, 1, 5, 64])
def test_a_cache_of_any_capacity(agree, capacity):
    cache, parts = KVCache(capacity), torch.randn(2, 3, 2, 9, 4)
    for start, end in ((0, 3), (3, 4), (4, 9)):
        for got, part in zip(cache.append(*parts[..., start:end, :]), parts, strict=True):
            agree(got, part[..., :end, :], tolerance=0, quantity="keys and values, any capacity")
    for wrong, error in ((0, ValueError), (2.0, TypeError)):
        with pytest.raises(error, match="capacity must be"):
            KVCache(wrong)


def test_it_can_be_left_at_any_time_and_leaves_gradients_on():
    stream = generate_stream(build(), TOKENIZER, ["the cat", "le"], max_new_tokens=9)
    assert next(stream).prompt == 0 and next(stream).prompt == 1
    assert torch.is_grad_enabled()
    stream.close()
    assert list(stream) == []


@pytest.mark.verifies("companion.models.language_model.LanguageModel", against="the text without padding")
@pytest.mark.parametrize("position", ["learned", "sinusoidal", "rotary"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_positions_undo_padding_on_the_left(agree, position, dtype):
    model, ids = build(dtype, position=position), torch.randint(300, (3, 11))
    first = torch.tensor([[4], [0], [9]])
    places = torch.arange(11) - first
    mask = (places >= 0)[:, None, None]
    cache = model.new_cache(capacity=11)
    with torch.no_grad():
        parts = [
            model(ids[:, start:end], mask[..., :end], cache, places[:, start:end].clamp(min=0))
            for start, end in ((0, 6), (6, 10), (10, 11))
        ]
        for row, (padded, start) in enumerate(zip(torch.cat(parts, 1), first.flatten(), strict=True)):
            agree(
                padded[start:],
                model(ids[row : row + 1, start:])[0],
                tolerance=1e-11 if dtype == torch.float64 else 2e-5,
                quantity=f"logits beside padding on the left, {position} positions, {dtype}",
            )


@pytest.mark.verifies("companion.position.RotaryEmbedding.at", against="RotaryEmbedding.forward")
@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("kind", [None, "linear", "dynamic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rotary_positions_one_by_one(agree, layout, kind, dtype):
    scaling = kind and RopeScaling(kind, factor=4.0, original_length=8)
    rotary = RotaryEmbedding(6, layout=layout, scaling=scaling)
    x, starts, tolerance = torch.randn(3, 2, 5, 6, dtype=dtype), (0, 15, 15), 8 * torch.finfo(dtype).eps
    positions = torch.tensor(starts)[:, None] + torch.arange(5)
    turned = rotary.at(positions, dtype)(x, 99)
    for row, start in enumerate(starts):
        if kind == "dynamic" and start == 0:
            continue  # its frequencies follow from the longest row
        one_by_one = rotary(x[row : row + 1], start)[0]
        agree(turned[row], one_by_one, tolerance=tolerance, quantity=f"turned vectors, {layout}, {dtype}")


@pytest.mark.parametrize("make", [LearnedPositionalEmbedding, SinusoidalPositionalEncoding])
def test_absolute_positions_one_by_one(make):
    position = make(*((40, 6) if make is LearnedPositionalEmbedding else (6,)))
    x, starts = torch.randn(3, 5, 6), (7, 0, 33)
    positions = torch.tensor(starts)[:, None] + torch.arange(5)
    for row, start in enumerate(starts):
        assert torch.equal(position(x, positions)[row], position(x[row], start))
    with pytest.raises(ValueError, match=r"offset must have x's batch and n, got \(3, 4\) for \(3, 5, 6\)"):
        position(x, positions[:, 1:])
    with pytest.raises(TypeError, match="offset must be an integer tensor, got torch.float32"):
        position(x, positions.float())


@pytest.mark.parametrize(
    ("position", "positions", "error", "match"),
    [
        ("learned", torch.zeros(2, 3), TypeError, "positions must be an integer tensor, got torch.float32"),
        ("learned", [[0, 1, 2]] * 2, TypeError, "positions must be a torch.Tensor, got list"),
        ("learned", torch.full((2, 3), 24), ValueError, r"positions must lie in 0 … 23, got values from 24"),
        ("rotary", torch.full((2, 3), -1), ValueError, r"positions must lie in 0 … \d+, got values from -1"),
        ("rotary", torch.zeros(1, 3).long(), ValueError, r"positions must have the ids' shape \(2, 3\)"),
        ("alibi", torch.zeros(2, 3).long(), ValueError, "positions must be None with 'alibi' positions"),
    ],
)
def test_bad_positions_are_named(position, positions, error, match):
    model = build(position=position)
    cache = model.new_cache()
    with pytest.raises(error, match=match):
        model(torch.ones(2, 3).long(), cache=cache, positions=positions)
    assert cache.length == 0


# --- Characters ---------------------------------------------------------------------------------------------


class Plain:
    """A tokenizer with `encode` and `decode` alone."""

    encode, decode = TOKENIZER.encode, TOKENIZER.decode


def decoded(tokens, tokenizer=TOKENIZER):
    decoder = StreamDecoder(tokenizer)
    return [*map(decoder.feed, tokens), decoder.flush()]


@pytest.mark.verifies("companion.generate.stream.StreamDecoder", against="bytes.decode")
@given(tokens=st.lists(st.integers(0, 299)))
@unhurried
def test_pieces_of_any_ids_join_to_the_text(agree, tokens):
    spelled = b"".join(TOKENIZER.token_bytes(token) for token in tokens if token >= 2)
    wanted = spelled.decode("utf-8", "replace")
    agree("".join(decoded(tokens)), wanted, tolerance=0, quantity="text of any ids, in pieces")
    assert wanted == TOKENIZER.decode(tokens, skip_special=True)


@given(text=st.text(), plain=st.booleans())
@unhurried
def test_no_piece_holds_half_a_character(text, plain):
    text = text.replace("\ufffd", "")
    tokens = TOKENIZER.encode(text)
    pieces = decoded(tokens, Plain() if plain else TOKENIZER)
    assert "".join(pieces) == text and pieces[-1] == ""
    assert not any("\ufffd" in piece for piece in pieces)
    spelled = accumulate(TOKENIZER.token_bytes(token) for token in tokens)
    for said, whole in zip(accumulate(pieces), spelled, strict=False):  # nothing is kept back without need
        assert said == whole.decode("utf-8", "ignore")


def test_a_character_cut_off_at_the_end_is_replaced():
    tokens = TOKENIZER.encode("a🐈")[:-1]
    assert len(tokens) > 1
    for tokenizer in (TOKENIZER, Plain()):
        assert decoded(tokens, tokenizer) == ["a", *[""] * (len(tokens) - 1), "\ufffd"]


def test_a_tokenizer_whose_words_depend_on_what_stands_before():
    class Words:  # as WordPiece: a space before each word but the first, none before a ##continuation
        words = ("play", "##ing", "the", "game")

        def encode(self, text):
            raise AssertionError

        def decode(self, ids):
            return " ".join(self.words[i] for i in ids).replace(" ##", "")

    decoder = StreamDecoder(Words(), prompt=[0])
    assert [*map(decoder.feed, [1, 2, 3]), decoder.flush()] == ["ing", " the", " game", ""]


def test_special_and_unknown_ids_spell_nothing():
    (the,) = TOKENIZER.encode("the")
    assert decoded([1, the, 0, 300, the]) == ["", "the", "", "", "the", ""]


# --- Stop strings -------------------------------------------------------------------------------------------


def cut(text, stop):
    """Read character by character until a stop string is complete: the text before it, and the string."""
    for end in range(1, len(text) + 1):
        if found := [each for each in stop if text[:end].endswith(each)]:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


def waiting(text, stop):
    """The text without the longest end that begins a stop string."""
    starts = [i for i in range(len(text)) if any(s.startswith(text[i:]) and s != text[i:] for s in stop)]
    return text[: min(starts)] if starts else text


few = st.text("ab<🐈", max_size=5)


@pytest.mark.verifies("companion.generate.stream.StopStrings", against="enumeration")
@given(pieces=st.lists(few), stop=st.lists(few.filter(len), max_size=3))
@unhurried
def test_stop_strings_wherever_the_pieces_end(agree, pieces, stop):
    stops, said, read = StopStrings(stop), "", ""
    for piece in pieces:
        read += piece
        said += stops.feed(piece)
        before, found = cut(read, stop)
        assert stops.found == found
        agree(
            said, before if found else waiting(read, stop), tolerance=0, quantity="text settled by each piece"
        )
    said += stops.flush()
    agree(said, cut(read, stop)[0], tolerance=0, quantity="text before the stop string")


MODEL = build(torch.float32, position="rotary")


@given(text=st.text("abc the🐈猫\n<", min_size=1, max_size=12), stop=st.lists(few.filter(len), max_size=2))
@settings(unhurried, max_examples=60)
def test_stop_strings_across_tokens_end_a_text(text, stop):
    tokens = TOKENIZER.encode(text)
    options = {"stop": stop, "filters": [forced(tokens, 3)], "greedy": True}
    (got,) = generate_text(MODEL, TOKENIZER, [[5, 6, 7]], max_new_tokens=len(tokens), **options)
    before, found = cut(text, stop)
    assert got.text == before
    assert got.finish == ("length" if found is None else "stop")
    assert list(got.ids) == tokens[: len(got.ids)]
    if found is not None:  # it ends with the token that completes the string
        spelled = [TOKENIZER.decode(tokens[:count]) for count in (len(got.ids), len(got.ids) - 1)]
        assert before + found in spelled[0] and before + found not in spelled[1]


def test_a_stop_id_spells_nothing_and_releases_what_was_held():
    tokens = [*TOKENIZER.encode("ab<|"), TOKENIZER.special_ids["<eos>"]]
    options = {"stop": ["<|end|>"], "stop_ids": [1], "filters": [forced(tokens, 1)], "greedy": True}
    pieces = list(generate_stream(MODEL, TOKENIZER, [[5]], max_new_tokens=9, **options))
    assert "".join(piece.text for piece in pieces) == "ab<|"
    assert pieces[-1].text.endswith("<|") and pieces[-1].finish == "stop"
    assert [piece.token for piece in pieces] == tokens
    assert not any("<" in piece.text for piece in pieces[:-1])


def test_a_text_cut_off_in_a_character_ends_in_a_replacement():
    tokens = TOKENIZER.encode("the 🦜")
    steps = len(tokens) - 1
    options = {"max_new_tokens": steps, "filters": [forced(tokens, 1)], "greedy": True}
    (got,) = generate_text(MODEL, TOKENIZER, [[5]], **options)
    assert got.text == TOKENIZER.decode(tokens[:-1]) == "the \ufffd"
    (got,) = generate_text(MODEL, TOKENIZER, [[5]], stop=["\ufffd"], **options)
    assert (got.text, got.finish) == ("the ", "stop")


# --- Bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"prompts": "the cat"}, TypeError, "prompts must be a sequence of prompts, got one str"),
        ({"prompts": []}, ValueError, "prompts must hold at least one prompt"),
        ({"prompts": ["the", ""]}, ValueError, r"prompts\[1\] must not be empty"),
        ({"prompts": [[3], [300]]}, ValueError, r"prompts\[1\] must lie in 0 … 299, got values from 300"),
        ({"prompts": [[3], [0.5]]}, TypeError, r"prompts\[1\] must be a str or a flat sequence of ids"),
        ({"prompts": [torch.zeros(1, 2)]}, TypeError, r"prompts\[0\] must be an integer tensor"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be at least 1, got 0"),
        ({"stop": "end"}, TypeError, "stop must be a sequence of strings, got one str"),
        ({"stop": [b"end"]}, TypeError, "stop must hold strings, got bytes"),
        ({"stop": ["end", ""]}, ValueError, "stop must hold no empty string"),
        ({"stop_ids": [300]}, ValueError, "stop_ids must lie in 0 … 299, got 300"),
        ({"stop_ids": 1}, TypeError, "stop_ids must be a sequence of ints, got one int"),
        ({"filters": [3]}, TypeError, "filters must hold callables"),
        ({"generator": 3}, TypeError, "generator must be a torch.Generator, got int"),
    ],
)
def test_bad_calls_are_named_before_any_work(changes, error, match, monkeypatch):
    monkeypatch.setattr(MODEL, "hidden", lambda *_: pytest.fail("the model ran"))
    arguments = {"prompts": ["the"], "max_new_tokens": 3} | changes
    for call in (generate_stream, generate_text):
        with pytest.raises(error, match=match):
            call(
                MODEL,
                TOKENIZER,
                arguments["prompts"],
                **{k: v for k, v in arguments.items() if k != "prompts"},
            )


def test_a_model_in_training_or_an_encoder_is_refused():
    with pytest.raises(ValueError, match="model must be in evaluation mode"):
        generate_stream(build().train(), TOKENIZER, ["a"], max_new_tokens=1)
    with pytest.raises(ValueError, match="model must be causal"):
        generate_stream(build(causal=False), TOKENIZER, ["a"], max_new_tokens=1)


def test_records_cannot_be_changed():
    piece = next(generate_stream(MODEL, TOKENIZER, ["a"], max_new_tokens=1))
    with pytest.raises(dataclasses.FrozenInstanceError):
        piece.text = ""


# --- A beginning that all prompts share ---------------------------------------------------------------------


@pytest.mark.verifies(TEXT, against=ALONE)
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("rests", [PROMPTS, ([7, 31], [44, 9], [12, 260]), ([5],) * 9], ids=str)
def test_a_shared_beginning_is_read_once(agree, monkeypatch, position, rests):
    model, read = build(**LLAMA | {"position": position, "max_length": 40}), []
    beginning = torch.randint(300, (17,)).tolist()
    prompts = [beginning + rest for rest in rests]
    expected = [alone(model, prompt, 5) for prompt in prompts]
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda ids, *rest: read.append(ids.shape) or hidden(ids, *rest))
    got = generate_text(model, TOKENIZER, prompts, max_new_tokens=5, greedy=True, log_probs=True)
    equal_length = len({*map(len, rests)}) == 1
    longest, once = max(map(len, prompts)), equal_length or position in ("learned", "sinusoidal", "rotary")
    same = min(17, min(map(len, prompts)) - 1)
    assert read[: 1 + once] == ([(1, same)] if once else []) + [(len(prompts), longest - same * once)]
    _agree_on(agree, got, expected, *["prompts with a shared beginning"] * 2)


def test_a_filter_sees_the_shared_beginning_and_no_padding():
    model, seen = build(max_length=40), []

    def spy(logits, ids):
        seen.extend(ids.tolist())
        return logits

    prompts = [[9] * 20 + rest for rest in PROMPTS]
    generate_text(model, TOKENIZER, prompts, max_new_tokens=1, greedy=True, filters=[spy])
    assert seen[1:] == prompts  # the first call is the check
