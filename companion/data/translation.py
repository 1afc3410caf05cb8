"""English–French sentence pairs: the World English Bible and Louis Segond's translation of 1910.

Both texts are public domain and numbered alike, so a verse is a translated pair. Three steps lead from the
database to something a translator can be trained on:

1. `clean` removes what is not the verse: verse numbers, psalm titles, the letters that head the stanzas of
   Psalm 119, musical rests, brackets, and quotation marks, which the French text does not use.
2. `segments` cuts a verse at sentence ends and semicolons where both sides have equally many pieces, and
   drops what its length shows to be no translation: 38,485 segments of 31,054 verses are left.
3. `load_pairs` splits by verse, not by segment, and holds out only verses without a twin: Chronicles repeats
   Kings, the Gospels repeat each other, and a sentence seen in training tests nothing.
"""

import hashlib
import math
import re
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path

from companion._checks import check_positive
from companion.data.assets import asset_path

BOOKS = range(1, 67)
PSALMS, HABAKKUK = 19, 35
HELD_OUT = 1 / 16  # share of the verses drawn for validation, and again for test
SHINGLE = 4  # words
TWIN = 0.5  # a text is a twin of another that contains at least this share of its shingles

QUERY = """
    SELECT en.bNumber, en.cNumber, en.vNumber, en.vText, fr.vText
    FROM bible AS en JOIN bible AS fr USING (bNumber, cNumber, vNumber)
    WHERE en.bbName = '4' AND fr.bbName = 'l'
    ORDER BY en.bNumber, en.cNumber, en.vNumber
"""


@dataclass(frozen=True, slots=True)
class Pair:
    """A segment and its translation; `verse` is its (book 1 … 66, chapter, verse)."""

    source: str
    target: str
    verse: tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Splits:
    """Three lists of pairs, in the order of the text, that share no verse and no sentence."""

    train: list[Pair]
    validation: list[Pair]
    test: list[Pair]


# ------------------------------------------------------------------------------------------------ cleaning

MISNUMBERED = {(PSALMS, 13, v) for v in range(1, 7)} | {(50, 1, 16), (50, 1, 17)}  # one verse late; swapped
VERSE_NUMBER = re.compile(r"\(\d+:\d+[a-z]?\)?\s*")
ENGLISH_REST = re.compile(r"(?:Higgaion\. )?Selah\.?")
FRENCH_REST = re.compile(r"(?:Jeu d'instruments\. )?-?Pause\.")
NEXT_PSALM = re.compile(r"(?:BOOK [IV]+ )?Psalm \d.*")
STANZA = re.compile(r"(?<=[.!?,]) (?:[A-Z]{3,6}|SIN AND SHIN)$")
PSALM_TITLE = re.compile(
    r"(?:Cantique des degrés, |(?:Au chef|Psaume|Cantique|Hymne|Prière|Louange|Complainte|De David|"
    r"De Salomon|D'Asaph|Des fils de Koré)\b[^.]*\.\s*)+"
)
APOSTROPHE = re.compile(r"(?<=\w)`(?=\w)|(?<=s)`")  # God`s, the priests`; other backticks quote


def clean(english: str, french: str, verse: tuple[int, int, int]) -> tuple[str, str]:
    """The two texts of a verse without what belongs to the edition rather than to the verse."""
    book, chapter, number = verse
    if book == PSALMS and number == 1:  # the French title opens the psalm …
        french = VERSE_NUMBER.split(french)[-1]
        title = PSALM_TITLE.match(french)
        french = french[title.end() :] if title else french
    if "Psalm" in english:
        english = NEXT_PSALM.sub("", english).rstrip()  # … the English one closes the psalm before
    if (book, chapter) == (PSALMS, 119):
        english = STANZA.sub("", english)
    if book in (PSALMS, HABAKKUK):
        english, french = ENGLISH_REST.sub("", english), FRENCH_REST.sub("", french)
    if "`" in english:
        english = APOSTROPHE.sub("'", english)
    return _tidy(english), _tidy(VERSE_NUMBER.sub("", french))


TIDY = [
    (re.compile(r'["`\[\]]'), ""),  # quotation marks, which the French has not; brackets of supplied words
    (re.compile(r"(?<=\w)- (?=\w)"), "-"),  # a hyphen at the end of a line: peace- offerings
    (re.compile(r"--+|\s-+|-+\s|^-+|-+$"), " "),  # dashes
    (re.compile(r"[,;]?\.{2,}"), "..."),
    (re.compile(r"([.!?])[,;:]+"), r"\1"),
    (re.compile(r" +([,.;:!?)])"), r"\1"),
]
UNTIDY = re.compile(r'["`\[\]]|-(?:[- ]|$)| [-,.;:!?)]|\.\.|[.!?][,;:]')  # one look spares most texts six


def _tidy(text: str) -> str:
    if text.startswith("-") or UNTIDY.search(text):
        for pattern, replacement in TIDY:
            text = pattern.sub(replacement, text)
    return " ".join(text.split())


# ---------------------------------------------------------------------------------------------- segmenting

SENTENCE_END = re.compile(r"""(?:(?<=[.!?])|(?<=[.!?]["')]))\s+(?=["'(]*[A-ZÀ-Ý])|(?<=;)\s+""")


def segments(english: str, french: str) -> list[tuple[str, str]]:
    """A verse as aligned pieces: cut after stops and semicolons if that gives both sides as many, else whole.

    One piece whose lengths do not look like a translation undoes the cut; a whole verse that does not look
    like one gives no piece.
    """
    cut = [SENTENCE_END.split(text) for text in (english, french)]
    for pieces in (cut, ([english], [french])):
        if len(pieces[0]) == len(pieces[1]) and all(map(plausible, *pieces)):
            return list(zip(*(map(_balance, side) for side in pieces), strict=True))
    return []


