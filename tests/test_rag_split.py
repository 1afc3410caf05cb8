"""companion.rag.split: nothing lost, nothing doubled, offsets exact; beside libraries and hand-cut text."""

import itertools
import time

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from companion.data.assets import asset_path
from companion.data.translation import read_verses
from companion.rag.load import Document
from companion.rag.split import (
    Passage,
    headings,
    sentences,
    split_characters,
    split_headings,
    split_semantic,
    split_sentences,
    split_tokens,
    token_spans,
)
from companion.tokenizers import BPETokenizer, UnigramTokenizer, WordPieceTokenizer
from companion.tokenizers.bpe import GPT2_PATTERN

MODULE = "companion.rag.split."
TRAINING = ["In the beginning was the Word. 太初有道，道与神同在！ Ça va? Émile's café: 12,345 words."] * 3
BPE = BPETokenizer.train(TRAINING, 300, pattern=GPT2_PATTERN)
WORD_PIECE = WordPieceTokenizer.train(TRAINING, 90)
UNIGRAM = UnigramTokenizer.train(TRAINING, 80)
TOKENIZERS = [BPE, WORD_PIECE, UNIGRAM]


def encode(texts):
    """A vector for each text: how often it has each of eight kinds of letters."""
    return np.array([[sum(ord(c) % 8 == k for c in text) + 0.1 for k in range(8)] for text in texts])


texts = st.one_of(
    st.text(max_size=150),
    st.lists(
        st.sampled_from(
            [
                "word",
                "Word. ",
                " ",
                "\n",
                "\n\n",
                "# Title\n",
                "```\n",
                "===\n",
                "Mr. ",
                "。",
                "道",
                "é",
                "🙂",
                "?! ",
            ]
        ),
        max_size=60,
    ).map("".join),
)
sizes = st.integers(1, 40).flatmap(lambda size: st.tuples(st.just(size), st.integers(0, size - 1)))
SPLITTERS = {
    "characters": split_characters,
    "windows": lambda d, size, overlap: split_characters(d, size, overlap, separators=()),
    "sentences": split_sentences,
    "headings": split_headings,
    "semantic": lambda d, size, overlap: split_semantic(d, encode, size, overlap, share=0.2),
    "bpe": lambda d, size, overlap: split_tokens(d, BPE, size, overlap),
    "wordpiece": lambda d, size, overlap: split_tokens(d, WORD_PIECE, size, overlap),
    "unigram": lambda d, size, overlap: split_tokens(d, UNIGRAM, size, overlap),
}


def spans(passages):
    return [(passage.start, passage.end) for passage in passages]


# Properties of all splitters


@pytest.mark.parametrize("name", SPLITTERS)
@settings(deadline=None)
@given(text=texts, window=sizes)
@example(text="a" * 100, window=(7, 6))
@example(text="\n\n \n\n", window=(1, 0))
@example(text="🙂🙂", window=(1, 0))
def test_nothing_is_lost_or_doubled_and_offsets_are_exact(name, text, window):
    size, overlap = window
    document = Document("folder/a.md", text, {"kind": "markdown"})
    passages = SPLITTERS[name](document, size, overlap)
    assert passages == SPLITTERS[name](Document("folder/a.md", text, {"kind": "markdown"}), size, overlap)
    covered = np.zeros(len(text), int)
    for passage in passages:
        assert passage.text == text[passage.start : passage.end] and passage.text.strip()
        assert (
            passage.id == f"folder/a.md#{passage.start}-{passage.end}" and passage.document == "folder/a.md"
        )
        assert passage.metadata["kind"] == "markdown"
        covered[passage.start : passage.end] += 1
    assert not "".join(c for c, times in zip(text, covered, strict=True) if not times).strip()
    for before, after in itertools.pairwise(passages):
        assert before.start < after.start and before.end < after.end
    in_tokens = name in ("bpe", "wordpiece", "unigram")
    for before, after in itertools.pairwise(passages):
        shared = text[after.start : before.end] if after.start < before.end else ""
        if not in_tokens:
            assert len(shared) <= overlap
        elif overlap == 0:
            assert not shared
    if not in_tokens:
        assert all(len(passage.text) <= size for passage in passages)


