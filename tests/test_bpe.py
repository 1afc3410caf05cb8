"""Byte-level BPE: the same merges and ids as `tokenizers`, any string and back, files whole or refused."""

import base64
import gzip
import hashlib
import json
import os
import pickle
import random
import unicodedata
from collections import Counter
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
import regex
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from companion.data.assets import asset_path
from companion.data.translation import load_pairs
from companion.tokenizers import CL100K_PATTERN, GPT2_PATTERN, BPETokenizer
from companion.tokenizers.bpe import MAX_FILE_BYTES, MAX_TOKEN_BYTES, MAX_VOCAB_SIZE

SPECIAL = ("<pad>", "<bos>", "<eos>")
NUM_MERGES = 8_000
BPE = "companion.tokenizers.bpe.BPETokenizer"
unhurried = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
VERSE = "In the beginning, God created the heavens and the earth. Au commencement, Dieu créa les cieux."


def judge(texts, vocab_size, special=SPECIAL):
    """`tokenizers`' byte-level BPE, trained on the same texts."""
    theirs = Tokenizer(models.BPE())
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": list(special), "initial_alphabet": alphabet, "show_progress": False}
    theirs.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab_size, **options))
    return theirs


def merges_of(theirs):
    """The judge's merges as pairs of ids."""
    ids = theirs.get_vocab()
    return tuple((ids[left], ids[right]) for left, right in json.loads(theirs.to_str())["model"]["merges"])


def assert_same(mine, other):
    assert (mine.merges, mine.special_ids, mine.pattern) == (other.merges, other.special_ids, other.pattern)


@pytest.fixture(scope="module")
def pairs():
    return load_pairs()


@pytest.fixture(scope="module")
def corpus(pairs):
    """Every third training pair, both languages."""
    texts = [text for pair in pairs.train[::3] for text in (pair.source, pair.target)]
    assert sum(len(text.encode()) for text in texts) > 2_000_000
    return texts


@pytest.fixture(scope="module")
def trained(corpus):
    vocab_size = len(SPECIAL) + 256 + NUM_MERGES
    return BPETokenizer.train(corpus, vocab_size, SPECIAL), judge(corpus, vocab_size)


@pytest.fixture(scope="module")
def small():
    return BPETokenizer.train([VERSE] * 2, 300, SPECIAL)


# The judge


@pytest.mark.verifies(BPE, against="tokenizers.trainers.BpeTrainer")
def test_learns_the_merges_of_tokenizers(trained, agree):
    mine, theirs = trained
    assert len(mine.merges) == NUM_MERGES
    assert mine.vocab_size == theirs.get_vocab_size() == len(SPECIAL) + 256 + NUM_MERGES
    agree(mine.merges, merges_of(theirs), tolerance=0, quantity="8,000 merges, English and French")


@pytest.mark.verifies(BPE, against="tokenizers.trainers.BpeTrainer")
@unhurried
@given(st.lists(st.text("ab é\n", max_size=12), max_size=8), st.integers(0, 40))
@example(["aaaaaaaaa aaaa", "abababa"], 40)
def test_learns_the_merges_of_tokenizers_on_ties_and_runs(agree, texts, num_merges):
    mine = BPETokenizer.train(texts, 256 + num_merges)
    theirs = judge(texts, 256 + num_merges, special=())
    agree(mine.merges, merges_of(theirs), tolerance=0, quantity="merges of short texts with ties and runs")


@pytest.mark.verifies(BPE, against="tokenizers.Tokenizer")
@pytest.mark.parametrize("language", ["source", "target"])
def test_encodes_unseen_sentences_as_tokenizers(trained, pairs, agree, language):
    mine, theirs = trained
    texts = [getattr(pair, language) for pair in pairs.test]
    ids = [encoding.ids for encoding in theirs.encode_batch(texts)]
    agree(list(chain(*mine.encode_batch(texts))), list(chain(*ids)), tolerance=0, quantity="ids, unseen text")
    assert [len(sentence) for sentence in mine.encode_batch(texts)] == [len(sentence) for sentence in ids]


