"""companion.data.translation and companion.data.glove, on the real texts and vectors and on small ones."""

import math
import re
import sqlite3
from contextlib import closing
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from companion.data import glove, translation
from companion.data.assets import asset_path
from companion.data.glove import GloVe, load_glove
from companion.data.translation import Splits, clean, load_pairs, normalise, plausible, segments

PSALM = (19, 3, 2)
GENESIS = (1, 1, 1)
word = st.text("abcdéô", min_size=1, max_size=6)

# ------------------------------------------------------------------------------------------------ cleaning


@pytest.mark.parametrize(
    "raw, verse, expected",
    [
        ("(3:3) Plus de salut pour lui! -Pause.", PSALM, "Plus de salut pour lui!"),
        ("(5:21 Lorsque quelqu'un péchera,", (3, 6, 2), "Lorsque quelqu'un péchera,"),
        ("(19:40b) Après ces paroles", (44, 19, 41), "Après ces paroles"),
        ("Ta foi t'a sauvé. (10:53) Aussitôt il vit.", (41, 10, 52), "Ta foi t'a sauvé. Aussitôt il vit."),
        ("(9:1) Au chef. Sur [Meurs]. (9:2) Je louerai.", (19, 9, 1), "Je louerai."),
        ("Cantique de David. L'Éternel est mon berger:", (19, 23, 1), "L'Éternel est mon berger:"),
        ("Cantique des degrés, Je lève mes yeux", (19, 123, 1), "Je lève mes yeux"),
        ("dans le désert, -la parole de Dieu", (42, 3, 2), "dans le désert, la parole de Dieu"),
        ("il frappa [cinquante mille] hommes", (9, 6, 19), "il frappa cinquante mille hommes"),
        ("Notre fin s'approchait.... Notre fin", (25, 4, 18), "Notre fin s'approchait... Notre fin"),
    ],
)
def test_cleans_french(raw, verse, expected):
    assert clean("", raw, verse)[1] == expected


@pytest.mark.parametrize(
    "raw, verse, expected",
    [
        ("Balaam`s anger, his sons` wives", GENESIS, "Balaam's anger, his sons' wives"),
        ('He said, "Is it said, `You shall not eat?`"', GENESIS, "He said, Is it said, You shall not eat?"),
        ("There is no help for him. Selah.", PSALM, "There is no help for him."),
        ("from Selah to the wilderness", (23, 16, 1), "from Selah to the wilderness"),
        ("The way of the wicked shall perish. Psalm 2", (19, 1, 6), "The way of the wicked shall perish."),
        ("Full of days. BOOK I Psalm 1", (18, 42, 17), "Full of days."),
        ("I love your law. LAMED", (19, 119, 88), "I love your law."),
        ("upon the earth: KING OF KINGS", (66, 19, 16), "upon the earth: KING OF KINGS"),
        ("first -[fruits], and peace- offerings --", (3, 2, 12), "first fruits, and peace-offerings"),
        ("What are they to me?, says Yahweh.", (23, 1, 11), "What are they to me? says Yahweh."),
    ],
)
def test_cleans_english(raw, verse, expected):
    assert clean(raw, "", verse)[0] == expected


@given(st.text(), st.text(), st.sampled_from([PSALM, GENESIS, (19, 23, 1), (19, 119, 8)]))
def test_cleaning_any_text_leaves_single_spaces(english, french, verse):
    for text in clean(english, french, verse):
        assert text == " ".join(text.split())
        assert not set('"[]') & set(text)


# ---------------------------------------------------------------------------------------------- segmenting


def test_cuts_where_both_sides_have_as_many_sentences():
    assert segments("He came; he saw. He left.", "Il vint; il vit. Il partit.") == [
        ("He came;", "Il vint;"),
        ("he saw.", "il vit."),
        ("He left.", "Il partit."),
    ]
    whole = ("He came. He saw.", "Il vint et il vit.")
    assert segments(*whole) == [whole]
    vocative = ("God, hear me!", "O Dieu! écoute-moi!")  # no sentence ends before a small letter
    assert segments(*vocative) == [vocative]


def test_a_crooked_cut_is_undone_and_a_crooked_verse_dropped():
    crooked = ("Go. He went away into the land of the east.", "Va dans ce pays lointain de l'orient. Il va.")
    assert segments(*crooked) == [crooked]
    assert segments("Go.", "Il s'en alla dans le pays lointain de l'orient.") == []
    assert segments("Go.", "") == segments("", "") == []