@pytest.mark.parametrize("name", SPLITTERS)
def test_a_megabyte_on_one_line_takes_seconds(name):
    if name in ("wordpiece", "unigram"):
        lines = ["word " * 20_000]
    elif name == "bpe":
        lines = ["word! " * 170_000]
    else:
        lines = ["a" * 10**6, "!" * 10**6 + "x", "\n" * 10**6, " " * 10**6 + "x", "a. " * 30_000]
    start = time.process_time()
    for line in lines:
        if name == "semantic":
            split_semantic(Document("a", line), lambda texts: np.ones((len(texts), 2)), 1000, 100)
        else:
            SPLITTERS[name](Document("a", line), 1000, 100)
    assert time.process_time() - start < 20


# Characters


@pytest.mark.verifies("companion.rag.split.split_characters", against="windows by enumeration")
def test_windows(agree):
    text = "".join(chr(97 + i % 26) for i in range(103))
    for size, overlap in [(10, 0), (10, 3), (7, 6), (200, 5), (1, 0)]:
        theirs = [
            (i, min(i + size, 103)) for i in range(0, 103, size - overlap) if i == 0 or i + overlap < 103
        ]
        mine = spans(split_characters(Document("a", text), size, overlap, separators=()))
        agree(sum(mine, ()), sum(theirs, ()), tolerance=0, quantity="offsets of windows")


def test_characters_break_at_paragraphs_then_lines_then_words():
    text = "One two three.\n\nFour five six seven.\nEight nine ten eleven twelve."
    found = [passage.text for passage in split_characters(Document("a", text), 24)]
    assert found == ["One two three.\n\n", "Four five six seven.\n", "Eight nine ten eleven ", "twelve."]
    found = [passage.text for passage in split_characters(Document("a", text), 24, 8)]
    assert found[:2] == ["One two three.\n\n", "three.\n\nFour five six "]


# Sentences

HAND_CUT = [
    ["He came. ", "She saw! ", "Did they? ", "Yes."],
    ["Dr. Smith and Mr. J. R. Jones met e.g. Mrs. Lee. ", "They spoke."],
    ['"Stop!" she said. ', "“Why?” ", "He left (at 3.5 km/h.) ", "End"],
    ["太初有道。", "道与神同在！", "「谁？」", "他说"],
    ["A title without a stop\n\n", "Then text. ", "More… ", "Last"],
    ["It costs 3.14 dollars... or so. ", "See www.example.org now. ", "Bye"],
    ["Ends.\n\n", "lower case begins a paragraph."],
    ["   Leading space. ", "Then.   "],
]


@pytest.mark.verifies("companion.rag.split.sentences", against="sentences cut by hand")
@pytest.mark.parametrize("parts", HAND_CUT)
def test_sentences(parts, agree):
    text = "".join(parts)
    agree([text[a:b] for a, b in sentences(text)], parts, tolerance=0, quantity="sentences")


def _greedy(lengths, size, overlap):
    """Whole sentences by the definition, tried one by one."""
    first, runs = 0, []
    while True:
        last = first + 1
        while last < len(lengths) and sum(lengths[first : last + 1]) <= size:
            last += 1
        runs.append((first, last))
        if last == len(lengths):
            return runs
        starts = (
            i
            for i in range(first + 1, last + 1)
            if sum(lengths[i:last]) <= overlap and sum(lengths[i : last + 1]) <= size
        )
        first = next(starts)