# `tokenizers` and `regex` may know different versions of Unicode: only characters that this Python knows too.
assigned = st.characters(exclude_categories=["Cs", "Cn"])
wild = st.text(st.one_of(assigned, st.sampled_from("ab' 12\n\t\r\u00a0é中\u0301")), max_size=60)


@pytest.mark.verifies(BPE, against="tokenizers.Tokenizer")
@unhurried
@given(wild)
def test_encodes_any_unicode_as_tokenizers(trained, agree, text):
    mine, theirs = trained
    agree(mine.encode(text), theirs.encode(text).ids, tolerance=0, quantity="ids, any Unicode")


@pytest.mark.verifies(BPE, against="tokenizers.Tokenizer")
def test_encodes_one_long_word_as_tokenizers(trained, agree):
    mine, theirs = trained
    text = regex.sub(r"\P{L}", "", " ".join([VERSE] * 40))
    assert len(text) > 2_000
    agree(mine.encode(text), theirs.encode(text).ids, tolerance=0, quantity="ids, one long word")


@pytest.mark.verifies(BPE, against="enumeration")
@unhurried
@given(st.lists(st.text("abc ", max_size=9), max_size=5))
def test_training_recounts_to_the_same_merges(agree, texts):
    """Every merge is the most frequent pair of a full recount, ties to the smaller ids."""
    mine = BPETokenizer.train(texts, 280)
    byte_ids = {mine.token_bytes(index): index for index in range(256)}
    words = [
        [byte_ids[bytes([byte])] for byte in word.encode()]
        for text in texts
        for word in regex.findall(GPT2_PATTERN, text)
    ]
    expected = []
    while len(expected) < 24 and (counts := Counter(pair for word in words for pair in pairwise(word))):
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        new = 256 + len(expected)
        expected.append(best)
        words = [_replace(word, best, new) for word in words]
    agree(mine.merges, expected, tolerance=0, quantity="merges of a full recount")


def _replace(word, pair, new):
    out = []
    for index in word:
        if out and (out[-1], index) == pair:
            out[-1] = new
        else:
            out.append(index)
    return out


# Vocabularies made elsewhere

CL100K_SPECIAL = {"<|endoftext|>": 100257, "<|fim_prefix|>": 100258, "<|endofprompt|>": 100276}


def tiktoken_of(ranks, special_tokens, pattern=r"\S+|\s+"):
    import tiktoken

    return tiktoken.Encoding(
        "judge", pat_str=pattern, mergeable_ranks=ranks, special_tokens=dict(special_tokens)
    )


@pytest.fixture(scope="module")
def cl100k():
    from tiktoken_ext import openai_public

    lines = gzip.decompress(asset_path("cl100k").read_bytes()).splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}
    with pytest.MonkeyPatch.context() as patch:  # the published pattern, without the download of the ranks
        patch.setattr(openai_public, "load_tiktoken_bpe", lambda *_, **__: ranks)
        pattern = openai_public.cl100k_base()["pat_str"]
    mine = BPETokenizer.from_ranks(asset_path("cl100k"), CL100K_PATTERN, CL100K_SPECIAL)
    return mine, tiktoken_of(ranks, CL100K_SPECIAL, pattern)


@pytest.fixture(scope="module")
def metadata():
    """SmolLM2's, as `gguf` reads it."""
    import gguf

    fields = gguf.GGUFReader(asset_path("smollm2")).fields
    return {name: field.contents() for name, field in fields.items() if name.startswith("tokenizer.")}


@pytest.fixture(scope="module")
def smollm(metadata):
    theirs = Tokenizer(
        models.BPE(
            {token: index for index, token in enumerate(metadata["tokenizer.ggml.tokens"])},
            [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]],
        )
    )
    theirs.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return BPETokenizer.from_gguf(metadata), theirs


@pytest.fixture(scope="module")
def lines(pairs):
    """English, French, random Chinese, and this book's own code with its numbers and indentation."""
    draw = random.Random(0)
    chinese = [
        "".join(
            draw.choice("，。！ a1") if draw.random() < 0.1 else chr(draw.randint(0x4E00, 0x9FFF))
            for _ in "x" * 20
        )
        for _ in range(1_000)
    ]
    code = [path.read_text("utf-8") for path in sorted(Path(__file__).parent.glob("*.py"))[:8]]
    return [text for pair in pairs.train[:2_000] for text in (pair.source, pair.target)] + chinese + code