def test_a_parenthesis_cut_in_two_is_removed():
    cut = [("He came;", "Il vint;"), ("he saw.", "il vit.")]
    assert segments("(He came; he saw.)", "Il vint; il vit.") == cut


@given(st.lists(st.tuples(word, word), min_size=1, max_size=6), st.sampled_from([". ", "; "]))
def test_no_word_is_lost(pairs, stop):
    english, french = (stop.join(side).capitalize() + "." for side in zip(*pairs, strict=True))
    pieces = segments(english, french)
    assert not pieces or [" ".join(side) for side in zip(*pieces, strict=True)] == [english, french]


def test_plausible_is_symmetric_and_scales_as_a_square_root():
    assert plausible("a" * 100, "a" * 160) and plausible("a" * 160, "a" * 100)
    assert not plausible("a" * 100, "a" * 190)
    assert plausible("a" * 10, "a" * 29) and not plausible("a" * 10, "a" * 50)


# ----------------------------------------------------------------------------------------- the real corpus


@cache
def parts(max_words=None):
    splits = load_pairs(max_words)
    return {"train": splits.train, "validation": splits.validation, "test": splits.test}


def grams(text):
    words = normalise(text)
    return {words[i : i + 4] for i in range(len(words) - 3)} or {words}


def test_sizes():
    assert sum(map(len, parts().values())) == 38_485
    assert len({pair.verse for part in parts().values() for pair in part}) == 31_054
    assert [len(part) for part in parts(20).values()] == [20_255, 1_022, 962]
    assert {pair.verse[0] for pair in parts()["train"]} == set(range(1, 67))


def test_the_texts_are_clean():
    for pair in sum(parts().values(), []):
        for text in (pair.source, pair.target):
            assert re.fullmatch(r"[('A-Za-zÀ-ÿ](?:[ '(),.:;!?-]|[A-Za-zÀ-ÿ])*", text), pair
            assert text == " ".join(text.split()), pair
            assert text.count("(") == text.count(")"), pair
            assert not re.search(r"\bSelah\.|-Pause|Psalm \d|--", text), pair


@pytest.mark.verifies("companion.data.translation.load_pairs", against="enumeration")
@pytest.mark.parametrize(
    "first, second", [("train", "validation"), ("train", "test"), ("validation", "test")]
)
def test_no_split_leaks_into_another(agree, first, second):
    """Every verse and every text of one split beside those of the other, English and French."""
    ours, others = parts()[first], parts()[second]
    for quantity, key in {
        "verses on two sides": lambda pair: pair.verse,
        "English texts on two sides": lambda pair: normalise(pair.source),
        "French texts on two sides": lambda pair: normalise(pair.target),
    }.items():
        shared = sorted({key(pair) for pair in ours} & {key(pair) for pair in others})
        agree(shared, [], tolerance=0, quantity=quantity)


@pytest.mark.parametrize("side", ["source", "target"])
def test_no_held_out_text_lies_by_half_in_a_text_of_training(side):
    """Brute force over a sample of the held-out texts and all of training."""
    training = [grams(getattr(pair, side)) for pair in parts()["train"]]
    for pair in parts()["test"][::100] + parts()["validation"][::100]:
        held_out = grams(getattr(pair, side))
        assert max(len(held_out & seen) for seen in training) < 0.5 * len(held_out), pair


def test_parallel_passages_are_trained_on():
    """Psalm 53 is Psalm 14, the genealogies of 1 Chronicles 1 are those of Genesis, nearly word for word."""
    everything = [pair for part in parts().values() for pair in part]
    twins = [(19, 14, 1), (19, 53, 1), (1, 10, 2), (13, 1, 5), (12, 19, 20), (23, 37, 21)]
    training = {pair.verse for pair in parts()["train"]}
    assert {pair.verse for pair in everything if pair.verse in twins} == training & set(twins) == set(twins)
    formula = normalise("Yahweh spoke to Moses, saying,")
    assert sum(normalise(pair.source) == formula for pair in everything) > 40
    assert not any(normalise(pair.source) == formula for pair in parts()["test"])


def test_max_words_only_filters():
    for name, part in parts(20).items():
        assert part == [p for p in parts()[name] if max(len(p.source.split()), len(p.target.split())) <= 20]


def test_callers_share_no_list():
    load_pairs(5).train.clear()
    assert load_pairs(5).train


