"""Unigram: the segmentations of `sentencepiece` with its own model, and sums over all segmentations."""

import hashlib
import io
import json
import math
import os
import random
import re
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
import torch
from conftest import mutate
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from companion.data.assets import asset_path
from companion.data.translation import load_pairs
from companion.tokenizers import UnigramTokenizer
from companion.tokenizers.unigram import UNKNOWN_PENALTY, expected_counts

UNIGRAM = "companion.tokenizers.unigram.UnigramTokenizer"
unhurried = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
VERSE = "In the beginning, God created the heavens and the earth. Au commencement, Dieu créa les cieux."
SCORES = {"▁": -2.0, "a": -1.5, "b": -2.5, "ab": -2.0, "ba": -3.0, "▁a": -2.25, "aba": -4.0, "bab": -4.5}


@pytest.fixture(scope="module")
def pairs():
    return load_pairs()


@pytest.fixture(scope="module")
def judged(pairs):
    """`sentencepiece`, trained on English and French, and our tokenizer with its pieces and scores."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text for pair in pairs.train[:1_500] for text in (pair.source, pair.target)]),
        model_writer=model,
        vocab_size=2_000,
        model_type="unigram",
        normalization_rule_name="identity",
        num_threads=1,
        minloglevel=2,
        bos_id=-1,
        eos_id=-1,
        pad_id=-1,
        unk_id=0,
    )
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    scores = {theirs.id_to_piece(i): theirs.get_score(i) for i in range(1, theirs.get_piece_size())}
    return UnigramTokenizer(scores), theirs


@pytest.fixture(scope="module")
def small():
    return UnigramTokenizer(SCORES)


@pytest.fixture(scope="module")
def trained(pairs):
    return UnigramTokenizer.train([pair.source for pair in pairs.train[:600]], 500)


def segmentations(word):
    """Every way to cut a word, as tuples of pieces."""
    for number in range(len(word)):
        for cuts in combinations(range(1, len(word)), number):
            borders = (0, *cuts, len(word))
            yield tuple(word[start:end] for start, end in zip(borders, borders[1:], strict=False))


def log_probabilities(word, scores):
    """Segmentation of the word → its log-probability, for all whose pieces have one."""
    possible = (parts for parts in segmentations(word) if all(part in scores for part in parts))
    return {parts: sum(scores[part] for part in parts) for parts in possible}


# The judge


@pytest.mark.verifies(UNIGRAM, against="sentencepiece.SentencePieceProcessor")
@pytest.mark.parametrize("language", ["source", "target"])
def test_encodes_unseen_sentences_as_sentencepiece(judged, pairs, agree, language):
    mine, theirs = judged
    texts = [getattr(pair, language) for pair in pairs.train[1_500:4_500]]
    agree(
        mine.encode_batch(texts), theirs.encode(texts), tolerance=0, quantity="ids, English and French lines"
    )
    assert mine.vocab_size == theirs.get_piece_size()


@pytest.mark.verifies(UNIGRAM, against="sentencepiece.SentencePieceProcessor")
@unhurried
@given(
    st.text(st.one_of(st.sampled_from("abcdeéthins  ,.Z中文"), st.characters(categories=["L"])), max_size=40)
)
@example("  中文 aaaa中  文  ")
def test_encodes_unknown_characters_as_sentencepiece(judged, agree, text):
    mine, theirs = judged
    agree(mine.encode(text), theirs.encode(text), tolerance=0, quantity="ids, any letters and spaces")


@pytest.fixture(scope="module")
def chinese():
    """jieba's words as pieces, their counts as probabilities, and runs of Chinese characters."""
    entries = (line.split(" ") for line in asset_path("chinese-words").read_text("utf-8").splitlines())
    counts = {word: int(number) for word, number, _ in entries}
    total = math.log(sum(counts.values()))
    files = sorted(asset_path("chinese-dialogues").glob("*.yml"))
    runs = re.findall("[\u4e00-\u9fff]+", "\n".join(file.read_text("utf-8") for file in files))
    return UnigramTokenizer({"▁": 0.0} | {word: math.log(n) - total for word, n in counts.items()}), runs


@pytest.mark.verifies(UNIGRAM, against="jieba.Tokenizer")
@pytest.mark.filterwarnings("ignore:invalid escape")
def test_finds_the_words_of_chinese_as_jieba(chinese, tmp_path, agree):
    import jieba

    jieba.setLogLevel("ERROR")
    judge = jieba.Tokenizer()
    judge.tmp_dir = tmp_path  # of its cache
    mine, runs = chinese
    words = [[mine.pieces[index] for index in mine.encode(run)[1:]] for run in runs]
    theirs = [list(judge.cut(run, HMM=False)) for run in runs]
    agree(words, theirs, tolerance=0, quantity="words, Chinese dialogues")
    assert sum(map(len, words)) == 5_920


