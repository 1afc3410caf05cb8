"""companion.data.retrieval and companion.data.countries: what can be known of the data without them."""

import sqlite3

import pytest
import torch

from companion.data.assets import asset_path
from companion.data.countries import RELATIONS, country_triples, load_countries
from companion.data.retrieval import gospel_vectors, load_gospels
from companion.models.bert import SentenceEncoder


def test_documents_are_the_verses_of_the_four_gospels():
    task = load_gospels()
    assert len(task.ids) == len(set(task.ids)) == len(task.documents) == 3779
    assert len(task.queries) == 820 and sum(map(len, task.relevance.values())) == 2024
    assert "For God so loved the world" in task.documents[task.ids.index("John 3:16")]
    french = load_gospels("fr")
    assert french.ids == task.ids and "Dieu a tant aimé" in french.documents[task.ids.index("John 3:16")]


def test_references_are_those_of_the_database():
    with sqlite3.connect(f"{asset_path('bible').as_uri()}?mode=ro", uri=True) as database:
        rows = database.execute(
            "SELECT bNumberTo, cNumberTo, vNumberTo FROM bibleCrossRef"
            " WHERE bNumberFrom = 40 AND cNumberFrom = 3 AND vNumberFrom = 17"
        ).fetchall()
    gospels = {40: "Matthew", 41: "Mark", 42: "Luke", 43: "John"}
    expected = {f"{gospels[b]} {c}:{v}" for b, c, v in rows if b in gospels}
    assert expected and set(load_gospels().relevance["Matthew 3:17"]) == expected


def test_no_query_is_relevant_to_itself_and_all_relevant_documents_are_there():
    task = load_gospels()
    for query, relevance in task.relevance.items():
        assert relevance and query not in relevance and set(relevance) <= set(task.ids)
        assert task.queries[query] == task.documents[task.ids.index(query)]


def test_queries_in_the_other_language():
    task = load_gospels("en", queries="fr")
    assert task.documents == load_gospels().documents and task.relevance == load_gospels().relevance
    assert task.queries["John 1:1"].startswith("Au commencement")


def test_the_parts_share_no_query_and_lose_none():
    task = load_gospels()
    train, test = task.split("train"), task.split("test")
    assert not set(train.queries) & set(test.queries)
    assert set(train.queries) | set(test.queries) == set(task.queries)
    assert 350 < len(test.queries) < 470 and set(test.relevance) == set(test.queries)


def test_rankings_leave_out_the_query_itself_and_no_result():
    task = load_gospels()
    name = next(iter(task.queries))
    row = task.ids.index(name)

    def search(texts, k):
        assert k == 4 and len(texts) == 820
        return [[row, 0, 1, 2] if text == task.queries[name] else [5, 6, -1, -1] for text in texts]

    rankings = task.rankings(search, 3)
    assert name not in rankings[name] and len(rankings[name]) == 3 - (row in (0, 1, 2))
    assert all(len(ranking) <= 3 for ranking in rankings.values())


@pytest.mark.verifies(
    "companion.data.retrieval.gospel_vectors", against="companion.models.bert.SentenceEncoder, run again"
)
@pytest.mark.parametrize("language", ["en", "fr"])
def test_shipped_vectors_are_those_of_the_encoder(agree, language):
    rows = list(range(0, 3779, 450))
    documents = load_gospels(language).documents
    again = SentenceEncoder.minilm().encode([documents[row] for row in rows])
    agree(gospel_vectors(language)[rows], again, tolerance=5e-4, quantity="vectors, stored in float16")
    torch.testing.assert_close(gospel_vectors(language).norm(dim=1), torch.ones(3779))


@pytest.mark.parametrize("call", [lambda: load_gospels("de"), lambda: gospel_vectors("de")])
def test_another_language_is_refused(call):
    with pytest.raises(ValueError, match="language must be one of 'en', 'fr', got 'de'"):
        call()


def test_countries_hold_what_everybody_knows():
    countries = {country.code: country for country in load_countries()}
    assert len(countries) == len(load_countries()) == 251
    assert countries["FRA"].capital == "Paris" and countries["NPL"].capital == "Kathmandu"
    assert countries["PRT"].borders == ("ESP",) and countries["JPN"].borders == ()
    assert (
        countries["CHE"].currencies[0].startswith("CH") and countries["DEU"].translations["fr"] == "Allemagne"
    )


def test_triples_are_the_records():
    triples = country_triples()
    assert {relation for _, relation, _ in triples} == set(RELATIONS)
    assert ("Nepal", "capital", "Kathmandu") in triples and ("Nepal", "border", "India") in triples
    assert len(set(triples)) == len(triples) and all(all(triple) for triple in triples)
    assert country_triples(("capital",)) == [triple for triple in triples if triple[1] == "capital"]
    with pytest.raises(ValueError, match="relations must be some of .*, got moon"):
        country_triples(("capital", "moon"))