@pytest.mark.parametrize(
    "max_words, error", [(0, ValueError), (-1, ValueError), (2.5, TypeError), (True, TypeError)]
)
def test_refuses_max_words(max_words, error):
    with pytest.raises(error, match="max_words"):
        load_pairs(max_words)


# ------------------------------------------------------------------------------------------ small databases


def database(path, verses, table="bible"):
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"CREATE TABLE {table} (bbName, bNumber, cNumber, vNumber, vText)")
        connection.executemany(f"INSERT INTO {table} VALUES (?, ?, ?, ?, ?)", verses)
        connection.commit()
    return path


def load_from(monkeypatch, path) -> Splits:
    monkeypatch.setattr(translation, "asset_path", lambda name: path)
    return load_pairs()


def test_the_split_depends_on_the_verse_alone(tmp_path, monkeypatch):
    numbers = [(1, chapter, verse) for chapter in range(1, 21) for verse in range(1, 11)]
    texts = {number: "chapter{} verse{} word{}".format(*number[1:], sum(number) * 7919) for number in numbers}

    def build(name, chosen):
        rows = [(language, *number, texts[number]) for number in chosen for language in "4l"]
        return load_from(monkeypatch, database(tmp_path / name, rows))

    everything, half = build("all.db", numbers), build("half.db", numbers[::2])
    for name in ("train", "validation", "test"):
        wanted = [pair for pair in getattr(everything, name) if pair.verse in set(numbers[::2])]
        assert getattr(half, name) == wanted
    assert everything.test and everything.validation


def test_a_twin_pulls_a_held_out_verse_into_training(tmp_path, monkeypatch):
    numbers = [(1, 1, verse) for verse in range(1, 200)]
    rows = [("4", *number, f"alpha{number[2]} beta") for number in numbers]
    rows += [("l", *number, f"gamma{number[2]} delta") for number in numbers]
    alone = load_from(monkeypatch, database(tmp_path / "alone.db", rows))
    verse = alone.test[0].verse
    rows += [
        ("4", 2, 1, 1, "other text"),
        ("l", 2, 1, 1, f"Gamma{verse[2]}, delta!"),
    ]  # the French is the same
    twins = load_from(monkeypatch, database(tmp_path / "twins.db", rows))
    assert verse in {pair.verse for pair in twins.train}
    assert len(twins.train) + len(twins.validation) + len(twins.test) == len(numbers) + 1


@pytest.mark.parametrize("damage", ["truncated", "random", "empty", "no table", "no verse"])
def test_a_corrupt_database_gives_one_clear_error(tmp_path, monkeypatch, damage):
    rows = [(language, 1, 1, verse, "text " * 50) for verse in range(400) for language in "4l"]
    path = database(tmp_path / "bible.db", rows if damage != "no verse" else [], "bible")
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif damage == "random":
        path.write_bytes(bytes(np.random.default_rng(0).integers(0, 256, 5000, dtype=np.uint8)))
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "no table":
        path.unlink()
        database(path, rows, "other")
    with pytest.raises(ValueError, match=r"^bible\.db (is not a readable database|holds no verse)"):
        load_from(monkeypatch, path)