@pytest.mark.verifies("companion.tokenizers.bpe.BPETokenizer.from_ranks", against="tiktoken.Encoding")
def test_encodes_with_cl100k_as_tiktoken(cl100k, lines, agree):
    mine, theirs = cl100k
    ids = [theirs.encode_ordinary(text) for text in lines]
    agree(mine.encode_batch(lines), ids, tolerance=0, quantity="cl100k, lines in three languages and code")
    assert [mine.decode(line) for line in ids] == lines
    assert mine.vocab_size == theirs.n_vocab == 100_277


# The judges' tables of characters are older than this Python's: only what has not changed since Unicode 3.2.
settled = [
    chr(code)
    for code in range(0x30000)
    if unicodedata.ucd_3_2_0.category(chr(code)) == unicodedata.category(chr(code)) not in ("Cn", "Cs")
]
mixed = st.text(
    st.one_of(st.sampled_from(settled), st.sampled_from("ab'sSTtLl 12\n\t\r\u00a0é中\u0301\u017f")),
    max_size=40,
)


@pytest.mark.verifies("companion.tokenizers.bpe.BPETokenizer.from_ranks", against="tiktoken.Encoding")
@unhurried
@given(mixed)
@example(" \n")
@example("a \n\n  b'Tis 1234567\r\n ")
@example("<|endoftext|>")
def test_encodes_any_unicode_with_cl100k_as_tiktoken(cl100k, agree, text):
    mine, theirs = cl100k
    ids = mine.encode(text)
    agree(ids, theirs.encode_ordinary(text), tolerance=0, quantity="cl100k, any Unicode")
    assert mine.decode(ids) == text
    assert not set(ids) & set(CL100K_SPECIAL.values())


@pytest.mark.verifies("companion.tokenizers.bpe.BPETokenizer.from_ranks", against="tiktoken.Encoding")
@settings(unhurried, max_examples=50)
@given(
    st.lists(st.text("abc", min_size=2, max_size=4), unique=True, max_size=12), st.text("abc ", max_size=14)
)
@example(["abc", "ab"], "abc")  # the whole word is the only way to a token that no merge reaches first
@example(["abcd", "bc"], "abcd abc")
def test_encodes_with_any_ranks_as_tiktoken(agree, tokens, text):
    ranks = {bytes([byte]): byte for byte in range(256)}
    ranks |= {token.encode(): 300 - number for number, token in enumerate(tokens)}
    mine = BPETokenizer.from_ranks(ranks, r"\S+|\s+", {"<s>": 302})
    theirs = tiktoken_of(ranks, {"<s>": 302})
    agree(mine.encode(text), theirs.encode_ordinary(text), tolerance=0, quantity="random ranks")


@pytest.mark.verifies("companion.tokenizers.bpe.BPETokenizer.from_gguf", against="tokenizers.Tokenizer")
def test_encodes_with_smollm2_as_tokenizers(smollm, lines, agree):
    mine, theirs = smollm
    ids = [encoding.ids for encoding in theirs.encode_batch(lines)]
    agree(mine.encode_batch(lines), ids, tolerance=0, quantity="SmolLM2, lines in three languages and code")
    assert [mine.decode(line) for line in ids] == lines
    assert mine.vocab_size == 49_152
    assert mine.special_ids["<|im_start|>"] == 1


@pytest.mark.verifies("companion.tokenizers.bpe.BPETokenizer.from_gguf", against="tokenizers.Tokenizer")
@unhurried
@given(mixed)
@example("a  1  \n2Ⅷ½ b '1s <|im_end|>")
@example("a\x04b\U00050000c")  # bytes that SmolLM2's vocabulary lacks
def test_encodes_any_unicode_with_smollm2_as_tokenizers(smollm, agree, text):
    mine, theirs = smollm
    ids = mine.encode(text)
    agree(ids, theirs.encode(text).ids, tolerance=0, quantity="SmolLM2, any Unicode")
    assert not set(ids) & set(mine.special_ids.values())


