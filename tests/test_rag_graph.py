"""companion.rag.graph beside networkx, joins by enumeration, and the properties that must hold."""

import itertools
import random

import networkx as nx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from companion.rag.graph import (
    Triple,
    TripleStore,
    extract_triples,
    find_communities,
    link_entities,
    modularity,
    summarise_community,
    write_triples,
)

FACTS = [
    ("France", "capital", "Paris"),
    ("France", "border", "Spain"),
    ("Spain", "border", "France"),
    ("Spain", "capital", "Madrid"),
    ("Spain", "border", "Portugal"),
    ("Portugal", "capital", "Lisbon"),
]
NAMES = "abcde"
AGREEING = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
TRIPLES = st.lists(st.tuples(*[st.sampled_from(NAMES)] * 3), max_size=30)
TERMS = st.sampled_from(["a", "b", "c", "?x", "?y", "?z"])
PATTERNS = st.lists(st.tuples(TERMS, TERMS, TERMS), min_size=1, max_size=3)


def store(triples):
    made = TripleStore()
    made.add(triples)
    return made


def random_triples(seed, names=18, count=40):
    draw = random.Random(seed)
    return sorted(
        {(f"n{draw.randrange(names)}", draw.choice("rst"), f"n{draw.randrange(names)}") for _ in range(count)}
    )


def undirected(triples, kind=nx.Graph):
    graph = kind()
    for subject, relation, value in triples:
        graph.add_edge(
            subject, value, **({"key": (subject, relation, value)} if kind is nx.MultiGraph else {})
        )
    return graph


# ---------------------------------------------------------------------------------------------------- store


@pytest.mark.verifies("companion.rag.graph.TripleStore.match", against="a list filtered")
def test_match(agree):
    triples = random_triples(0)
    with store(triples) as mine:
        for parts in itertools.product(["n1", "n2", "n99", None], ["r", None], ["n1", "n5", None]):
            expected = [t for t in triples if all(p in (None, x) for p, x in zip(parts, t, strict=True))]
            agree(mine.match(*parts), expected, tolerance=0, quantity="triples in order")


def brute_force(triples, patterns):
    """Every assignment of a triple to each pattern, kept where it is consistent."""
    found = set()
    for choice in itertools.product(set(triples), repeat=len(patterns)):
        binding: dict[str, str] = {}
        pairs = [
            (term, value)
            for pattern, triple in zip(patterns, choice, strict=True)
            for term, value in zip(pattern, triple, strict=True)
        ]
        if all(
            binding.setdefault(term, value) == value if term.startswith("?") else term == value
            for term, value in pairs
        ):
            found.add(tuple(sorted(binding.items())))
    return found


@pytest.mark.verifies("companion.rag.graph.TripleStore.query", against="itertools.product, filtered")
@AGREEING
@given(triples=st.lists(st.tuples(*[st.sampled_from(NAMES)] * 3), max_size=12), patterns=PATTERNS)
def test_query(agree, triples, patterns):
    mine = [tuple(sorted(b.items())) for b in store(triples).query(patterns, limit=10_000)]
    assert len(mine) == len(set(mine))
    agree(
        sorted(map(str, mine)),
        sorted(map(str, brute_force(triples, patterns))),
        tolerance=0,
        quantity="bindings",
    )


def test_query_by_hand():
    with store(FACTS) as graph:
        hops = [("?x", "capital", "Paris"), ("?x", "border", "?y"), ("?y", "capital", "?city")]
        assert graph.query(hops) == [{"?x": "France", "?y": "Spain", "?city": "Madrid"}]
        mutual = [("?a", "border", "?b"), ("?b", "border", "?a")]
        assert [b["?a"] for b in graph.query(mutual)] == ["France", "Spain"]
        assert graph.query(mutual, limit=1) == [{"?a": "France", "?b": "Spain"}]
        assert graph.query([FACTS[0]]) == [{}] and graph.query([("France", "capital", "Rome")]) == []


def test_what_is_asked_is_a_parameter_and_never_sql(tmp_path):
    hostile = "x' OR 1=1; DROP TABLE triples; --"
    with TripleStore(tmp_path / "facts.db") as graph:
        graph.add([*FACTS, (hostile, "is", 'a "name"')])
        assert graph.match(hostile) == [(hostile, "is", 'a "name"')]
        assert graph.query([(hostile, "?r", "?o"), ("?o", hostile, "?" + hostile)]) == []
        assert graph.neighbours(hostile) == {hostile: 0, 'a "name"': 1}
        assert graph.paths(hostile, "France") == [] and len(graph) == 7
        assert graph.delete([(hostile, "is", 'a "name"'), ("not", "there", "!")]) == 1
    with TripleStore(tmp_path / "facts.db") as graph:
        assert graph.match() == sorted(FACTS)