# Enumeration

words = st.text("ab", min_size=1, max_size=9).map(lambda word: "▁" + word)


@pytest.mark.verifies(UNIGRAM, against="enumeration")
@unhurried
@given(st.text("ab", min_size=1, max_size=9))
def test_finds_the_most_probable_segmentation(small, agree, text):
    best = max(log_probabilities("▁" + text, SCORES).values())
    agree(small.score(small.encode(text)), best, tolerance=1e-12, quantity="log-probability of the best")
    assert small.decode(small.encode(text)) == text


@pytest.mark.verifies("companion.tokenizers.unigram.expected_counts", against="enumeration")
def test_expected_counts_without_every_piece_or_path(agree):
    """Words that one piece alone spells, no word at all, and pieces that no path may use."""
    scores = {"a": -math.inf, "b": -1.0, "aa": -2.0, "": 0.0}
    mine = expected_counts({"aab": 2, "b": 1, "": 3}, scores)
    agree(mine, {"a": 0.0, "b": 3.0, "aa": 2.0, "": 0.0}, tolerance=0, quantity="counts at the limits")


@pytest.mark.verifies("companion.tokenizers.unigram.expected_counts", against="enumeration")
@unhurried
@given(st.dictionaries(words, st.integers(1, 5), min_size=1, max_size=5))
def test_expected_counts_sum_over_all_segmentations(agree, corpus):
    expected = dict.fromkeys(SCORES, 0.0)
    for word, count in corpus.items():
        found = log_probabilities(word, SCORES)
        total = math.fsum(map(math.exp, found.values()))
        for parts, log_p in found.items():
            for part in parts:
                expected[part] += count * math.exp(log_p) / total
    mine = expected_counts(corpus, SCORES)
    agree(mine, expected, tolerance=1e-12, quantity="posterior counts of each piece")


@pytest.mark.verifies(f"{UNIGRAM}.sample", against="enumeration")
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 2.0])
def test_draws_segmentations_by_their_probability(small, agree, alpha):
    found = log_probabilities("▁abab", SCORES)
    weights = {parts: math.exp(alpha * log_p) for parts, log_p in found.items()}
    expected = {parts: weight / sum(weights.values()) for parts, weight in weights.items()}
    generator = random.Random(3)
    draws = 6_000
    drawn = Counter(
        tuple(small.pieces[index] for index in small.sample("abab", alpha=alpha, generator=generator))
        for _ in range(draws)
    )
    assert drawn.keys() <= expected.keys()
    frequencies = {parts: drawn[parts] / draws for parts in expected}
    agree(frequencies, expected, tolerance=0.03, quantity="frequencies of 6,000 draws")


@pytest.mark.verifies(f"{UNIGRAM}.train", against="enumeration")
def test_one_step_of_training_is_the_step_of_enumerated_counts(agree):
    """Nothing is pruned: the seed, weighted by count times length, then one expectation and normalisation."""
    corpus = {"▁abab": 3, "▁ab": 2}
    seed = {"▁": 5, "a": 8, "b": 8, "▁a": 10, "▁ab": 15, "ab": 16, "ba": 6, "▁aba": 12, "▁abab": 15}
    seed |= {"aba": 9, "abab": 12, "bab": 9}
    before = {piece: math.log(weight / sum(seed.values())) for piece, weight in seed.items()}
    counts = dict.fromkeys(seed, 0.0)
    for word, count in corpus.items():
        found = log_probabilities(word, before)
        total = math.fsum(map(math.exp, found.values()))
        for parts, log_p in found.items():
            for part in parts:
                counts[part] += count * math.exp(log_p) / total
    total = sum(counts.values())
    expected = {piece: math.log(count / total) for piece, count in counts.items()}
    mine = UnigramTokenizer.train(["abab abab abab", "ab ab"], 100, num_iterations=1)
    agree(mine.scores, expected, tolerance=1e-12, quantity="log-probabilities after one step of EM")


