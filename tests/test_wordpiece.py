"""WordPiece: the words and pieces of `tokenizers` with MiniLM's vocabulary, training by a full recount."""

import hashlib
import json
import os
import pickle
import random
import unicodedata
from collections import Counter
from fractions import Fraction
from itertools import chain, pairwise

import pytest
import torch
from conftest import mutate
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import BertWordPieceTokenizer, Tokenizer, decoders, models, normalizers, pre_tokenizers

from companion.data.assets import asset_path
from companion.data.translation import load_pairs
from companion.tokenizers import WordPieceTokenizer
from companion.tokenizers.wordpiece import MAX_VOCAB_SIZE, SPECIAL_TOKENS

WORDPIECE = "companion.tokenizers.wordpiece.WordPieceTokenizer"
unhurried = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
OPTIONS = [(True, None), (False, None), (True, False), (False, True)]  # lower case, accents stripped
VERSE = "In the beginning, God created the heavens and the earth. Au commencement, Dieu créa les cieux."


@pytest.fixture(scope="module")
def vocabulary():
    text = asset_path("minilm-vocabulary").read_text("utf-8")
    return {piece: index for index, piece in enumerate(text.splitlines())}


@pytest.fixture(scope="module")
def both(vocabulary):
    """For each pair of options our tokenizer and the judge's parts, put together without special tokens."""

    def make(lowercase, strip_accents):
        theirs = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100))
        theirs.normalizer = normalizers.BertNormalizer(True, True, strip_accents, lowercase)
        theirs.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        theirs.decoder = decoders.WordPiece(prefix="##", cleanup=False)
        mine = WordPieceTokenizer.from_vocabulary(
            asset_path("minilm-vocabulary"), lowercase=lowercase, strip_accents=strip_accents
        )
        return mine, theirs

    return {options: make(*options) for options in OPTIONS}


@pytest.fixture(scope="module")
def minilm(both):
    return both[True, None][0]


@pytest.fixture(scope="module")
def small():
    return WordPieceTokenizer.train([VERSE] * 2, 60)


@pytest.fixture(scope="module")
def lines():
    """English, French, and random Chinese, denser where the vocabulary has more characters."""
    draw = random.Random(0)
    chinese = [
        "".join(
            draw.choice("，。！ a1\n")
            if draw.random() < 0.2
            else chr(0x4E00 + int(draw.random() ** 2 * 0x5200))
            for _ in range(30)
        )
        for _ in range(1_500)
    ]
    return [text for pair in load_pairs().train[:3_000] for text in (pair.source, pair.target)] + chinese


# The judge


@pytest.mark.verifies(WORDPIECE, against="tokenizers.BertWordPieceTokenizer")
def test_encodes_lines_as_tokenizers(minilm, vocabulary, lines, agree):
    theirs = BertWordPieceTokenizer(vocab=vocabulary)
    ids = [encoding.ids for encoding in theirs.encode_batch(lines)]
    agree(
        minilm.encode_batch(lines, add_special=True),
        ids,
        tolerance=0,
        quantity="MiniLM, lines in English, French and Chinese",
    )


@pytest.mark.verifies(WORDPIECE, against="tokenizers.Tokenizer")
@pytest.mark.parametrize("options", OPTIONS)
def test_encodes_lines_with_other_options_as_tokenizers(both, lines, agree, options):
    mine, theirs = both[options]
    ids = [encoding.ids for encoding in theirs.encode_batch(lines[::4])]
    agree(mine.encode_batch(lines[::4]), ids, tolerance=0, quantity="MiniLM, case and accents kept or not")


# The judge's tables of characters are those of Unicode 8: only what has not changed since 3.2. And its
# Chinese blocks leave out U+2B820 … U+2B91F, which BERT's have.
settled = [
    chr(code)
    for code in range(0x30000)
    if unicodedata.ucd_3_2_0.category(chr(code)) == unicodedata.category(chr(code)) not in ("Cn", "Cs")
    and not 0x2B820 <= code < 0x2B920
]
wild = st.text(
    st.one_of(
        st.sampled_from(settled), st.sampled_from("ab'12 \n\t\r\u00a0éÉßİΣς中\u0301\u200d\x00\ufffd[]#$")
    ),
    max_size=40,
)