def plausible(english: str, french: str, threshold: float = 2.5) -> bool:
    """Whether the lengths could be those of a text and its translation (Gale & Church, 1993).

    Each letter of one language begets about one of the other, with a variance of 6.8, so the difference of
    the lengths over √(6.8 · mean length) is about normal; beyond `threshold` standard deviations it is an
    outlier.
    """
    if not english or not french:
        return False
    mean = (len(english) + len(french)) / 2
    return abs(len(english) - len(french)) <= threshold * math.sqrt(6.8 * mean)


def _balance(text: str) -> str:
    """A piece without the parenthesis whose other half lies in another piece."""
    return text if text.count("(") == text.count(")") else re.sub(r"[()]", "", text)


# ------------------------------------------------------------------------------------------------ splitting


def load_pairs(max_words: int | None = None) -> Splits:
    """All pairs, or those of at most `max_words` words on both sides, as train, validation and test.

    A verse falls to a split by the hash of its number, so the split is the same on every machine and for
    every `max_words`. A verse drawn for validation or test that has a twin, anywhere, goes to train instead:
    no held-out text, English or French, equals a text of another verse or has half of its word 4-grams there.

    Raises:
        FileNotFoundError: the text is not installed (says the command that installs it).
        ValueError: `max_words` is below 1, or the database is not the pinned one or cannot be read.
    """
    if max_words is not None:
        check_positive("max_words", max_words)
    parts = _split(asset_path("bible"))
    return Splits(*([pair for pair in part if max_words is None or _fits(pair, max_words)] for part in parts))


def _fits(pair: Pair, max_words: int) -> bool:
    return max(pair.source.count(" "), pair.target.count(" ")) < max_words


@cache
def read_verses(books: range = BOOKS) -> dict[tuple[int, int, int], tuple[str, str]]:
    """Every verse, cleaned: (book 1 … 66, chapter, verse) → its English and its French, in the text's order.

    Args:
        books: those to read; a part of them is read in a part of the time.

    Raises as `load_pairs` does.
    """
    return _verses(asset_path("bible"), books)


def _verses(path: Path, books: range = BOOKS) -> dict[tuple[int, int, int], tuple[str, str]]:
    try:
        address = f"{path.absolute().as_uri()}?mode=ro&immutable=1"
        with closing(sqlite3.connect(address, uri=True)) as database:
            rows = database.execute(QUERY).fetchall()
    except sqlite3.Error as error:
        raise ValueError(f"{path.name} is not a readable database of verses: {error}") from error
    if not rows:
        raise ValueError(f"{path.name} holds no verse in both translations")
    return {
        verse: clean(english, french, verse)
        for *number, english, french in rows
        for verse in [tuple(number)]
        if verse[0] in books and verse not in MISNUMBERED
    }


def _read(path: Path) -> list[Pair]:
    """Every segment of the database, in the order of the text."""
    return [
        Pair(source, target, verse)
        for verse, texts in _verses(path).items()
        for source, target in segments(*texts)
    ]


@cache
def _split(path: Path) -> tuple[list[Pair], list[Pair], list[Pair]]:
    """The segments of the database as train, validation and test."""
    pairs = _read(path)
    drawn = {verse: _draw(verse) for verse in {pair.verse for pair in pairs}}
    for verse in _twins(pairs, {verse for verse, part in drawn.items() if part > 0}):
        drawn[verse] = 0
    parts: tuple[list[Pair], list[Pair], list[Pair]] = ([], [], [])
    for pair in pairs:
        parts[drawn[pair.verse]].append(pair)
    return parts


def _draw(verse: tuple[int, int, int]) -> int:
    """0 (train), 1 (validation) or 2 (test): a uniform number in [0, 1) out of the verse's name, cut."""
    digest = hashlib.sha256("{}:{}:{}".format(*verse).encode()).digest()
    uniform = int.from_bytes(digest[:8], "big") / 2**64
    return 1 if uniform < HELD_OUT else 2 if uniform < 2 * HELD_OUT else 0


def normalise(text: str) -> tuple[str, ...]:
    """The words of a text in lower case, without punctuation: what two printings of a sentence share."""
    return tuple(re.findall(r"\w+", text.casefold()))


def _shingles(text: str) -> set[tuple[str, ...]]:
    """The word 4-grams of a text, or all of it if it is shorter."""
    words = normalise(text)
    return set(zip(*(words[i:] for i in range(SHINGLE)), strict=False)) or {words}


def _twins(pairs: Iterable[Pair], candidates: set[tuple[int, int, int]]) -> set[tuple[int, int, int]]:
    """The candidate verses with a text that another verse repeats, in whole or by half its shingles."""
    return set().union(*(_repeated(pairs, candidates, side) for side in ("source", "target")))


def _repeated(pairs: Iterable[Pair], candidates: set, side: str) -> Iterator[tuple[int, int, int]]:
    owners = defaultdict(list)  # shingle → the candidate texts that have it
    sizes, verses = [], []
    for pair in pairs:
        if pair.verse in candidates:
            shingles = _shingles(getattr(pair, side))
            for shingle in shingles:
                owners[shingle].append(len(sizes))
            sizes.append(len(shingles))
            verses.append(pair.verse)
    for pair in pairs:
        known = owners.keys() & _shingles(getattr(pair, side))
        shared = Counter(chain.from_iterable(map(owners.__getitem__, known)))
        for text, count in shared.items():
            if verses[text] != pair.verse and count >= TWIN * sizes[text]:
                yield verses[text]
