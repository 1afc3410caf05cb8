"""A knowledge graph: facts as triples, asked by patterns (after Hogan et al., 2021).

A triple (subject, relation, object) is an edge with a name. The store keeps each once, in SQLite, whose three
indexes answer every form of `match`. A `query` is a basic graph pattern of SPARQL: triples in which "?x"
stands for anything, the same thing wherever it stands; it becomes one SQL join, in which names are parameters
and never text. `link_entities` finds the graph's entities in a question, `extract_triples` facts in a text,
`write_triples` turns facts into sentences for a prompt. `find_communities` and `summarise_community` show
what questions about the whole are answered from (GraphRAG: Edge et al., 2024).
"""

import heapq
import json
import re
import sqlite3
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from companion._checks import check_positive

PARTS = ("subject", "relation", "object")
MAX_PATTERNS = 16
MAX_STEPS = 20_000_000  # of SQLite's virtual machine, for one query


class Triple(NamedTuple):
    """One fact."""

    subject: str
    relation: str
    object: str


class TripleStore:
    """Triples in SQLite, each once.

    Args:
        path: of the database, created where it is missing; in memory by default.

    A store is a context manager that closes itself. What is changed is on disk when the method returns.
    """

    def __init__(self, path: str | Path = ":memory:"):
        self._db = sqlite3.connect(path)
        with self._db:
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS triples (subject TEXT NOT NULL, relation TEXT NOT NULL,"
                " object TEXT NOT NULL, PRIMARY KEY (subject, relation, object)) WITHOUT ROWID"
            )
            self._db.execute("CREATE INDEX IF NOT EXISTS by_relation ON triples (relation, object)")
            self._db.execute("CREATE INDEX IF NOT EXISTS by_object ON triples (object, subject)")

    def __enter__(self) -> "TripleStore":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __len__(self) -> int:
        return self._db.execute("SELECT count(*) FROM triples").fetchone()[0]

    def close(self) -> None:
        self._db.close()

    def add(self, triples: Iterable[tuple[str, str, str]]) -> int:
        """Add triples, all or none; how many were new. A part is a text that does not begin with "?"."""
        rows = list(triples)
        for i, row in enumerate(rows):
            _check_triple(f"triples[{i}]", row)
            if variables := [part for part in row if part.startswith("?")]:
                raise ValueError(f"triples[{i}] must hold no variable, got {variables[0]!r}")
        return self._change("INSERT OR IGNORE INTO triples VALUES (?, ?, ?)", rows)

    def delete(self, triples: Iterable[tuple[str, str, str]]) -> int:
        """Take triples out, all or none; how many were there. One that is not there is no error."""
        rows = list(triples)
        for i, row in enumerate(rows):
            _check_triple(f"triples[{i}]", row)
        return self._change("DELETE FROM triples WHERE subject = ? AND relation = ? AND object = ?", rows)

    def match(
        self, subject: str | None = None, relation: str | None = None, object: str | None = None
    ) -> list[Triple]:
        """The triples with these parts, sorted; None stands for any."""
        wanted = dict(zip(PARTS, (subject, relation, object), strict=True))
        given = {part: text for part, text in wanted.items() if text is not None}
        where = " AND ".join(f"{part} = ?" for part in given) or "TRUE"
        rows = self._db.execute(
            f"SELECT * FROM triples WHERE {where} ORDER BY 1, 2, 3", tuple(given.values())
        )
        return [Triple(*row) for row in rows]

    def query(self, patterns: Sequence[tuple[str, str, str]], *, limit: int = 1000) -> list[dict[str, str]]:
        """What the variables can stand for: every binding {"?x": …} that makes all patterns triples.

        Args:
            patterns: 1 to 16 triples whose parts may be variables, texts that begin with "?". Two variables
                may stand for the same thing. Patterns without variables give [{}] where they hold.
            limit: at most so many bindings, the first in the order of the variables.

        Raises ValueError for a malformed pattern and for a join that is too large to finish.
        """
        if isinstance(patterns, str) or not 1 <= len(patterns) <= MAX_PATTERNS:
            raise ValueError(f"patterns must be 1 to {MAX_PATTERNS} triples, got {len(patterns)}")
        check_positive("limit", limit)
        places: dict[str, str] = {}  # variable → the column where it first stands
        conditions, values = ["TRUE"], []
        for i, pattern in enumerate(patterns):
            _check_triple(f"patterns[{i}]", pattern)
            for part, text in zip(PARTS, pattern, strict=True):
                column = f"t{i}.{part}"
                if not text.startswith("?"):
                    conditions.append(f"{column} = ?")
                    values.append(text)
                elif (first := places.setdefault(text, column)) != column:
                    conditions.append(f"{column} = {first}")
        columns = ", ".join(places.values()) or "1"
        tables = ", ".join(f"triples t{i}" for i in range(len(patterns)))
        sql = f"SELECT DISTINCT {columns} FROM {tables} WHERE {' AND '.join(conditions)}"
        self._db.set_progress_handler(lambda: 1, MAX_STEPS)
        try:
            rows = self._db.execute(f"{sql} ORDER BY {columns} LIMIT ?", (*values, limit)).fetchall()
        except sqlite3.OperationalError as error:
            raise ValueError(f"patterns must make a join that ends, this one did not: {error}") from error
        finally:
            self._db.set_progress_handler(None, 0)
        return [dict(zip(places, row, strict=False)) for row in rows]

    def neighbours(
        self, entity: str, hops: int = 1, *, relations: Sequence[str] | None = None
    ) -> dict[str, int]:
        """Everything within some steps of an entity, itself included: name → distance, the nearest first.

        Args:
            hops: edges to follow, forwards or backwards, at least 1.
            relations: the edges to follow; all where it is None. A graph in which values are nodes, as
                ("France", "currency", "EUR"), is small in diameter: name the relations that mean nearness.

        An entity that no triple names gives {}.
        """
        check_positive("hops", hops)
        known = "SELECT 1 FROM triples WHERE subject = :name OR object = :name"
        if self._db.execute(known, {"name": entity}).fetchone() is None:
            return {}
        distances, frontier = {entity: 0}, [entity]
        for distance in range(1, hops + 1):
            found = {name for edge in self._edges(frontier, relations) for name in (edge[0], edge[2])}
            frontier = sorted(found - distances.keys())
            distances |= dict.fromkeys(frontier, distance)
        return distances

    def paths(
        self,
        start: str,
        end: str,
        *,
        max_hops: int = 3,
        limit: int = 100,
        relations: Sequence[str] | None = None,
    ) -> list[tuple[Triple, ...]]:
        """Ways from one entity to another that visit none twice, the shortest first.

        Args:
            max_hops: edges of a path, each followed forwards or backwards.
            limit: at most so many paths. The number of paths grows exponentially with `max_hops`.
            relations: the edges to follow; all where it is None.

        Two edges between the same entities make two paths. No path leads from an entity to itself.
        """
        check_positive("max_hops", max_hops)
        check_positive("limit", limit)
        to_end = self.neighbours(end, max_hops, relations=relations)

        def walk(path: tuple[Triple, ...], visited: tuple[str, ...], left: int) -> Iterator:
            if left == 0:
                yield path
                return
            for edge in sorted(self._edges([visited[-1]], relations)):
                step = edge.object if edge.subject == visited[-1] else edge.subject
                # The end comes last, and what is too far from it leads nowhere.
                if step not in visited and to_end.get(step, left) < left and (step != end or left == 1):
                    yield from walk((*path, edge), (*visited, step), left - 1)

        if start == end or start not in to_end:
            return []
        lengths = range(to_end[start], max_hops + 1)
        return list(islice((path for n in lengths for path in walk((), (start,), n)), limit))

    def _edges(self, names: Sequence[str], relations: Sequence[str] | None) -> list[Triple]:
        """Triples that hold one of the names at either end."""
        chosen = "TRUE" if relations is None else "relation IN (SELECT value FROM json_each(:relations))"
        names_ = "IN (SELECT value FROM json_each(:names))"
        rows = self._db.execute(
            f"SELECT * FROM triples WHERE subject {names_} AND {chosen} UNION "
            f"SELECT * FROM triples WHERE object {names_} AND {chosen}",
            {"names": json.dumps(list(names)), "relations": json.dumps(list(relations or ()))},
        )
        return [Triple(*row) for row in rows]

    def _change(self, sql: str, rows: list) -> int:
        with self._db:
            return self._db.executemany(sql, rows).rowcount if rows else 0