def test_reading_changes_nothing_beside_the_file(tmp_path, monkeypatch):
    path = database(tmp_path / "bible.db", [("4", 1, 1, 1, "a word"), ("l", 1, 1, 1, "un mot")])
    before = path.read_bytes()
    load_from(monkeypatch, path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["bible.db"]


# --------------------------------------------------------------------------------------------- word vectors


def small(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return GloVe([f"w{i}" for i in range(37)], torch.randn(37, 5, generator=generator).to(dtype))


@pytest.mark.verifies("companion.data.glove.GloVe", against="torch.nn.functional.cosine_similarity")
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_cosines_equal_torch(agree, dtype, tolerance):
    table, name = small(dtype), str(dtype).removeprefix("torch.")
    judge = F.cosine_similarity(table.vectors[3], table.vectors)
    mine = [table.similarity("w3", other) for other in table.words]
    agree(np.array(mine), judge, tolerance=tolerance, quantity=f"similarity, {name}")
    order = [i for i in judge.argsort(descending=True).tolist() if i != 3]
    ranked = table.nearest("w3", k=36)
    agree([w for w, _ in ranked], [f"w{i}" for i in order], tolerance=0, quantity="order of the nearest")
    cosines = np.array([cosine for _, cosine in ranked])
    agree(cosines, judge[order], tolerance=tolerance, quantity=f"cosines of the nearest, {name}")


@pytest.mark.verifies("companion.data.glove.GloVe.analogy", against="closed form")
def test_analogy_on_a_circle(agree):
    """At angles 0, 90 and 20 degrees b − a + c has a closed form; the words at its angle win."""
    angles = {"a": 0.0, "b": 90.0, "c": 20.0, "near": 80.0, "far": 200.0}
    radians = torch.tensor([math.radians(angle) for angle in angles.values()], dtype=torch.float64)
    lengths = torch.tensor([1.0, 3.0, 0.5, 2.0, 1.0], dtype=torch.float64)[:, None]  # must not matter
    table = GloVe(list(angles), torch.stack((radians.cos(), radians.sin()), dim=1) * lengths)
    x, y = math.cos(math.radians(20)) - 1, 1 + math.sin(math.radians(20))
    cosines = [math.cos(math.atan2(y, x) - math.radians(angle)) for angle in (80, 200)]
    found = table.analogy("a", "b", "c", k=2)
    assert [w for w, _ in found] == ["near", "far"]
    agree(
        np.array([c for _, c in found]), np.array(cosines), tolerance=1e-14, quantity="cosine with b − a + c"
    )


def test_real_vectors():
    table = load_glove()
    assert len(table) == 400_000 and table.vectors.shape == (400_000, 50)
    assert table.vectors.dtype == torch.float32
    assert table.words[0] == "the"
    assert table.similarity("king", "queen") > 0.75 > 0.4 > table.similarity("king", "dog")
    assert table.similarity("hot", "cold") > 0.75  # opposites share their company
    assert table.nearest("frog", 1)[0][0] in {"toad", "frogs", "monkey", "snake", "lizard"}
    assert table.analogy("man", "king", "woman")[0][0] == "queen"
    assert load_glove() is table
    assert "king" in table and "King" not in table


def test_a_vector_is_a_copy():
    table = small()
    table.vector("w1").zero_()
    assert table.vectors[1].abs().sum() > 0
    assert torch.equal(table.vector("w1"), table.vectors[table.index["w1"]])


def test_writing_to_the_real_vectors_leaves_the_file_alone():
    table = load_glove()
    kept, before = table.vector("the"), asset_path("glove-vectors").stat().st_mtime_ns
    table.vectors[0] = 0
    table.vectors[0] = kept
    assert asset_path("glove-vectors").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda t: t.vector("unseen"), ValueError, "word must be one of the 37 words, got 'unseen'$"),
        (lambda t: t.vector("W1"), ValueError, "got 'W1'; the words are lower-case"),
        (lambda t: t.vector(3), TypeError, "word must be a str, got int"),
        (lambda t: t.similarity("w1", "x"), ValueError, "b must be one of"),
        (lambda t: t.analogy("w1", "w2", "x"), ValueError, "c must be one of"),
        (lambda t: t.nearest("w1", 37), ValueError, "k must be at most 36"),
        (lambda t: t.nearest("w1", 0), ValueError, "k must be at least 1"),
        (lambda t: GloVe(["a"], torch.ones(2, 3)), ValueError, "a row for each of 1 words, got 2"),
        (lambda t: GloVe(["a", "a"], torch.ones(2, 3)), ValueError, "words must differ"),
        (lambda t: GloVe(["a"], torch.ones(3)), ValueError, r"vectors must have shape \(words, d\)"),
        (lambda t: GloVe(["a"], [[1.0]]), TypeError, "vectors must be a torch.Tensor"),
    ],
)
def test_glove_refuses(call, error, message):
    with pytest.raises(error, match=message):
        call(small())


@pytest.mark.parametrize("damaged", ["words", "vectors"])
@pytest.mark.parametrize("size", [0, 3, 900])
def test_a_damaged_file_gives_one_clear_error(tmp_path, damaged, size):
    files = {"words": asset_path("glove-words"), "vectors": asset_path("glove-vectors")}
    cut = tmp_path / files[damaged].name
    with files[damaged].open("rb") as file:
        cut.write_bytes(file.read(size))
    with pytest.raises(ValueError, match=f"^{re.escape(cut.name)} is not a readable"):
        glove._load(**{**files, damaged: cut})


def test_nothing_is_unpickled(tmp_path):
    path = tmp_path / "objects.npy"
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="objects.npy is not a readable array"):
        glove._load(asset_path("glove-words"), path)