@pytest.mark.verifies(WORDPIECE, against="tokenizers.Tokenizer")
@unhurried
@given(wild, st.sampled_from(OPTIONS))
@example("[CLS] ##ing ΟΔΥΣΣΕΥΣ İstanbul \u1e69\u0323 a\x00b\ufffdc", (True, None))
@example("\u212b\u00c5\u037e\uf900가한글", (False, True))
def test_encodes_any_unicode_as_tokenizers(both, agree, text, options):
    mine, theirs = both[options]
    words = [word for word, _ in theirs.pre_tokenizer.pre_tokenize_str(theirs.normalizer.normalize_str(text))]
    agree(mine.normalise(text).split(" ") if words else [], words, tolerance=0, quantity="words, any Unicode")
    agree(mine.encode(text), theirs.encode(text).ids, tolerance=0, quantity="MiniLM, any Unicode")


@pytest.mark.verifies(WORDPIECE, against="tokenizers.Tokenizer")
def test_every_character_as_tokenizers(both, agree):
    mine, theirs = both[True, None]
    texts = [f"a{c} b{c}{c}\n'{c}" for c in settled[::5]]
    ids = [encoding.ids for encoding in theirs.encode_batch(texts)]
    agree(mine.encode_batch(texts), ids, tolerance=0, quantity="MiniLM, a fifth of all characters")


@pytest.mark.verifies(WORDPIECE, against="tokenizers.BertWordPieceTokenizer")
def test_pairs_and_segments_as_tokenizers(minilm, vocabulary, lines, agree):
    theirs = BertWordPieceTokenizer(vocab=vocabulary)
    for text, pair in pairwise(["", *lines[:40], ""]):
        encoding = theirs.encode(text, pair)
        ids = minilm.encode(text, pair, add_special=True)
        agree(ids, encoding.ids, tolerance=0, quantity="[CLS] text [SEP] pair [SEP]")
        agree(minilm.segments(ids), encoding.type_ids, tolerance=0, quantity="segments")
        assert minilm.encode(text, pair) == minilm.encode(text) + minilm.encode(pair)


@pytest.mark.verifies(WORDPIECE, against="tokenizers.decoders.WordPiece")
@unhurried
@given(st.lists(st.integers(0, 30_521), max_size=8))
def test_decodes_any_ids_as_tokenizers(both, agree, ids):
    mine, theirs = both[True, None]
    text = theirs.decode(ids, skip_special_tokens=False)
    agree(mine.decode(ids), text, tolerance=0, quantity="text of any ids")
    assert mine.decode(torch.tensor(ids, dtype=torch.long)) == text


@pytest.mark.verifies(f"{WORDPIECE}.train", against="enumeration")
@settings(unhurried, max_examples=60)
@given(st.lists(st.text("abc ", max_size=9), max_size=5), st.integers(1, 3))
@example(["hug hug pug pun bun hugs"], 1)
@example(["aaaaa aaaa", "abababa"], 1)
def test_training_recounts_to_the_same_pieces(agree, texts, min_count):
    """Each piece has the highest score of a full recount, in exact fractions."""
    words = [[word[0], *("##" + c for c in word[1:])] for text in texts for word in text.split()]
    expected = [*SPECIAL_TOKENS, *sorted(set(chain(*words)))]
    size = len(expected) + 12
    mine = WordPieceTokenizer.train(texts, size, min_count=min_count)
    while len(expected) < size:
        single = Counter(chain(*words))
        double = Counter(pair for word in words for pair in pairwise(word))
        scores = {
            (a, b): Fraction(count, single[a] * single[b])
            for (a, b), count in double.items()
            if count >= min_count
        }
        if not scores:
            break
        best = min(scores, key=lambda pair: (-scores[pair], *map(expected.index, pair)))
        words = [_join(word, best) for word in words]
        expected.append(best[0] + best[1][2:])
    agree(mine.pieces, expected, tolerance=0, quantity="pieces of a full recount")


def _join(word, pair):
    """The word with each occurrence of the pair, from the left, as one piece."""
    if len(word) < 2:
        return word
    if tuple(word[:2]) == pair:
        return [word[0] + word[1][2:], *_join(word[2:], pair)]
    return [word[0], *_join(word[1:], pair)]