def test_bytes_that_a_vocabulary_lacks_leave_no_token(smollm):
    mine, _ = smollm
    lacking = [code for code in range(128) if not mine.encode(chr(code))]
    assert lacking == [0x04, 0x06, 0x13, 0x14, 0x16, 0x1D]
    assert mine.decode(mine.encode("a\x04b")) == "ab"


@pytest.mark.parametrize("source", ["cl100k", "smollm"])
def test_saves_and_loads_vocabularies_made_elsewhere(source, request, lines, tmp_path):
    mine, _ = request.getfixturevalue(source)
    mine.save(tmp_path / "bpe.json")
    loaded = BPETokenizer.load(tmp_path / "bpe.json")
    assert_same(loaded, mine)
    assert loaded.encode_batch(lines[:200]) == mine.encode_batch(lines[:200])
    assert loaded.vocab_size == mine.vocab_size


def test_an_id_that_is_no_token_is_refused(cl100k):
    mine, _ = cl100k
    assert mine.decode([100_257, 64], skip_special=True) == mine.decode([64])
    assert mine.decode([100_257, 64]) == "<|endoftext|>a"
    for call in (lambda: mine.decode([64, 100_256]), lambda: mine.token_bytes(100_256)):
        with pytest.raises(ValueError, match="ids must be those of tokens, got 100256, which is none"):
            call()


BYTES = {bytes([byte]): byte for byte in range(256)}


@pytest.mark.parametrize(
    ("ranks", "special_tokens", "error", "message"),
    [
        ({}, {}, ValueError, "ranks must hold all 256 bytes"),
        (BYTES | {b"ab": 3}, {}, ValueError, "ranks must be distinct, got 3 twice"),
        (BYTES | {b"ab": -1}, {}, ValueError, "ranks must lie in 0 … .* got -1"),
        (BYTES | {b"ab": 10**9}, {}, ValueError, "ranks must lie in 0 … .* got 1000000000"),
        (BYTES | {b"a" * 2_000: 256}, {}, ValueError, "1 to 1024 bytes"),
        (BYTES | {b"": 256}, {}, ValueError, "1 to 1024 bytes"),
        (BYTES | {"ab": 256}, {}, TypeError, "ranks must map bytes to ints"),
        (BYTES | {b"ab": 256.0}, {}, TypeError, "ranks must map bytes to ints"),
        (7, {}, TypeError, "ranks must be a mapping or a path, got int"),
        (BYTES, ["<s>"], TypeError, "special_tokens must be a mapping, got list"),
        (BYTES, {"<s>": 5}, ValueError, "special_tokens must have ids of their own, got 5"),
        (BYTES, {"<s>": 300, "<e>": 300}, ValueError, "special_tokens must be distinct, got 300 twice"),
        (BYTES, {"<s>": -1}, ValueError, "special_tokens must lie in 0"),
        (BYTES, {"<s>": "a"}, TypeError, "special_tokens must map names to ints"),
        (BYTES, {"": 300}, ValueError, "special_tokens must be distinct and not empty"),
    ],
)
def test_refuses_bad_ranks(ranks, special_tokens, error, message):
    with pytest.raises(error, match=message):
        BPETokenizer.from_ranks(ranks, GPT2_PATTERN, special_tokens)


@pytest.mark.parametrize(
    "data",
    [
        b"YQ== x",
        b"YQ==",
        b"Y 1",
        b"YQ== 1\nYQ== 2",
        b"\x1f\x8b\x08",
        gzip.compress(b"YQ== 1", mtime=0)[:-4],
        b"YQ== -1",
    ],
)
def test_refuses_a_bad_file_of_ranks(tmp_path, data):
    path = tmp_path / "ranks.tiktoken"
    path.write_bytes(data)
    with pytest.raises(ValueError, match="is not a file of ranks") as caught:
        BPETokenizer.from_ranks(path, GPT2_PATTERN)
    assert str(path) in str(caught.value)