@pytest.mark.verifies("companion.rag.split.split_sentences", against="trial of every run of sentences")
def test_sentences_are_packed(agree):
    verses = [english for english, _ in itertools.islice(read_verses().values(), 40)]
    text = " ".join(verses)
    found = [b - a for a, b in sentences(text)]
    edges = np.cumsum([0, *found]).tolist()
    assert max(found) < 400
    for size, overlap in [(400, 0), (700, 250), (1000, 999)]:
        mine = spans(split_sentences(Document("a", text), size, overlap))
        theirs = [(edges[a], edges[b]) for a, b in _greedy(found, size, overlap)]
        agree(sum(mine, ()), sum(theirs, ()), tolerance=0, quantity="offsets of passages")


# Tokens


@pytest.fixture(scope="module")
def mixed():
    verses = list(itertools.islice(read_verses().values(), 30))
    english, french = (" ".join(column) for column in zip(*verses, strict=True))
    return f"{english}\n\n{french} 太初有道，道与神同在。🙂 naïve café"


@pytest.mark.verifies("companion.rag.split.token_spans", against="tokenizers.Tokenizer.encode, offsets")
def test_byte_level_offsets(mixed, agree):
    from tokenizers import Tokenizer, models, pre_tokenizers

    from companion.tokenizers.bpe import _CHARACTERS, BYTE_ORDER

    written = dict(zip(BYTE_ORDER, _CHARACTERS, strict=True))
    names = ["".join(written[byte] for byte in BPE.token_bytes(i)) for i in range(BPE.vocab_size)]
    theirs = Tokenizer(
        models.BPE({name: i for i, name in enumerate(names)}, [(names[a], names[b]) for a, b in BPE.merges])
    )
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False)
    expected = theirs.encode(mixed)
    assert expected.ids == BPE.encode(mixed)
    mine = token_spans(mixed, BPE)
    agree(sum(mine, ()), sum(expected.offsets, ()), tolerance=0, quantity="offsets, BPE")


@pytest.mark.verifies("companion.rag.split.token_spans", against="tokenizers.Tokenizer.encode, offsets")
@pytest.mark.verifies(
    "companion.rag.split.split_tokens", against="tokenizers.Tokenizer, truncation with stride"
)
def test_word_piece_offsets_and_windows(mixed, agree):
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    mine = WordPieceTokenizer.from_vocabulary(asset_path("minilm-vocabulary"))
    theirs = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(mine.pieces)}, unk_token="[UNK]"))
    theirs.normalizer = normalizers.BertNormalizer(True, True, None, True)
    theirs.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    expected = theirs.encode(mixed)
    assert expected.ids == mine.encode(mixed)
    found = token_spans(mixed, mine)
    agree(sum(found, ()), sum(expected.offsets, ()), tolerance=0, quantity="offsets, WordPiece")
    for size, overlap in [(64, 0), (50, 20), (9, 8), (5000, 10)]:
        theirs.enable_truncation(size, stride=overlap)
        first = theirs.encode(mixed)
        windows = [window.offsets for window in [first, *first.overflowing]]
        passages = split_tokens(Document("a", mixed), mine, size, overlap)
        kept = [len(p.text) - len(p.text.rstrip()) for p in passages]  # white space after the last token
        agree(
            [end - space for (_, end), space in zip(spans(passages), kept, strict=True)],
            [offsets[-1][1] for offsets in windows],
            tolerance=0,
            quantity="ends of windows",
        )
        agree(
            [passage.start for passage in passages],
            [offsets[0][0] for offsets in windows],
            tolerance=0,
            quantity="starts of windows",
        )


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=["bpe", "wordpiece", "unigram"])
@settings(deadline=None)
@given(text=texts)
@example(text="▁ a▁b ▁▁ qqq qq Word")
@example(text="e\u0301 İ ǅ \u0085 \x1c a\u00adb ﬁ 한")
def test_a_span_for_every_token(tokenizer, text):
    found = token_spans(text, tokenizer)
    assert len(found) == len(tokenizer.encode(text))
    assert all(0 <= start <= end <= len(text) for start, end in found)
    assert all(a <= c and b <= d for (a, b), (c, d) in itertools.pairwise(found))