@given(TRIPLES, TRIPLES)
def test_a_store_is_a_set(first, second):
    with store(first) as graph:
        assert graph.add(second) == len(set(second) - set(first))
        assert graph.delete(first) == len(set(first))
        assert set(graph.match()) == set(second) - set(first) and len(graph) == len(set(second) - set(first))


def test_a_join_without_end_is_stopped():
    with store([(f"a{i}", "r", f"b{i}") for i in range(300)]) as graph:
        with pytest.raises(ValueError, match="must make a join that ends"):
            graph.query([("?a", "?r", "?b"), ("?c", "?r", "?d"), ("?e", "?r", "?f")])
        assert len(graph.query([("?a", "r", "b7")])) == 1


# --------------------------------------------------------------------------------------------- neighbourhood


@pytest.mark.verifies("companion.rag.graph.TripleStore.neighbours", against="networkx.ego_graph")
@pytest.mark.parametrize("seed", range(4))
def test_neighbours(agree, seed):
    triples = random_triples(seed, names=30)
    mine = store(triples)
    for relations, hops in itertools.product([None, ["r"], ["r", "t"]], [1, 2, 3]):
        graph = undirected([t for t in triples if relations is None or t[1] in relations])
        for name in sorted(graph):
            found = mine.neighbours(name, hops, relations=relations)
            agree(sorted(found), sorted(nx.ego_graph(graph, name, hops)), tolerance=0, quantity="names")
            agree(
                found,
                dict(nx.single_source_shortest_path_length(graph, name, hops)),
                tolerance=0,
                quantity="distances",
            )
            assert list(found.values()) == sorted(found.values())
    assert mine.neighbours("nobody", 2) == {}


@pytest.mark.verifies("companion.rag.graph.TripleStore.paths", against="networkx.all_simple_edge_paths")
@pytest.mark.parametrize("seed", range(3))
def test_paths(agree, seed):
    triples = [t for t in random_triples(seed, names=9, count=20) if t[0] != t[2]]
    mine, graph = store(triples), undirected(triples, nx.MultiGraph)
    for a, b in itertools.permutations(sorted(graph), 2):
        for hops in (1, 4):
            paths = mine.paths(a, b, max_hops=hops, limit=10_000)
            theirs = {
                tuple(Triple._make(key) for _, _, key in path)
                for path in nx.all_simple_edge_paths(graph, a, b, cutoff=hops)
            }
            assert len(paths) == len(set(paths))
            agree(sorted(map(str, paths)), sorted(map(str, theirs)), tolerance=0, quantity="paths")
            assert [len(path) for path in paths] == sorted(len(path) for path in paths)
        if nx.has_path(graph, a, b) and paths:
            shortest = nx.shortest_path_length(graph, a, b)
            agree(len(paths[0]), shortest, tolerance=0, quantity="length of the first path")
            assert mine.paths(a, b, max_hops=4, limit=1) == paths[:1]
    assert mine.paths("n1", "n1") == [] and mine.paths("n1", "nobody") == []


def test_paths_follow_the_relations_that_are_named():
    with store([*FACTS, ("France", "currency", "EUR"), ("Portugal", "currency", "EUR")]) as graph:
        assert len(graph.paths("France", "Portugal", max_hops=2)[0]) == 2
        near = graph.paths("France", "Portugal", relations=["border"])
        assert [[t.subject for t in path] for path in near] == [["France", "Spain"], ["Spain", "Spain"]]


# --------------------------------------------------------------------------------------------------- linking


def regular_expression(text, names):
    """The leftmost longest name between borders of words, found in another way."""
    import re

    longest_first = "|".join(sorted(map(re.escape, names), key=len, reverse=True))
    return [(m.group().lower(), m.start()) for m in re.finditer(rf"\b(?:{longest_first})\b", text, re.I)]


WORDS = st.lists(
    st.sampled_from(["Niger", "niger", "Nigeria", "Congo", "Republic", "of", "the", "Guinea"]), max_size=12
)


@pytest.mark.verifies("companion.rag.graph.link_entities", against="re, alternatives by length")
@AGREEING
@given(words=WORDS, mark=st.sampled_from([" ", ", "]))
def test_linking(agree, words, mark):
    names = ["Niger", "Nigeria", "Congo", "Republic of the Congo", "Guinea", "the Guinea"]
    text = " ".join(words) + mark + "end"
    mine = [(m.text.lower(), m.start) for m in link_entities(text, names)]
    agree(
        list(map(str, mine)),
        list(map(str, regular_expression(text, names))),
        tolerance=0,
        quantity="mentions",
    )