def test_reads_a_plain_file_of_ranks(tmp_path):
    path = tmp_path / "ranks.tiktoken"
    tokens = [*BYTES, b"ab"]
    path.write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(tokens)))
    assert BPETokenizer.from_ranks(str(path), GPT2_PATTERN).encode("aab") == [97, 256]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": "llama"}, ValueError, "tokenizer.ggml.model 'gpt2' .* got 'llama'"),
        ({"pre": "qwen2"}, ValueError, "tokenizer.ggml.pre must be one of gpt-2, smollm, got 'qwen2'"),
        ({"tokens": None}, TypeError, "tokenizer.ggml.tokens must be an iterable of strings"),
        ({"tokens": ["a", "b", "b"]}, ValueError, "tokenizer.ggml.tokens must be distinct"),
        ({"tokens": ["a", "b", " "]}, ValueError, r"tokens\[2\] must be written in GPT-2's 256 characters"),
        ({"tokens": ["a", "b", ""]}, ValueError, "1 to 1024 bytes"),
        ({"token_type": [1]}, ValueError, "token_type must have 3 entries, got 1"),
        ({"token_type": 1}, TypeError, "token_type must be a sequence, got int"),
        ({"merges": ["a c"]}, ValueError, r"merges\[0\] must be two tokens, got 'a c'"),
        ({"merges": ["a b b"]}, ValueError, r"merges\[0\] must be two tokens"),
        ({"merges": ["b a"]}, ValueError, r"merges\[0\] must make a token"),
        ({"merges": ["a b", "a b"]}, ValueError, "merges must be distinct"),
        ({"token_type": [1, 3, 1]}, ValueError, r"merges\[0\] must join two tokens"),
    ],
)
def test_refuses_bad_gguf_metadata(change, error, message):
    good = {"model": "gpt2", "pre": "smollm", "tokens": ["a", "b", "ab"], "merges": ["a b"]}
    named = {f"tokenizer.ggml.{name}": value for name, value in (good | change).items()}
    with pytest.raises(error, match=message):
        BPETokenizer.from_gguf(named)


# Properties


@unhurried
@given(st.text())
@example("")
@example("<pad><bos>")
@example("\x00\x1c\x85\u2028 \ufeff\U0010ffff")
def test_round_trips_any_string(small, text):
    ids = small.encode(text)
    assert small.decode(ids) == text
    assert small.encode_batch([text, "x", text]) == [ids, small.encode("x"), ids]
    assert all(index >= len(SPECIAL) for index in ids)
    assert b"".join(map(small.token_bytes, ids)) == text.encode()


PATTERNS = ["", "a*", r"\w+", r"(?r)\p{L}+| ", r"a\Kb", "(?<=b)c", ".", r"\n", "(?i:ab)|c"]


@unhurried
@given(st.sampled_from(PATTERNS), st.text("abcé \n", max_size=12))
def test_round_trips_with_any_pattern(pattern, text):
    mine = BPETokenizer.train([text, "abc\nab"], 262, ["<s>"], pattern)
    assert mine.decode(mine.encode(text)) == text


@unhurried
@given(st.lists(st.integers(0, 299), max_size=40))
def test_decodes_any_ids(small, ids):
    text = small.decode(ids)
    assert text == b"".join(map(small.token_bytes, ids)).decode("utf-8", errors="replace")
    assert small.decode(torch.tensor(ids, dtype=torch.long)) == small.decode(np.array(ids, int)) == text
    assert small.decode(ids, skip_special=True) == small.decode([index for index in ids if index >= 3])


def test_ids_are_special_tokens_then_bytes_then_merges(small):
    assert small.special_ids == {"<pad>": 0, "<bos>": 1, "<eos>": 2}
    assert {small.token_bytes(index) for index in range(3, 259)} == {bytes([byte]) for byte in range(256)}
    assert small.vocab_size == 300 == 259 + len(small.merges)
    for new, (left, right) in enumerate(small.merges, start=259):
        assert small.token_bytes(new) == small.token_bytes(left) + small.token_bytes(right)


def test_special_tokens_are_written_by_id_only(small):
    ids = [1, *small.encode("<eos>"), 2]
    assert small.decode(ids) == "<bos><eos><eos>"
    assert small.decode(ids, skip_special=True) == "<eos>"
    names = BPETokenizer.train(["<s><s><s>"], 300, ["<s>"])
    assert 0 not in names.encode("<s><s>")