def test_training_differs_from_byte_pair_encoding_and_may_be_held_to_frequent_pairs():
    text = "hug " * 10 + "pug " * 5 + "pun " * 12 + "bun " * 4 + "hugs " * 5
    alphabet = 5 + 7  # special tokens, then b h p ##g ##n ##s ##u
    assert WordPieceTokenizer.train([text], alphabet + 1).pieces[-1] == "##gs"
    assert WordPieceTokenizer.train([text], alphabet + 1, min_count=6).pieces[-1] == "##ug"  # 1/36, a tie


# Properties


def test_reads_the_longest_piece_first():
    mine = WordPieceTokenizer([*SPECIAL_TOKENS, "un", "unwant", "##want", "##ed", "##wanted", "b", "##c"])
    assert [mine.pieces[index] for index in mine.encode("unwanted")] == ["unwant", "##ed"]
    assert mine.decode(mine.encode("unwanted bc")) == "unwanted bc"
    assert mine.encode("bd") == mine.encode("x") == [1]  # one [UNK] for the whole word


@unhurried
@given(wild)
@example("[SEP] [UNK] [MASK] ##s")
def test_plain_text_gives_no_special_token_but_unknown(minilm, text):
    ids = minilm.encode(text)
    assert not set(ids) & {index for name, index in minilm.special_ids.items() if name != "[UNK]"}
    if minilm.special_ids["[UNK]"] not in ids:
        assert minilm.decode(ids) == minilm.normalise(text)
    assert minilm.normalise(minilm.normalise(text)) == minilm.normalise(text)


def test_special_tokens_are_not_found_inside_words():
    mine = WordPieceTokenizer([*SPECIAL_TOKENS, "CLS", "[", "]"], lowercase=False)
    assert mine.encode("[CLS]") == [6, 5, 7]


def test_long_words_are_unknown(vocabulary):
    mine = WordPieceTokenizer(vocabulary, max_word_length=5)
    assert mine.encode("aaaaa") != [100]
    assert mine.encode("aaaaaa") == [100]


def test_skips_special_tokens_on_request(minilm):
    ids = minilm.encode("Hello", "world", add_special=True)
    assert minilm.decode(ids) == "[CLS] hello [SEP] world [SEP]"
    assert minilm.decode(ids, skip_special=True) == "hello world"
    assert minilm.decode([]) == ""
    assert minilm.segments([]) == []


def test_training_stops_when_the_pairs_run_out():
    assert WordPieceTokenizer.train(["ab ab"], 1_000).pieces == (*SPECIAL_TOKENS, "##b", "a", "ab")
    assert WordPieceTokenizer.train([], 1_000).pieces == SPECIAL_TOKENS


def test_training_normalises_as_encoding_does(small):
    assert WordPieceTokenizer.train([VERSE.upper()] * 2, 60).pieces == small.pieces
    upper = WordPieceTokenizer.train(["É"], 10, lowercase=False, strip_accents=False)
    assert upper.pieces[-1] == "É"
    assert small.special_ids["[UNK]"] not in small.encode(VERSE)


def test_the_word_cache_is_bounded():
    mine = WordPieceTokenizer([*SPECIAL_TOKENS, "a", "##a"])
    mine._cache.limit = 10
    for length in range(1, 99):
        assert len(mine.encode("a" * length)) == length
        assert len(mine._cache) <= 10


# Files


def test_saves_and_loads(small, minilm, tmp_path):
    path = tmp_path / "wordpiece.json"
    plain = WordPieceTokenizer(small.pieces, lowercase=False, strip_accents=True, max_word_length=7)
    for mine in (small, minilm, plain, pickle.loads(pickle.dumps(small))):
        mine.save(path)
        loaded = WordPieceTokenizer.load(str(path))
        assert (loaded.pieces, loaded.special_ids) == (mine.pieces, mine.special_ids)
        for text in (VERSE, "Éé ÉCRIT commencement"):
            assert loaded.encode(text) == mine.encode(text)
    assert os.listdir(tmp_path) == ["wordpiece.json"]


