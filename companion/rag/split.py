"""Passages of a document: stretches of its text that are embedded, retrieved and cited.

Every splitter tiles the text: passage after passage, each where the last ended or up to `overlap` before it,
and text == document.text[start:end] to the character. Nothing is lost but white space that stands alone, and
nothing stands twice but the overlap. A passage's id is its document's with its place, the same in every run.
The text is cut by::

    characters    at most `size` characters, ended after a paragraph, a line or a word where one ends in time
    sentences     whole sentences, as many as `size` characters hold
    tokens        `size` tokens of a tokenizer
    headings      the sections of a Markdown text, with the headings above them
    semantic      sentences, cut where neighbours have least in common (after Kamradt, 2023)

Sizes count Unicode code points; a cut inside a word may part a letter from its combining accent.
"""

import bisect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import numpy as np

from companion._checks import check_index, check_number, check_positive
from companion.rag.load import Document
from companion.tokenizers import BPETokenizer, UnigramTokenizer, WordPieceTokenizer
from companion.tokenizers.unigram import SPACE
from companion.tokenizers.wordpiece import UNK

Span = tuple[int, int]
SEPARATORS = ("\n\n", "\n", " ")


@dataclass(frozen=True)
class Passage:
    """A stretch of a document.

    Attributes:
        id: "document#start-end".
        text: document.text[start:end].
        document: the id of the document.
        start, end: character offsets in its text.
        metadata: the document's; of a PDF "page", counted from 1, instead of "page_starts"; by
            `split_headings` also "headings".
    """

    id: str
    text: str
    document: str
    start: int
    end: int
    metadata: Mapping = field(default_factory=dict)

    def __post_init__(self):
        if not 0 <= self.start < self.end or len(self.text) != self.end - self.start:
            raise ValueError(
                f"text must fill start … end, got {len(self.text)} characters for {self.start} … {self.end}"
            )


def split_characters(
    document: Document, size: int = 1000, overlap: int = 0, *, separators: Sequence[str] = SEPARATORS
) -> list[Passage]:
    """Passages of at most `size` characters.

    A passage ends after the last place, in its second half, of the first separator that has one there, or of
    the next separator; where none has, after `size` characters. The next one begins up to `overlap`
    characters before, after the first of the finest separators there (the last that is given, or the one
    before it). Without separators: windows of `size` characters.
    """
    _check(document, size, overlap)
    if isinstance(separators, str) or not all(isinstance(item, str) and item for item in separators):
        raise ValueError(f"separators must be a sequence of non-empty str, got {separators!r}")
    return _passages(document, _windows(document.text, 0, len(document.text), size, overlap, separators))


def split_sentences(document: Document, size: int = 1000, overlap: int = 0) -> list[Passage]:
    """Passages of whole sentences, at most `size` characters; a longer sentence is cut by characters.

    The next passage repeats the last sentences that `overlap` characters hold.
    """
    _check(document, size, overlap)
    return _passages(document, _packed(_pieces(document.text, size), size, overlap))


def split_tokens(
    document: Document,
    tokenizer: BPETokenizer | WordPieceTokenizer | UnigramTokenizer,
    size: int = 256,
    overlap: int = 0,
) -> list[Passage]:
    """Passages of `size` tokens of the document's own encoding, the next one `overlap` tokens back.

    White space that no token spells goes with the token before it. Where a window would end inside a
    character that several tokens spell, it ends before that character; a character of more than `size`
    tokens is a passage by itself. A passage encoded alone may have a few tokens more or less, since words at
    its ends may be cut; where a limit is hard, leave room.
    """
    _check(document, size, overlap)
    units: list[list[int]] = []  # [start, tokens] of runs of tokens that share no character
    end = 0
    for start, token_end in token_spans(document.text, tokenizer):
        if units and (start < end or start == units[-1][0]):
            units[-1][1] += 1
        else:
            units.append([start, 1])
        end = max(end, token_end)
    if not units:
        return _passages(document, [(0, len(document.text))])  # of white space, or of what has no token
    starts = [0, *(start for start, _ in units[1:]), len(document.text)]
    windows = _pack([count for _, count in units], size, overlap)
    return _passages(document, ((starts[first], starts[last]) for first, last in windows))