@pytest.mark.verifies(f"{UNIGRAM}.train", against="enumeration")
def test_prunes_the_piece_whose_loss_costs_least(agree):
    """The same step; then the loss of each piece from all its segmentations into other pieces."""
    texts = ["abab abab abab", "ab ab"]
    full = UnigramTokenizer.train(texts, 100, num_iterations=1).scores
    counts = expected_counts({"▁abab": 3, "▁ab": 2}, _seed_scores())
    loss = {}
    for piece in full:
        if len(piece) > 1:
            found = log_probabilities(piece, full)
            del found[(piece,)]
            loss[piece] = counts[piece] * (full[piece] - max(found.values()))
    kept = sorted(loss, key=loss.get)[1:]
    pruned = UnigramTokenizer.train(texts, len(full), num_iterations=1, keep=0.99)
    expected = sorted([*kept, "▁", "a", "b"])
    agree(sorted(pruned.scores), expected, tolerance=0, quantity="pieces left after pruning one")


def _seed_scores():
    seed = {"▁": 5, "a": 8, "b": 8, "▁a": 10, "▁ab": 15, "ab": 16, "ba": 6, "▁aba": 12, "▁abab": 15}
    seed |= {"aba": 9, "abab": 12, "bab": 9}
    return {piece: math.log(weight / sum(seed.values())) for piece, weight in seed.items()}


# Properties


def test_expectation_maximisation_never_lowers_the_likelihood():
    corpus = {"▁abab": 3, "▁ab": 2, "▁ba": 4, "▁bbabba": 1}
    scores = dict(SCORES)
    before = -math.inf
    for _ in range(8):
        total = sum(
            count * math.log(math.fsum(map(math.exp, log_probabilities(word, scores).values())))
            for word, count in corpus.items()
        )
        assert total >= before - 1e-12 or before == -math.inf
        before = total
        counts = expected_counts(corpus, scores)
        norm = sum(counts.values())
        scores = {piece: math.log(count / norm) for piece, count in counts.items() if count > 0}


def test_training_yields_the_size_asked_for_and_probabilities(trained):
    assert trained.vocab_size == 500
    assert math.fsum(map(math.exp, trained.scores.values())) == pytest.approx(1.0)
    assert {"▁the", "▁and"} <= set(trained.pieces)
    assert trained.encode(VERSE) == trained.encode(f"  {VERSE}\n")
    characters = set("".join(trained.pieces[1:]))
    assert characters <= set(trained.pieces)


@unhurried
@given(st.text("Inthe bgigé中 ,.\n", max_size=30))
def test_round_trips_but_for_white_space_and_unknowns(trained, text):
    ids = trained.encode(text)
    if trained.unknown_id not in ids:
        assert trained.decode(ids) == " ".join(text.split())
    assert not any(a == b == 0 for a, b in zip(ids, ids[1:], strict=False))
    for seed in range(3):
        sampled = trained.sample(text, generator=random.Random(seed))
        assert trained.decode(sampled) == trained.decode(ids)


def test_unknown_characters(small):
    ids = small.encode("a中文a")
    assert [small.pieces[index] for index in ids] == ["▁a", "<unk>", "a"]
    assert small.decode(ids) == "a<unk>a"
    assert small.decode(ids, skip_special=True) == "aa"
    assert small.score([0]) == -4.5 - UNKNOWN_PENALTY
    assert small.encode("<unk>").count(0) == 1  # a run of characters no piece spells, not a special token
    assert UnigramTokenizer({"x": -1.0}).encode("中 文") == [0]


def test_sampling_with_a_large_alpha_is_encoding(trained):
    assert trained.sample(VERSE, alpha=500.0, generator=random.Random(0)) == trained.encode(VERSE)
    draws = {tuple(trained.sample(VERSE, alpha=0.2, generator=random.Random(n))) for n in range(20)}
    assert len(draws) == 20
    assert trained.sample(VERSE, generator=random.Random(1)) == trained.sample(
        VERSE, generator=random.Random(1)
    )


def test_decodes_tensors_and_arrays(small):
    ids = small.encode("ab ba")
    assert small.decode(torch.tensor(ids)) == small.decode(np.array(ids)) == "ab ba"
    assert small.encode_batch(["ab ba", ""]) == [ids, []]


def test_training_is_the_same_each_time(pairs):
    texts = [pair.source for pair in pairs.train[:100]]
    assert UnigramTokenizer.train(texts, 200).scores == UnigramTokenizer.train(iter(texts), 200).scores


# Files


def test_saves_and_loads(small, trained, tmp_path):
    path = tmp_path / "unigram.json"
    for mine in (small, trained):
        mine.save(path)
        loaded = UnigramTokenizer.load(str(path))
        assert (loaded.pieces, loaded.scores) == (mine.pieces, mine.scores)
        assert loaded.encode(VERSE) == mine.encode(VERSE)
    assert os.listdir(tmp_path) == ["unigram.json"]
    with pytest.raises(FileNotFoundError):
        UnigramTokenizer.load(tmp_path / "missing.json")