def test_a_character_cut_in_two_decodes_to_the_replacement_character(small):
    ids = small.encode("中")
    assert len(ids) == 3
    assert small.decode(ids[:2] + small.encode("a")) == "\ufffda"


def test_training_stops_when_the_pairs_run_out():
    assert BPETokenizer.train(["ab ab"], 1_000).vocab_size == 256 + 2  # "ab", then " ab"
    assert BPETokenizer.train([], 1_000).vocab_size == 256
    assert BPETokenizer.train(["ab"], 256).merges == ()


def test_training_makes_no_token_longer_than_a_file_may_hold():
    mine = BPETokenizer.train(["a" * 10_000], 300)
    assert max(len(mine.token_bytes(index)) for index in range(mine.vocab_size)) == MAX_TOKEN_BYTES
    assert mine.decode(mine.encode("a" * 5_000)) == "a" * 5_000


def test_a_generator_of_texts_is_read_once():
    assert BPETokenizer.train((text for text in [VERSE, VERSE]), 300, SPECIAL).vocab_size == 300


def test_the_word_cache_is_bounded():
    mine = BPETokenizer.train([VERSE], 280)
    mine._cache.limit = 10
    for number in range(50):
        text = f"word{number} {'long' * 50}{number}"
        assert mine.decode(mine.encode(text)) == text
        assert len(mine._cache) <= 10
        assert max(map(len, mine._cache)) <= mine._cache.longest


def test_pickles(small):
    copy = pickle.loads(pickle.dumps(small))
    assert_same(copy, small)
    assert copy.encode(VERSE) == small.encode(VERSE)


def test_what_it_hands_out_cannot_change_it(small):
    small.special_ids["<pad>"] = 99
    assert small.special_ids["<pad>"] == 0


# Files


def test_saves_and_loads(small, tmp_path):
    path = tmp_path / "bpe.json"
    for mine in (small, BPETokenizer([], ["<é\n>"], r"\S+"), BPETokenizer([])):
        mine.save(path)
        loaded = BPETokenizer.load(str(path))
        assert_same(loaded, mine)
        assert loaded.encode(VERSE) == mine.encode(VERSE)
    assert os.listdir(tmp_path) == ["bpe.json"]


def saved(tokenizer, folder):
    path = folder / "bpe.json"
    tokenizer.save(path)
    return path


@unhurried
@given(st.data())
def test_a_mutated_file_is_refused_or_the_same(small, tmp_path_factory, data):
    path = saved(small, tmp_path_factory.mktemp("mutated"))
    whole = path.read_bytes()
    start = data.draw(st.integers(0, len(whole)))
    end = data.draw(st.integers(start, min(start + 20, len(whole))))
    path.write_bytes(whole[:start] + data.draw(st.binary(max_size=20)) + whole[end:])
    try:
        loaded = BPETokenizer.load(path)
    except ValueError as error:
        assert str(path) in str(error)
    else:
        assert_same(loaded, small)


def test_a_file_cut_at_any_byte_is_refused(tmp_path):
    path = saved(BPETokenizer.train([VERSE], 262, SPECIAL), tmp_path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="not a whole BPETokenizer file"):
            BPETokenizer.load(path)