def split_headings(document: Document, size: int | None = None, overlap: int = 0) -> list[Passage]:
    """The sections of a Markdown text, each from its heading to the next; `metadata["headings"]` is the path.

    The path is a tuple of the headings' texts from the top down, the section's own last; () before the first
    heading. A section of more than `size` characters is cut as `split_characters` does, with the overlap; no
    passage reaches over a heading. None: sections stay whole.
    """
    _check(document, 1 if size is None else size, overlap)
    passages, path = [], []
    found = [(0, 0, ""), *headings(document.text), (len(document.text), 0, "")]
    for (start, level, title), (end, _, _) in pairwise(found):
        if level:
            path = [item for item in path if item[0] < level] + [(level, title)]
        extra = {"headings": tuple(title for _, title in path)}
        windows = _windows(document.text, start, end, size or max(end - start, 1), overlap, SEPARATORS)
        passages += _passages(document, windows, extra)
    return passages


def split_semantic(
    document: Document,
    encode: Callable[[list[str]], np.ndarray],
    size: int = 1000,
    overlap: int = 0,
    *,
    share: float = 0.1,
) -> list[Passage]:
    """Passages of whole sentences, cut where the cosine of two neighbours is lowest.

    First at the `share` of all gaps with the lowest cosines (rounded to a whole number; ties to the earlier
    gap), then, within each passage that is longer than `size` characters, at its lowest until none is. A
    sentence longer than that is cut by characters before.

    Args:
        encode: from n sentences to vectors (n, d), as `SentenceEncoder.encode` gives them; called once.
        overlap: of whole sentences before the passage, as far as `size` allows.
        share: of the gaps, in [0, 1).
    """
    _check(document, size, overlap)
    check_number("share", share)
    if not 0 <= share < 1:
        raise ValueError(f"share must lie in [0, 1), got {share}")
    pieces = _pieces(document.text, size)
    if not pieces:
        return []
    cosines = _neighbours(encode([document.text[start:end].strip() for start, end in pieces]), len(pieces))
    breaks = [0, len(pieces)]
    always = round(share * len(cosines))
    for rank, gap in enumerate(np.argsort(cosines, kind="stable").tolist()):
        place = bisect.bisect_right(breaks, gap)
        first, last = breaks[place - 1], breaks[place]
        if rank < always or pieces[last - 1][1] - pieces[first][0] > size:
            breaks.insert(place, gap + 1)
    spans, previous = [], 0
    for first, last in pairwise(breaks):
        end, begin = pieces[last - 1][1], pieces[first][0]
        earliest = max(begin - overlap, end - size)
        while first - 1 > previous and pieces[first - 1][0] >= earliest:
            first -= 1
        spans.append((pieces[first][0], end))
        previous = first
    return _passages(document, spans)


# ------------------------------------------------------------------------------------- sentences and headings

_END = re.compile(r"""(?<![.!?…])[.!?…]+["'”’»)\]]*(?=\s)|[。！？｡]+[”’」』）]*|\n[ \t\r]*\n""")
_ABBREVIATION = re.compile(
    r"(?:^|[\s(\[\"'“‘])(?:(?:Mr|Mrs|Ms|Dr|Prof|St|Sr|Jr|vs|cf|al|Fig|Eq|No|Vol|Ch|pp?|ed|eds|approx|ca|e\.g|i\.e|"
    r"[A-Z])(?:\.[A-Za-z])*)\.$"
)


def sentences(text: str) -> list[Span]:
    """(start, end) of each sentence, with the white space after it; together they are the text.

    A sentence ends at . ! ? or …, with the quotes and brackets after it, where white space and no small
    letter follows; at 。！？ anywhere; and at an empty line. A full stop after one capital letter or a common
    English abbreviation ends nothing. Rules of this kind err: "at 5 p.m. Then" has an end too few.
    """
    if not isinstance(text, str):
        raise TypeError(f"text must be a str, got {type(text).__name__}")
    cuts = [0]
    end = _SPACE.match(text).end()
    for match in _END.finditer(text):
        if match.start() < end:
            continue  # an empty line among the white space that was passed already
        end = _SPACE.match(text, match.end()).end()
        if end < len(text) and _is_end(text, match, end):
            cuts.append(end)
    return list(pairwise([*cuts, len(text)])) if text else []


def _is_end(text: str, match: re.Match, end: int) -> bool:
    """Whether what looks like the end of a sentence is one; text[end] is what comes after the white space."""
    if match.group()[0] not in ".!?…" or text.count("\n", match.end(), end) > 1:
        return True
    before = text[max(match.start() - 12, 0) : match.start() + 1]
    return not text[end].islower() and not (match.group() == "." and _ABBREVIATION.search(before))


_SPACE = re.compile(r"\s*")