def _check_triple(name: str, triple: Sequence[str]) -> None:
    if isinstance(triple, str) or not isinstance(triple, Sequence) or len(triple) != 3:
        raise ValueError(f"{name} must be (subject, relation, object), got {triple!r}")
    for part in triple:
        if not isinstance(part, str):
            raise TypeError(f"{name} must hold three str, got {type(part).__name__}")
        if not part.strip():
            raise ValueError(f"{name} must hold no empty text, got {tuple(triple)!r}")


# ------------------------------------------------------------------------------------------- text to entities

_LONE = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"  # kana and Han
_WORD = re.compile(rf"[{_LONE}]|(?:(?![{_LONE}])[^\W_][\u0300-\u036f]*)+")


@dataclass(frozen=True, slots=True)
class Mention:
    """A place where a text names an entity: `text` is text[start:end] of it."""

    entity: str
    text: str
    start: int
    end: int


def link_entities(text: str, names: Mapping[str, str] | Iterable[str]) -> list[Mention]:
    """Where a text names entities, from left to right: at each word the longest name that begins there.

    Args:
        names: name or alias → entity; or entities that are called what they are. Case, accents written in
            one sign or two, and what stands between words make no difference: "washington, d.c." is
            "Washington D.C.". Names of Chinese or Japanese, which do not part words, are found anywhere.

    Only what is listed is found, and a name means the same in every context.
    """
    if not isinstance(text, str):
        raise TypeError(f"text must be a str, got {type(text).__name__}")
    pairs = names.items() if isinstance(names, Mapping) else ((name, name) for name in names)
    entities: dict[tuple[str, ...], str] = {}
    for name, entity in pairs:
        key = tuple(word for word, _, _ in _words(name))
        if not key:
            raise ValueError(f"names must hold letters or digits, got {name!r}")
        if entities.setdefault(key, entity) != entity:
            raise ValueError(
                f"names must mean one entity each, {name!r} means {entities[key]!r} and {entity!r}"
            )
    longest = max(map(len, entities), default=0)
    words = _words(text)
    mentions, i = [], 0
    while i < len(words):
        for n in range(min(longest, len(words) - i), 0, -1):
            entity = entities.get(tuple(word for word, _, _ in words[i : i + n]))
            if entity is not None:
                start, end = words[i][1], words[i + n - 1][2]
                mentions.append(Mention(entity, text[start:end], start, end))
                break
        else:
            n = 1
        i += n
    return mentions