def test_linking_by_hand():
    names = {
        "Niger": "NE",
        "Nigeria": "NG",
        "Washington D.C.": "DC",
        "Straße": "street",
        "美国": "US",
        "美": "beauty",
    }
    found = link_entities("NIGERIA, niger's; Washington, d.c.! STRASSE Nigerian 在美国的首都", names)
    assert [m.entity for m in found] == ["NG", "NE", "DC", "street", "US"]
    assert [m.text for m in found] == ["NIGERIA", "niger", "Washington, d.c", "STRASSE", "美国"]
    decomposed = "Sa\u0303o Tome\u0301"
    (mention,) = link_entities(f"in {decomposed}.", ["São Tomé"])
    assert (mention.entity, mention.text) == ("São Tomé", decomposed)
    assert link_entities("", names) == [] and link_entities("Niger", []) == []


@given(st.text(max_size=60), st.lists(st.text("ab 美ß'", min_size=1, max_size=4), max_size=4))
def test_mentions_lie_in_the_text_one_after_the_other(text, names):
    names = [name for name in names if any(sign.isalnum() for sign in name)]
    try:
        mentions = link_entities(text, names)
    except ValueError as error:  # "a b" and "a  b" are one name and two entities
        assert "one entity each" in str(error)
        return
    assert all(text[m.start : m.end] == m.text for m in mentions)
    assert all(a.end <= b.start for a, b in itertools.pairwise(mentions))


# ------------------------------------------------------------------------------------------------- sentences

TEMPLATES = {"capital": "The capital of {subject} is {object}.", "border": "{subject} borders {object}."}
PLACE = st.from_regex(r"[A-Z][a-z]{1,8}( [A-Z][a-z]{1,6})?", fullmatch=True)
PLACE = PLACE.filter(lambda name: not {"is", "borders"} & set(name.lower().split()))  # "… of Aa Is is Aa."


@pytest.mark.verifies("companion.rag.graph.extract_triples", against="write_triples, inverted")
@pytest.mark.verifies("companion.rag.graph.write_triples", against="extract_triples, inverted")
@AGREEING
@given(triples=st.lists(st.tuples(PLACE, st.sampled_from(sorted(TEMPLATES)), PLACE), unique=True, max_size=6))
def test_what_is_written_is_read(agree, triples):
    read = extract_triples(write_triples(triples, TEMPLATES), TEMPLATES)
    agree(list(map(tuple, read)), triples, tolerance=0, quantity="triples, there and back")


def test_sentences_by_hand():
    assert write_triples([("France", "calling_code", "33")]) == ["The calling code of France is 33."]
    assert write_triples([("{object}", "border", "{subject}")], TEMPLATES) == ["{object} borders {subject}."]
    forms = {"capital": [TEMPLATES["capital"], "{object} is {subject}'s capital."]}
    text = [
        "the capital  of France\nis Paris",
        "Lisbon is Portugal's capital.",
        "Is the capital of France nice?",
    ]
    assert extract_triples(text, forms) == [("France", "capital", "Paris"), ("Portugal", "capital", "Lisbon")]


# ----------------------------------------------------------------------------------------------- communities


@pytest.mark.verifies("companion.rag.graph.modularity", against="networkx.community.modularity")
@pytest.mark.parametrize("seed", range(4))
def test_modularity(agree, seed):
    graph = undirected(random_triples(seed))
    names = sorted(graph)
    groups = [names[i::4] for i in range(4)]
    graph.remove_edges_from(list(nx.selfloop_edges(graph)))
    theirs = nx.community.modularity(graph, groups)
    agree(modularity([*graph.edges, *graph.edges], groups), theirs, tolerance=1e-12, quantity="modularity")


@pytest.mark.verifies(
    "companion.rag.graph.find_communities", against="networkx.community.greedy_modularity_communities"
)
def test_communities(agree):
    known = [nx.karate_club_graph(), nx.les_miserables_graph(), nx.florentine_families_graph()]
    drawn = [nx.planted_partition_graph(4, 12, 0.7, 0.02, seed=seed) for seed in range(3)]
    for graph in (*known, *drawn):
        graph = nx.Graph(nx.relabel_nodes(graph, str).edges)
        mine, theirs = find_communities(graph.edges), nx.community.greedy_modularity_communities(graph)
        assert sorted(itertools.chain(*mine)) == sorted(graph)
        # Ties may fall either way: the partitions are as good as one another, and equal where nothing ties.
        agree(
            nx.community.modularity(graph, mine),
            nx.community.modularity(graph, theirs),
            tolerance=0.02,
            quantity="modularity of what is found",
        )
    for graph in drawn:
        graph = nx.Graph(nx.relabel_nodes(graph, str).edges)
        theirs = sorted(tuple(sorted(c)) for c in nx.community.greedy_modularity_communities(graph))
        agree(sorted(find_communities(graph.edges)), theirs, tolerance=0, quantity="partition")