_FENCE = re.compile(r" {0,3}(`{3,}(?=[^`]*$)|~{3,})")
_ATX = re.compile(r" {0,3}(#{1,6})(?:[ \t]+(.*))?$")
_UNDERLINE = re.compile(r" {0,3}(=+|-+)[ \t]*$")
_RULE = re.compile(r" {0,3}([-*_])[ \t]*(?:\1[ \t]*){2,}$")
_CONTAINER = re.compile(r" {0,3}([-*+](?:[ \t]|$)|\d{1,9}[.)](?:[ \t]|$)|[<>])")


def headings(text: str) -> list[tuple[int, int, str]]:
    """(start, level, title) of each heading of a Markdown text: "# Title", or a title underlined by = or -.

    As in CommonMark, at the margin: inside a fenced block and after four spaces "#" is code, and headings
    within lists and quotations are part of those.
    """
    if not isinstance(text, str):
        raise TypeError(f"text must be a str, got {type(text).__name__}")
    found: list[tuple[int, int, str]] = []
    fence = ""
    paragraph: list[str] = []
    begin, is_open = 0, False  # of the paragraph; whether the lines of a list or quotation go on
    margin = 0  # of what belongs to a list
    for match in re.finditer(r"[^\r\n]*(?:\r\n|\r|\n|\Z)", text):
        line = match.group().rstrip("\r\n")
        mark = _FENCE.match(line)
        if fence:
            if mark and mark[1].startswith(fence) and not line[mark.end() :].strip():
                fence = ""
        elif not line.strip():
            paragraph, is_open = [], False
        elif margin and line.startswith(" " * margin):
            is_open = True
        elif mark:
            fence, paragraph, is_open, margin = mark[1], [], False, 0
        elif atx := _ATX.match(line):
            title = (atx[2] or "").strip()
            shorter = title.rstrip("#")  # "# Title #"
            title = shorter.rstrip() if shorter.endswith((" ", "\t")) or not shorter else title
            found.append((match.start(), len(atx[1]), title))
            paragraph, is_open, margin = [], False, 0
        elif paragraph and (under := _UNDERLINE.match(line)):
            found.append((begin, 1 if under[1][0] == "=" else 2, " ".join(paragraph)))
            paragraph = []
        elif _RULE.match(line):
            paragraph, is_open, margin = [], False, 0
        elif container := _CONTAINER.match(line):
            paragraph, is_open = [], True
            margin = 0 if container[1] in "<>" else len(container[0])
        elif paragraph:
            paragraph.append(line.strip())
        elif not is_open and not line.startswith(("    ", "\t")):
            paragraph, begin, margin = [line.strip()], match.start(), 0
    return found


# --------------------------------------------------------------------------------------------------- tokens


def token_spans(text: str, tokenizer: BPETokenizer | WordPieceTokenizer | UnigramTokenizer) -> list[Span]:
    """(start, end) in the text of each token of tokenizer.encode(text).

    A token that spells a part of a character has the whole character's span. What no token spells, such as
    white space around a WordPiece, is in no span. The unigram model's "▁" alone has an empty one, where its
    word begins.

    Raises ValueError if a byte-level vocabulary lacks bytes of the text.
    """
    if not isinstance(text, str):
        raise TypeError(f"text must be a str, got {type(text).__name__}")
    for kind, spans in (
        (BPETokenizer, _byte_spans),
        (WordPieceTokenizer, _word_piece_spans),
        (UnigramTokenizer, _unigram_spans),
    ):
        if isinstance(tokenizer, kind):
            return spans(text, tokenizer)
    raise TypeError(
        "tokenizer must be a BPETokenizer, WordPieceTokenizer or UnigramTokenizer, "
        f"got {type(tokenizer).__name__}"
    )


def _byte_spans(text: str, tokenizer: BPETokenizer) -> list[Span]:
    ids = tokenizer.encode(text)
    lengths = {token: len(tokenizer.token_bytes(token)) for token in set(ids)}
    ends = np.cumsum([lengths[token] for token in ids], dtype=np.int64)
    data = np.frombuffer(text.encode("utf-8"), np.uint8)
    if len(data) != (ends[-1] if ids else 0):
        raise ValueError("tokenizer must spell every byte of the text, got a vocabulary that lacks some")
    if not ids:
        return []
    character = np.cumsum((data & 0xC0) != 0x80) - 1  # of each byte
    starts = character[np.concatenate(([0], ends[:-1]))]
    return list(zip(starts.tolist(), (character[ends - 1] + 1).tolist(), strict=True))


def _word_piece_spans(text: str, tokenizer: WordPieceTokenizer) -> list[Span]:
    """Normalisation works on one character at a time, so it can be followed back."""
    written = {character: tokenizer.normalise(character).replace(" ", "") for character in set(text)}
    origin = [i for i, character in enumerate(text) for _ in written[character]]
    origin.append(len(text))
    spans, place = [], 0
    for word in tokenizer.normalise(text).split(" "):
        begin = place
        for token in tokenizer.encode(word):
            piece = tokenizer.pieces[token]
            length = len(word) if piece == UNK else len(piece) - 2 * (place > begin)  # without its "##"
            spans.append((origin[place], origin[place + length - 1] + 1))
            place += length
    return spans