def _words(text: str) -> list[tuple[str, int, int]]:
    """Words as they are compared, each with its place."""
    return [
        (unicodedata.normalize("NFKC", word.group()).casefold(), *word.span())
        for word in _WORD.finditer(text)
    ]


# ----------------------------------------------------------------------------------------- text and triples

DEFAULT_TEMPLATE = "The {relation} of {subject} is {object}."


def write_triples(
    triples: Iterable[tuple[str, str, str]], templates: Mapping[str, str] | None = None
) -> list[str]:
    """A sentence for each triple.

    Args:
        templates: relation → sentence with {subject} and {object}; a relation without one is written with
            `DEFAULT_TEMPLATE`, its underscores as spaces.
    """
    sentences = []
    for subject, relation, value in triples:
        parts = {"subject": subject, "relation": relation.replace("_", " "), "object": value}
        template = (templates or {}).get(relation, DEFAULT_TEMPLATE)
        # One pass: a name that reads "{object}" stays a name.
        sentences.append(re.sub(r"\{(subject|relation|object)\}", lambda m, p=parts: p[m[1]], template))
    return sentences


def extract_triples(sentences: Iterable[str], templates: Mapping[str, str | Sequence[str]]) -> list[Triple]:
    """The triples that sentences state in known forms: `write_triples` read backwards (after Hearst, 1992).

    Args:
        sentences: each is held against every template, as a whole.
        templates: relation → one or several sentences with {subject} and {object}. White space and case make
            no difference, and a full stop at the end may be missing.

    What is said in another form is missed; what has the form and not the meaning is taken. A name that holds
    a word of its template is cut at the first place that fits.
    """
    forms = [
        (relation, _form(relation, template))
        for relation, given in templates.items()
        for template in ([given] if isinstance(given, str) else given)
    ]
    found: dict[Triple, None] = {}
    for sentence in sentences:
        text = " ".join(sentence.split())
        for relation, form in forms:
            if match := form.fullmatch(text):
                found[Triple(match["subject"], relation, match["object"])] = None
    return list(found)


def _form(relation: str, template: str) -> re.Pattern:
    parts = re.split(r"(\{subject\}|\{object\})", " ".join(template.split()).removesuffix("."))
    if sorted(parts[1::2]) != ["{object}", "{subject}"]:
        raise ValueError(
            f"templates[{relation!r}] must hold {{subject}} and {{object}} once, got {template!r}"
        )
    groups = {"{subject}": r"(?P<subject>\S(?:.*?\S)?)", "{object}": r"(?P<object>\S(?:.*?\S)?)"}
    return re.compile("".join(groups.get(part) or re.escape(part) for part in parts) + r"\.?", re.IGNORECASE)


# ---------------------------------------------------------------------------------------------- communities

Edge = tuple[str, str]