@unhurried
@given(st.data())
def test_a_mutated_file_is_refused_or_the_same(small, tmp_path_factory, data):
    path = tmp_path_factory.mktemp("mutated") / "wordpiece.json"
    small.save(path)
    mutate(path, data)
    try:
        loaded = WordPieceTokenizer.load(path)
    except ValueError as error:
        assert str(path) in str(error)
    else:
        assert loaded.pieces == small.pieces


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "bpe"}, "format"),
        ({"version": 2}, "version 1"),
        ({"more": 1}, "fields"),
        ({"pieces": "ab"}, "pieces must be an iterable of strings"),
        ({"pieces": ["[UNK]", 3]}, r"pieces\[1\] must be a str"),
        ({"pieces": [*SPECIAL_TOKENS, "a", "a"]}, "pieces must be distinct"),
        ({"lowercase": 1}, "lowercase must be a bool"),
        ({"strip_accents": "no"}, "strip_accents must be a bool or None"),
        ({"max_word_length": 0}, "max_word_length must be at least 1"),
    ],
)
def test_an_inconsistent_file_with_a_right_checksum_is_refused(small, tmp_path, change, message):
    path = tmp_path / "wordpiece.json"
    small.save(path)
    content = json.loads(path.read_bytes()) | change
    del content["sha256"]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    path.write_text(json.dumps(content | {"sha256": digest}))
    with pytest.raises(ValueError, match=message) as caught:
        WordPieceTokenizer.load(path)
    assert str(path) in str(caught.value)


def test_reads_a_vocabulary_file_line_by_line(tmp_path):
    path = tmp_path / "vocab.txt"
    pieces = [*SPECIAL_TOKENS, "a", "\u2028", "é"]
    for end in ("\n", "\r\n"):
        path.write_bytes(end.join(pieces).encode() + end.encode())
        assert WordPieceTokenizer.from_vocabulary(str(path)).pieces == tuple(pieces)
    path.write_bytes(b"\xff\n")
    with pytest.raises(ValueError, match=r"vocab.txt is not a WordPiece vocabulary"):
        WordPieceTokenizer.from_vocabulary(path)
    with pytest.raises(FileNotFoundError):
        WordPieceTokenizer.from_vocabulary(tmp_path / "missing.txt")


# Bad input

T = WordPieceTokenizer


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda t: t.encode(b"bytes"), TypeError, "text must be a str, got bytes"),
        (lambda t: t.encode("a", 3), TypeError, "pair must be a str, got int"),
        (lambda t: t.encode("ab\ud83d"), ValueError, r"text .* lone surrogate U\+D83D at index 2"),
        (lambda t: t.encode_batch("text"), TypeError, "texts must be an iterable of strings, got one str"),
        (lambda t: t.encode_batch(["a", 3]), TypeError, r"texts\[1\] must be a str, got int"),
        (lambda t: t.normalise(3), TypeError, "text must be a str, got int"),
        (lambda t: t.decode([60]), ValueError, "ids must lie in 0 … 59, got 60"),
        (lambda t: t.decode([1.0]), TypeError, "ids must be a flat sequence of integers"),
        (lambda t: t.segments([-1]), ValueError, "ids must lie in 0 … 59, got -1"),
        (lambda t: T("abc"), TypeError, "pieces must be an iterable of strings, got one str"),
        (lambda t: T(["a"]), ValueError, r"pieces must hold \[UNK\], \[CLS\] and \[SEP\]"),
        (lambda t: T([*SPECIAL_TOKENS, ""]), ValueError, "pieces must be distinct and not empty, got ''"),
        (lambda t: T([*SPECIAL_TOKENS, "a" * 2_000]), ValueError, "at most 1024 characters, got one of 2000"),
        (lambda t: T(SPECIAL_TOKENS, lowercase=None), TypeError, "lowercase must be a bool, got NoneType"),
        (lambda t: T(SPECIAL_TOKENS, max_word_length=2.0), TypeError, "max_word_length must be an int"),
        (lambda t: T.train("text", 60), TypeError, "texts must be an iterable of strings, got one str"),
        (lambda t: T.train(["a"], 60.0), TypeError, "vocab_size must be an int, got float"),
        (lambda t: T.train(["a", None], 60), TypeError, r"texts\[1\] must be a str, got NoneType"),
        (lambda t: T.train(["abc"], 7), ValueError, "vocab_size must lie in 8 .* got 7"),
        (lambda t: T.train(["a"], 2 * MAX_VOCAB_SIZE), ValueError, "vocab_size must lie in 6 "),
        (lambda t: T.train(["a"], 60, min_count=0), ValueError, "min_count must be at least 1, got 0"),
        (lambda t: T.train(["a"], 60, lowercase=0), TypeError, "lowercase must be a bool"),
    ],
)
def test_refuses_bad_input(small, call, error, message):
    before = (small.pieces, small.special_ids)
    with pytest.raises(error, match=message):
        call(small)
    assert (small.pieces, small.special_ids) == before