@unhurried
@given(st.data())
def test_a_mutated_file_is_refused_or_the_same(small, tmp_path_factory, data):
    path = tmp_path_factory.mktemp("mutated") / "unigram.json"
    small.save(path)
    mutate(path, data)
    try:
        loaded = UnigramTokenizer.load(path)
    except ValueError as error:
        assert str(path) in str(error)
    else:
        assert loaded.scores == small.scores


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([], "scores must have 1 to"),
        ({"a": -1}, "scores must be a list of pairs"),
        ([["a", -1], ["a", -2]], "scores must be distinct"),
        ([["a"]], "sequence element"),
        ([[["a"], 1]], "unhashable"),
        ([["a", "b"]], r"scores\['a'\] must be a number"),
        ([["a", math.nan]], r"scores\['a'\] must be finite"),
        ([[1, -1]], "scores must be a str"),
    ],
)
def test_an_inconsistent_file_with_a_right_checksum_is_refused(tmp_path, scores, message):
    content = {"format": "companion.tokenizers.unigram", "version": 1, "scores": scores}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    path = tmp_path / "unigram.json"
    path.write_text(json.dumps(content | {"sha256": digest}))
    with pytest.raises(ValueError, match=message) as caught:
        UnigramTokenizer.load(path)
    assert str(path) in str(caught.value)


# Bad input

U = UnigramTokenizer


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda t: t.encode(b"bytes"), TypeError, "text must be a str, got bytes"),
        (lambda t: t.encode("ab\ud83d"), ValueError, r"text .* lone surrogate U\+D83D at index 2"),
        (lambda t: t.encode_batch("text"), TypeError, "texts must be an iterable of strings, got one str"),
        (lambda t: t.sample(3), TypeError, "text must be a str, got int"),
        (lambda t: t.sample("a", alpha=-1), ValueError, "alpha must be finite and at least 0, got -1"),
        (lambda t: t.sample("a", alpha=math.inf), ValueError, "alpha must be finite"),
        (lambda t: t.sample("a", alpha="b"), TypeError, "alpha must be a number, got str"),
        (lambda t: t.sample("a", generator=3), TypeError, "generator must be a random.Random, got int"),
        (lambda t: t.decode([9]), ValueError, "ids must lie in 0 … 8, got 9"),
        (lambda t: t.score([1.0]), TypeError, "ids must be a flat sequence of integers"),
        (lambda t: U(["a"]), TypeError, "scores must be a mapping, got list"),
        (lambda t: U({}), ValueError, "scores must have 1 to"),
        (lambda t: U({"": -1.0}), ValueError, "scores must have pieces of 1 to 64 characters"),
        (lambda t: U({"a▁": -1.0}), ValueError, "at the head only"),
        (lambda t: U({"<unk>": -1.0}), ValueError, "no <unk>"),
        (lambda t: U({"a": math.inf}), ValueError, r"scores\['a'\] must be finite"),
        (lambda t: U.train("text", 60), TypeError, "texts must be an iterable of strings, got one str"),
        (lambda t: U.train(["a", None], 60), TypeError, r"texts\[1\] must be a str, got NoneType"),
        (lambda t: U.train(["abc"], 4), ValueError, "vocab_size must lie in 5 .* got 4"),
        (lambda t: U.train(["abc"], 4.0), TypeError, "vocab_size must be an int"),
        (lambda t: U.train([" "], 10), ValueError, "texts must hold a word, got none"),
        (lambda t: U.train(["abc"], 9, keep=1.0), ValueError, r"keep must lie in \(0, 1\), got 1.0"),
        (lambda t: U.train(["abc"], 9, max_piece_length=1), ValueError, "max_piece_length must lie in 2"),
        (lambda t: U.train(["abc"], 9, num_iterations=0), ValueError, "num_iterations must be at least 1"),
        (lambda t: U.train(["abc"], 9, seed_size=0), ValueError, "seed_size must be at least 1"),
        (lambda t: expected_counts(["a"], {}), TypeError, "words must be a mapping, got list"),
        (lambda t: expected_counts({"a": 1}, {"b": -1.0}), ValueError, "scores must have every character"),
    ],
)
def test_refuses_bad_input(small, call, error, message):
    before = (small.pieces, small.scores)
    with pytest.raises(error, match=message):
        call(small)
    assert (small.pieces, small.scores) == before