def _unigram_spans(text: str, tokenizer: UnigramTokenizer) -> list[Span]:
    spans: list[Span] = []
    known = tokenizer.scores
    is_unknown = False
    for match in re.finditer(r"\S+", text.replace(SPACE, " ")):
        place = match.start() - 1  # of the space that the word is written with
        for piece in tokenizer._best(SPACE + match.group()):
            span = (max(place, match.start()), place + len(piece))
            place = span[1]
            if piece not in known and is_unknown:
                spans[-1] = (spans[-1][0], span[1])  # a run of unknown characters is one token
            else:
                spans.append(span)
            is_unknown = piece not in known
    return spans


# --------------------------------------------------------------------------------------------------- windows


def _check(document: Document, size: int, overlap: int) -> None:
    if not isinstance(document, Document):
        raise TypeError(f"document must be a Document, got {type(document).__name__}")
    check_positive("size", size)
    check_index("overlap", overlap, size)


def _windows(
    text: str, start: int, end: int, size: int, overlap: int, separators: Sequence[str]
) -> Iterator[Span]:
    """Spans of at most `size` characters over text[start:end]."""
    while end - start > size:
        least = start + max(size // 2, overlap) + 1  # beyond the overlap, so that the next one goes further
        most = start + size
        cut = next(filter(None, (_after_last(text, sep, least, most) for sep in separators)), most)
        yield start, cut
        back = cut - overlap
        start = next(filter(None, (_after_first(text, sep, back, cut) for sep in reversed(separators))), back)
    if start < end:
        yield start, end


def _after_last(text: str, separator: str, low: int, high: int) -> int | None:
    """The last place in low … high that follows a separator."""
    found = text.rfind(separator, max(low - len(separator), 0), high)
    return None if found < 0 else found + len(separator)


def _after_first(text: str, separator: str, low: int, high: int) -> int | None:
    """The first place in low … high that follows a separator."""
    found = text.find(separator, max(low - len(separator), 0), high)
    return None if found < 0 else found + len(separator)


def _pieces(text: str, size: int) -> list[Span]:
    """Sentences, those longer than `size` cut."""
    return [span for a, b in sentences(text) for span in _windows(text, a, b, size, 0, SEPARATORS)]


def _packed(pieces: list[Span], size: int, overlap: int) -> list[Span]:
    windows = _pack([end - start for start, end in pieces], size, overlap)
    return [(pieces[first][0], pieces[last - 1][1]) for first, last in windows]


def _pack(costs: list[int], size: int, overlap: int) -> Iterator[Span]:
    """Runs first … last − 1 of neighbours that cost at most `size` together, or of one that costs more.

    The next run goes back over whole neighbours that cost at most `overlap`, as long as it still reaches
    beyond the last.
    """
    total = [0, *accumulate(costs)]
    first, n = 0, len(costs)
    while first < n:
        last = max(bisect.bisect_right(total, total[first] + size) - 1, first + 1)
        yield first, last
        if last == n:
            return
        back = min(overlap, max(size - costs[last], 0))
        first = max(bisect.bisect_left(total, total[last] - back), first + 1)


def _neighbours(vectors: object, count: int) -> np.ndarray:
    """The cosine of each vector with the next, (count − 1,)."""
    vectors = np.asarray(vectors, dtype=np.float64)
    if vectors.ndim != 2 or len(vectors) != count:
        raise ValueError(f"encode must give vectors of shape ({count}, d), got shape {vectors.shape}")
    if not np.isfinite(vectors).all():
        raise ValueError("encode must give finite vectors, got infinity or NaN")
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = vectors / np.where(lengths > 0, lengths, 1)
    return (unit[:-1] * unit[1:]).sum(1)


def _passages(document: Document, spans, extra: Mapping | None = None) -> list[Passage]:
    """Passages of the spans that hold more than white space."""
    metadata = {key: value for key, value in document.metadata.items() if key != "page_starts"} | (
        extra or {}
    )
    pages = document.metadata.get("page_starts")
    passages = []
    for start, end in spans:
        text = document.text[start:end]
        if text.strip():
            page = {} if pages is None else {"page": bisect.bisect_right(pages, start)}
            name = f"{document.id}#{start}-{end}"
            passages.append(Passage(name, text, document.id, start, end, metadata | page))
    return passages