def modularity(edges: Iterable[Edge], communities: Sequence[Iterable[str]]) -> float:
    """Share of the edges inside communities, less what chance would put there (Newman & Girvan, 2004).

    Q = Σ_c (l_c / m − (d_c / 2m)²), with m edges, l_c of them inside community c, d_c the sum of its degrees.

    Args:
        edges: undirected; repeated ones and loops do not count.
        communities: each name of an edge in exactly one.
    """
    links, communities = _links(edges), [tuple(members) for members in communities]
    home = {name: i for i, members in enumerate(communities) for name in members}
    if missing := sorted(links.keys() - home.keys()):
        raise ValueError(f"communities must hold every name of an edge, {missing[0]!r} is missing")
    if len(home) < sum(map(len, communities)):
        raise ValueError("communities must not overlap")
    twice_m = sum(map(len, links.values()))
    if not twice_m:
        raise ValueError("edges must hold at least one edge between two names, got none")
    inside = sum(home[a] == home[b] for a in links for b in links[a])
    degrees = Counter()
    for name, others in links.items():
        degrees[home[name]] += len(others)
    return inside / twice_m - sum((degree / twice_m) ** 2 for degree in degrees.values())


def find_communities(edges: Iterable[Edge]) -> list[tuple[str, ...]]:
    """Communities by greedy modularity (Clauset, Newman & Moore, 2004), the largest first, members sorted.

    At first each name is a community; the two whose union raises modularity most are joined, until none does.
    The Leiden algorithm, which GraphRAG uses, also moves single members back and finds better ones.

    Args:
        edges: undirected; repeated ones and loops do not count.
    """
    by_name = _links(edges)
    number = {name: i for i, name in enumerate(sorted(by_name))}
    members = {i: [name] for name, i in number.items()}
    links = {i: {number[other]: 1 for other in by_name[name]} for name, i in number.items()}
    degrees = {i: len(others) for i, others in links.items()}
    twice_m = sum(degrees.values())

    def loss(i: int, j: int) -> int:
        """−ΔQ · 2 m², in whole numbers, so that ties are ties."""
        return degrees[i] * degrees[j] - twice_m * links[i][j]

    heap = [(loss(i, j), i, j) for i in links for j in links[i] if i < j]
    heapq.heapify(heap)
    for new in range(len(members), 2 * len(members)):
        # A union gets a number of its own: an entry of the heap holds as long as both its numbers live.
        while heap and not (heap[0][1] in members and heap[0][2] in members):
            heapq.heappop(heap)
        if not heap or heap[0][0] >= 0:
            break
        _, i, j = heapq.heappop(heap)
        members[new] = members.pop(i) + members.pop(j)
        degrees[new] = degrees.pop(i) + degrees.pop(j)
        links[new] = dict(Counter(links.pop(i)) + Counter(links.pop(j)))
        for old in (i, j):
            links[new].pop(old, None)
        for other, count in links[new].items():
            for old in (i, j):
                links[other].pop(old, None)
            links[other][new] = count
            heapq.heappush(heap, (loss(new, other), other, new))
    return sorted((tuple(sorted(names)) for names in members.values()), key=lambda c: (-len(c), c))


@dataclass(frozen=True, slots=True)
class CommunitySummary:
    """What stands out in a community.

    Attributes:
        size: number of its members.
        entities: the members with most triples inside it, (name, number).
        relations: the most frequent relations inside it, (name, number).
        facts: triples between those entities.
    """

    size: int
    entities: tuple[tuple[str, int], ...]
    relations: tuple[tuple[str, int], ...]
    facts: tuple[Triple, ...]

    def __str__(self) -> str:
        def listed(counts):
            return ", ".join(f"{name} ({count})" for name, count in counts)

        return f"{self.size} entities; most connected: {listed(self.entities)}; {listed(self.relations)}"


def summarise_community(
    triples: Iterable[tuple[str, str, str]], community: Iterable[str], *, size: int = 5
) -> CommunitySummary:
    """The most connected members of a community and its most frequent relations, `size` of each.

    GraphRAG has a language model write such a summary, from facts in this order, as many as its window holds.
    """
    check_positive("size", size)
    members = set(community)
    inside = [Triple(*t) for t in triples if t[0] in members and t[2] in members and t[0] != t[2]]
    degrees = Counter(name for triple in inside for name in (triple.subject, triple.object))
    entities = sorted(degrees.items(), key=lambda item: (-item[1], item[0]))[:size]
    relations = Counter(triple.relation for triple in inside)
    best = {name for name, _ in entities}
    return CommunitySummary(
        len(members),
        tuple(entities),
        tuple(sorted(relations.items(), key=lambda item: (-item[1], item[0]))[:size]),
        tuple(sorted(t for t in inside if t.subject in best and t.object in best)),
    )


def _links(edges: Iterable[Edge]) -> dict[str, set[str]]:
    links: dict[str, set[str]] = defaultdict(set)
    for a, b in edges:
        if a != b:
            links[a].add(b)
            links[b].add(a)
    return dict(links)