def test_unigram_spans_read_what_the_piece_says():
    text = "In the beginning was  the Word. @@ café\t@Word"
    for token, (start, end) in zip(UNIGRAM.encode(text), token_spans(text, UNIGRAM), strict=True):
        piece = UNIGRAM.pieces[token]
        assert token == UNIGRAM.unknown_id or text[start:end] == piece.removeprefix("▁") or piece == "▁"


def test_a_window_never_cuts_a_character():
    bare = BPETokenizer([])  # bytes alone: 🙂 takes four tokens
    found = [passage.text for passage in split_tokens(Document("a", "ab🙂c🙂"), bare, 3)]
    assert found == ["ab", "🙂", "c", "🙂"]


# Headings

GUIDE = (
    "Preface.\n# Guide #\nIntro\n## Install\n```\n# no heading\n```\nRun it.\n### On Linux\nx\n"
    "## Use\ny\nEnd\n===\nz"
)


@pytest.mark.verifies("companion.rag.split.split_headings", against="sections cut by hand")
def test_heading_paths(agree):
    passages = split_headings(Document("a.md", GUIDE))
    mine = {" / ".join(passage.metadata["headings"]): passage.text for passage in passages}
    theirs = {
        "": "Preface.\n",
        "Guide": "# Guide #\nIntro\n",
        "Guide / Install": "## Install\n```\n# no heading\n```\nRun it.\n",
        "Guide / Install / On Linux": "### On Linux\nx\n",
        "Guide / Use": "## Use\n",
        "y End": "y\nEnd\n===\nz",
    }
    assert list(mine) == list(theirs)
    agree(list(mine.values()), list(theirs.values()), tolerance=0, quantity="sections")


LINES = [
    "# A",
    "## B #",
    "text",
    "more text",
    "",
    "```",
    "~~~",
    "    # code",
    "===",
    "---",
    "#######",
    "#no",
    "######",
]
LINES += ["- item", "> quote", "* * *", "# C\\#", "   # D", "\t# tab", "#\tE ##"]


@pytest.mark.verifies("companion.rag.split.headings", against="markdown_it.MarkdownIt")
def test_headings_are_commonmark(agree):
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark")
    draw = np.random.default_rng(0)
    found = []
    for _ in range(400):
        lines = [LINES[i] for i in draw.integers(len(LINES), size=draw.integers(1, 9))]
        text = "\n".join(lines)
        offsets = list(itertools.accumulate([0, *(len(line) + 1 for line in lines)]))
        expected = [
            (offsets[token.map[0]], int(token.tag[1]), " ".join(title.content.split()))
            for token, title in itertools.pairwise(parser.parse(text))
            if token.type == "heading_open" and token.level == 0
        ]
        found.append((headings(text), expected))
    agree(
        [heading for mine, _ in found for heading in [*mine, "end"]],
        [heading for _, expected in found for heading in [*expected, "end"]],
        tolerance=0,
        quantity="offsets, levels and titles",
    )


def test_long_sections_are_cut_and_keep_their_path():
    passages = split_headings(Document("a.md", "# A\n" + "word " * 50 + "\n# B\nshort"), 60, 10)
    assert {p.metadata["headings"] for p in passages} == {("A",), ("B",)}
    assert all(len(p.text) <= 60 for p in passages) and passages[-1].text == "# B\nshort"
    crlf = split_headings(Document("a.md", "# A\r\nx\r\n# B\r\ny"))
    assert [p.metadata["headings"] for p in crlf] == [("A",), ("B",)]


# Semantic