FAULTS = {
    "another format": ({"format": "wordpiece"}, "format"),
    "another version": ({"version": 2}, "version"),
    "an unknown field": ({"more": 1}, "fields"),
    "merges no list": ({"merges": {}}, "must be lists"),
    "special tokens no list": ({"special_tokens": "<pad>"}, "must be lists"),
    "special token no string": ({"special_tokens": [0, "<bos>", "<eos>"]}, r"special_tokens\[0\]"),
    "special token twice": ({"special_tokens": ["<pad>", "<pad>", "<eos>"]}, "distinct"),
    "special token half a character": ({"special_tokens": ["\ud800", "a", "b"]}, "surrogate"),
    "special token too long": ({"special_tokens": ["a" * 2000, "b", "c"]}, "at most 1024 bytes"),
    "pattern no string": ({"pattern": None}, "pattern must be a str"),
    "pattern malformed": ({"pattern": "(a"}, "pattern must be a regular expression"),
    "pattern with a group": ({"pattern": "(a)"}, "capturing group"),
    "pattern nested too deep": ({"pattern": "(?:" * 3000 + ")" * 3000}, "pattern"),
    "pattern too long": ({"pattern": "a" * 20_000}, "at most 10000 characters"),
    "merge of one": ({"merges": [[3]]}, r"merges\[0\] must be a pair"),
    "merge of a float": ({"merges": [[3, 4.0]]}, r"merges\[0\] must be a pair"),
    "merge of a bool": ({"merges": [[3, True]]}, r"merges\[0\] must be a pair"),
    "merge of a special token": ({"merges": [[3, 2]]}, r"merges\[0\] must join"),
    "merge of a negative id": ({"merges": [[3, -1]]}, r"merges\[0\] must join"),
    "merge of itself": ({"merges": [[3, 4], [3, 260]]}, r"merges\[1\] must join"),
    "merge twice": ({"merges": [[3, 4], [3, 4]]}, "second time"),
    "a token that doubles without end": (
        {"merges": [[3, 3], *([n, n] for n in range(259, 300))]},
        "1024 bytes",
    ),
    "too many merges": ({"merges": [[3, 4]] * MAX_VOCAB_SIZE}, "at most"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_inconsistent_file_with_a_right_checksum_is_refused(small, tmp_path, fault):
    path = saved(small, tmp_path)
    change, message = FAULTS[fault]
    content = json.loads(path.read_bytes()) | change
    del content["sha256"]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    path.write_text(json.dumps(content | {"sha256": digest}))
    with pytest.raises(ValueError, match=message) as caught:
        BPETokenizer.load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": {}}, "tokens must be a list"),
        ({"tokens": [1]}, "bytes-like object or ASCII string"),
        ({"tokens": ["YQ==", "YQ=="]}, "tokens must be distinct"),
        ({"tokens": ["Y"]}, "padding|base64"),
        ({"tokens": [None] * (MAX_VOCAB_SIZE + 1)}, "tokens must be at most"),
        ({"merges": [[0, 9]]}, r"merges\[0\] must join two tokens"),
        ({"merges": [[0, -1]]}, r"merges\[0\] must join two tokens"),
        ({"merges": [[0, "a"]]}, r"merges\[0\] must be a pair of ints"),
        ({"special_tokens": ["<s>"]}, "special_tokens must be an object"),
        ({"special_tokens": {"<s>": 0}}, "special_tokens must have ids of their own"),
        ({"version": 3}, "version 1, 2"),
    ],
)
def test_an_inconsistent_file_of_foreign_ids_is_refused(tmp_path, change, message):
    content = {"format": "companion.tokenizers.bpe", "version": 2, "pattern": GPT2_PATTERN}
    content |= {"tokens": ["YQ==", "Yg=="], "special_tokens": {"<s>": 2}, "merges": None} | change
    digest = hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    path = tmp_path / "bpe.json"
    path.write_text(json.dumps(content | {"sha256": digest}))
    with pytest.raises(ValueError, match=message) as caught:
        BPETokenizer.load(path)
    assert str(path) in str(caught.value)


FOREIGN = [
    b"",
    b"null",
    b"[]",
    b"{}",
    b"\xff\xfe",
    b"[" * 100_000,
    b'{"sha256":' * 50_000,
    b"1" * 10_000,
    b"NaN",
]


@pytest.mark.parametrize("data", [*FOREIGN, b" " * (MAX_FILE_BYTES + 1)], ids=lambda data: repr(data[:12]))
def test_a_foreign_file_is_refused(tmp_path, data):
    path = tmp_path / "foreign.json"
    path.write_bytes(data)
    with pytest.raises(ValueError, match="not a whole BPETokenizer file"):
        BPETokenizer.load(path)


def test_a_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        BPETokenizer.load(tmp_path / "missing.json")


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_an_interrupted_save_leaves_the_old_file_whole(small, tmp_path, monkeypatch, step):
    path = saved(small, tmp_path)

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, step, stop)
    with pytest.raises(KeyboardInterrupt):
        BPETokenizer([]).save(path)
    assert_same(BPETokenizer.load(path), small)
    assert os.listdir(tmp_path) == ["bpe.json"]