def test_each_join_is_the_best_there_is():
    """Greedy by the definition: try every union, keep the best, as long as modularity rises."""
    graph = undirected(random_triples(7, names=14, count=22))
    graph.remove_edges_from(list(nx.selfloop_edges(graph)))
    groups = [frozenset([name]) for name in graph if graph.degree(name)]
    edges = list(graph.edges)
    value = modularity(edges, groups)
    while True:
        unions = [
            [g for g in groups if g not in pair] + [pair[0] | pair[1]]
            for pair in itertools.combinations(groups, 2)
        ]
        best = max(unions, key=lambda g: nx.community.modularity(graph.edge_subgraph(edges), g), default=None)
        if best is None or modularity(edges, best) <= value + 1e-12:
            break
        groups, value = best, modularity(edges, best)
    assert modularity(edges, find_communities(edges)) == pytest.approx(value, abs=0.02)


@pytest.mark.verifies("companion.rag.graph.summarise_community", against="networkx.MultiGraph.degree")
def test_summary(agree):
    triples = [t for t in random_triples(3) if t[0] != t[2]]
    members = {f"n{i}" for i in range(11)}
    inside = undirected(triples, nx.MultiGraph).subgraph(members)
    summary = summarise_community(triples, members, size=4)
    agree(
        [count for _, count in summary.entities],
        sorted((d for _, d in inside.degree), reverse=True)[:4],
        tolerance=0,
        quantity="degrees of the most connected",
    )
    assert all(inside.degree(name) == count for name, count in summary.entities)
    assert sum(count for _, count in summary.relations) == inside.number_of_edges()
    best = {name for name, _ in summary.entities}
    assert set(summary.facts) == {t for t in triples if {t[0], t[2]} <= best}
    assert str(summary).startswith("11 entities; most connected: ")
    assert isinstance(summary.facts[0], Triple) and find_communities([]) == [] == find_communities(
        [("a", "a")]
    )


# ------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda s: s.add([("a", "b")]), ValueError, r"triples\[0\] must be \(subject, relation, object\)"),
        (lambda s: s.add([("a", "b", "c"), ("a", "b", 3)]), TypeError, r"triples\[1\] must hold three str"),
        (lambda s: s.add([("a", "b", " ")]), ValueError, "must hold no empty text"),
        (lambda s: s.add([("a", "b", "?x")]), ValueError, r"must hold no variable, got '\?x'"),
        (lambda s: s.add([("a", "b", "c"), ("a", "b", "\ud800")]), ValueError, "surrogates not allowed"),
        (lambda s: s.delete(["abc"]), ValueError, r"triples\[0\] must be"),
        (lambda s: s.query([]), ValueError, "patterns must be 1 to 16 triples, got 0"),
        (lambda s: s.query([("?a", "b", "c")] * 17), ValueError, "got 17"),
        (lambda s: s.query([("?a", "b")]), ValueError, r"patterns\[0\] must be"),
        (lambda s: s.query([("?a", "b", "c")], limit=0), ValueError, "limit must be at least 1"),
        (lambda s: s.neighbours("France", 0), ValueError, "hops must be at least 1"),
        (lambda s: s.paths("France", "Spain", max_hops=0), ValueError, "max_hops must be at least 1"),
        (lambda s: link_entities("x", ["..."]), ValueError, "must hold letters or digits"),
        (lambda s: link_entities("x", {"A b": "1", "a-B": "2"}), ValueError, "must mean one entity each"),
        (lambda s: link_entities(3, []), TypeError, "text must be a str"),
        (lambda s: extract_triples([], {"r": "{subject} is"}), ValueError, r"templates\['r'\] must hold"),
        (lambda s: modularity([("a", "b")], [["a"]]), ValueError, "'b' is missing"),
        (lambda s: modularity([("a", "b")], [["a", "b"], ["b"]]), ValueError, "must not overlap"),
        (lambda s: modularity([], []), ValueError, "at least one edge"),
        (lambda s: summarise_community([], [], size=0), ValueError, "size must be at least 1"),
    ],
)
def test_bad_input(call, error, message):
    graph = store(FACTS)
    with pytest.raises(error, match=message):
        call(graph)
    assert graph.match() == sorted(FACTS)