def _lowest_first(lengths, cosines, size, share):
    """Cuts by recursion: each stretch that is too long is cut at its lowest gap."""
    always = set(sorted(range(len(cosines)), key=lambda i: (cosines[i], i))[: round(share * len(cosines))])

    def cut(first, last):
        inner = [i for i in range(first, last - 1) if i in always]
        if not inner and sum(lengths[first:last]) > size:
            inner = [min(range(first, last - 1), key=lambda i: (cosines[i], i))]
        if not inner:
            return [(first, last)]
        return cut(first, inner[0] + 1) + cut(inner[0] + 1, last)

    return cut(0, len(lengths))


@pytest.mark.verifies("companion.rag.split.split_semantic", against="recursion at the lowest cosine")
@pytest.mark.parametrize("size, share", [(10_000, 0.1), (300, 0.0), (500, 0.25), (250, 0.1)])
def test_semantic_cuts(size, share, agree):
    text = " ".join(english for english, _ in itertools.islice(read_verses().values(), 60))
    cut = sentences(text)
    lengths, edges = [b - a for a, b in cut], [0, *(b for _, b in cut)]
    size = max(size, *lengths)
    vectors = np.random.default_rng(1).standard_normal((len(cut), 5))
    cosines = [a @ b / np.sqrt((a @ a) * (b @ b)) for a, b in itertools.pairwise(vectors)]
    mine = spans(split_semantic(Document("a", text), lambda texts: vectors, size, share=share))
    theirs = [(edges[a], edges[b]) for a, b in _lowest_first(lengths, cosines, size, share)]
    agree(sum(mine, ()), sum(theirs, ()), tolerance=0, quantity="offsets of passages")


def test_semantic_cuts_where_the_subject_changes():
    subject = {"c": [1, 0.1], "s": [0.1, 1]}
    text = "Cats purr. Cats sleep. Cats eat. Stars shine. Stars burn. Stars die."
    passages = split_semantic(
        Document("a", text), lambda texts: [subject[t[0].lower()] for t in texts], share=0.2
    )
    assert [p.text for p in passages] == [
        "Cats purr. Cats sleep. Cats eat. ",
        "Stars shine. Stars burn. Stars die.",
    ]


# Bad input and records


def test_a_page_is_named():
    document = Document("a.pdf", "First page.\nSecond page.\n", {"kind": "pdf", "page_starts": (0, 12)})
    passages = split_sentences(document, 13)
    assert [(p.text.strip(), p.metadata) for p in passages] == [
        ("First page.", {"kind": "pdf", "page": 1}),
        ("Second page.", {"kind": "pdf", "page": 2}),
    ]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda d: split_characters(d, 0), "size must be at least 1, got 0"),
        (lambda d: split_sentences(d, 10, 10), "overlap must lie in 0 … 9, got 10"),
        (lambda d: split_headings(d, None, 3), "overlap must lie in 0 … 0"),
        (lambda d: split_characters(d, separators="\n"), "separators must be a sequence of non-empty str"),
        (lambda d: split_semantic(d, encode, share=1), r"share must lie in \[0, 1\)"),
        (
            lambda d: split_semantic(d, lambda texts: np.ones(3)),
            r"encode must give vectors of shape \(2, d\)",
        ),
        (lambda d: split_semantic(d, lambda t: np.full((2, 3), np.nan)), "encode must give finite vectors"),
        (lambda d: Passage("a#0-3", "ab", "a", 0, 3), "text must fill start … end"),
    ],
)
def test_bad_values(call, message):
    with pytest.raises(ValueError, match=message):
        call(Document("a", "One. Two."))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: split_characters("text"), "document must be a Document, got str"),
        (lambda: split_tokens(Document("a", "b"), str.split), "tokenizer must be a BPETokenizer"),
        (lambda: split_sentences(Document("a", "b"), 1.5), "size must be an int"),
        (lambda: sentences(b"a"), "text must be a str"),
        (lambda: headings(None), "text must be a str"),
        (lambda: token_spans(3, BPE), "text must be a str"),
    ],
)
def test_bad_types(call, message):
    with pytest.raises(TypeError, match=message):
        call()