def test_a_vocabulary_that_load_would_refuse_is_not_saved(tmp_path):
    names = (f"{number:01000d}" for number in range(20_000))
    with pytest.raises(ValueError, match="special_tokens must fit a file"):
        BPETokenizer([], names).save(tmp_path / "bpe.json")
    assert os.listdir(tmp_path) == []


# Bad input


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda t: t.encode(b"bytes"), TypeError, "text must be a str, got bytes"),
        (lambda t: t.encode(None), TypeError, "text must be a str, got NoneType"),
        (lambda t: t.encode("ab\ud83d c"), ValueError, r"text .* lone surrogate U\+D83D at index 2"),
        (lambda t: t.encode_batch("text"), TypeError, "texts must be an iterable of strings, got one str"),
        (lambda t: t.encode_batch(3), TypeError, "texts must be an iterable of strings, got one int"),
        (lambda t: t.encode_batch(["a", 3]), TypeError, r"texts\[1\] must be a str, got int"),
        (lambda t: t.encode_batch(["a", "\udc00"]), ValueError, r"texts\[1\] .* U\+DC00 at index 0"),
        (lambda t: t.decode([3, 300]), ValueError, "ids must lie in 0 … 299, got 300"),
        (lambda t: t.decode([-1]), ValueError, "ids must lie in 0 … 299, got -1"),
        (lambda t: t.decode([1.0]), TypeError, "ids must be a flat sequence of integers"),
        (lambda t: t.decode("ab"), TypeError, "ids must be a flat sequence of integers"),
        (lambda t: t.decode(5), TypeError, "ids must be a flat sequence of integers"),
        (lambda t: t.decode([[1, 2]]), TypeError, "ids must be a flat sequence of integers"),
        (lambda t: t.decode(torch.zeros(2, 2)), TypeError, "ids must be a flat sequence of integers"),
        (lambda t: t.token_bytes(300), ValueError, "ids must lie in 0 … 299, got 300"),
        (lambda t: t.train("text", 300), TypeError, "texts must be an iterable of strings, got one str"),
        (lambda t: t.train(None, 300), TypeError, "texts must be an iterable of strings, got one NoneType"),
        (lambda t: t.train(["a", None], 300), TypeError, r"texts\[1\] must be a str, got NoneType"),
        (lambda t: t.train(["\ud800"], 300), ValueError, r"texts\[0\] .* U\+D800"),
        (lambda t: t.train(["a"], 258, SPECIAL), ValueError, "vocab_size must lie in 259 .* got 258"),
        (lambda t: t.train(["a"], 10**9), ValueError, "vocab_size must lie in 256 .* got 1000000000"),
        (lambda t: t.train(["a"], 300.0), TypeError, "vocab_size must be an integer, got float"),
        (lambda t: t.train(["a"], 300, "<pad>"), TypeError, "special_tokens must be .* got one str"),
        (lambda t: t.train(["a"], 300, ["<s>", "<s>"]), ValueError, "special_tokens must be distinct"),
        (lambda t: t.train(["a"], 300, [""]), ValueError, "special_tokens must be distinct and not empty"),
        (lambda t: t.train(["a"], 300, [], "["), ValueError, "pattern must be a regular expression"),
        (lambda t: t.train(["a"], 300, [], b"a"), TypeError, "pattern must be a str, got bytes"),
        (lambda t: BPETokenizer([(0, 256)]), ValueError, r"merges\[0\] must join .* 0 … 255, got \(0, 256\)"),
        (lambda t: BPETokenizer(["ab"]), TypeError, r"merges\[0\] must be a pair of ints"),
        (lambda t: BPETokenizer(7), TypeError, "merges must be an iterable of pairs, got int"),
    ],
)
def test_refuses_bad_input(small, call, error, message):
    before = (small.merges, small.special_ids, small.vocab_size)
    with pytest.raises(error, match=message):
        call(small)
    assert (small.merges, small.special_ids, small.vocab_size) == before
