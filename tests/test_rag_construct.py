"""companion.rag.construct: what a model may ask a database, and what nothing makes it do."""

import json
import sqlite3

import pytest
from hypothesis import given
from hypothesis import strategies as st

from companion.chat import ScriptedChatModel
from companion.rag.construct import (
    MAX_ROWS,
    Condition,
    ConstructionError,
    Schema,
    TableQuery,
    construct_query,
    fill_query,
    parse_query,
    run_query,
    run_select,
    to_sql,
)

SCHEMA = Schema({"countries": {"name": "text", "capital": "text", "population": "number"}})
ROWS = [
    ("Nepal", "Kathmandu", 27_646_053),
    ("France", "Paris", 66_078_000),
    ("Iceland", "Reykjavik", 327_386),
    ("Ålandia", "100%_sure!", None),
    ("Côte d'Ivoire", "Yamoussoukro", 23_821_000),
]


@pytest.fixture
def database(tmp_path):
    path = tmp_path / "world.db"
    with sqlite3.connect(path) as connection:
        connection.execute(
            "CREATE TABLE countries (name TEXT, capital TEXT, population INTEGER, secret TEXT)"
        )
        connection.execute("CREATE TABLE passwords (word TEXT)")
        connection.executemany("INSERT INTO countries VALUES (?, ?, ?, 'hidden')", ROWS)
        connection.execute("INSERT INTO passwords VALUES ('swordfish')")
    connection.close()
    return path


def _query(*conditions, columns=("name",), **options):
    return TableQuery("countries", columns, tuple(Condition(*c) for c in conditions), **options)


CASES = {
    "equal, whatever the case": (_query(("name", "=", "nepal")), lambda r: r[0] == "Nepal"),
    "different": (_query(("name", "!=", "Nepal")), lambda r: r[0] != "Nepal"),
    "larger": (_query(("population", ">", 327_386)), lambda r: r[2] and r[2] > 327_386),
    "at least": (_query(("population", ">=", 327_386)), lambda r: r[2] and r[2] >= 327_386),
    "between": (
        _query(("population", ">", 1e6), ("population", "<=", 27_646_053)),
        lambda r: r[2] and 1e6 < r[2] <= 27_646_053,
    ),
    "a part": (_query(("name", "contains", "LAND")), lambda r: "land" in r[0].lower()),
    "wildcards are signs": (_query(("capital", "contains", "%_")), lambda r: "%_" in r[1]),
    "an apostrophe": (_query(("name", "=", "Côte d'Ivoire")), lambda r: r[0] == "Côte d'Ivoire"),
}


@pytest.mark.verifies("companion.rag.construct.run_query", against="the rows that a loop keeps")
@pytest.mark.parametrize("case", CASES)
def test_rows(agree, database, case):
    query, keeps = CASES[case]
    mine = sorted(name for (name,) in run_query(database, query, SCHEMA))
    theirs = sorted(row[0] for row in ROWS if keeps(row))
    assert theirs
    agree(mine, theirs, tolerance=0, quantity="names")


@pytest.mark.verifies("companion.rag.construct.Condition", against="the same query in SQLite")
@pytest.mark.parametrize("case", CASES)
def test_records_that_match_are_the_rows(agree, database, case):
    query, _ = CASES[case]
    records = [dict(zip(("name", "capital", "population"), row, strict=True)) for row in ROWS]
    mine = [r["name"] for r in records if all(condition.matches(r) for condition in query.conditions)]
    theirs = [name for (name,) in run_query(database, query, SCHEMA)]
    agree(sorted(mine), sorted(theirs), tolerance=0, quantity="names")


@given(
    st.sampled_from(["=", "!=", "<", "<=", ">", ">="]),
    st.one_of(st.sampled_from([row[0] for row in ROWS]), st.text(max_size=5)),
    st.lists(
        st.one_of(st.sampled_from([row[0] for row in ROWS]), st.text(max_size=5)), min_size=1, max_size=4
    ),
)
def test_a_filter_matches_what_the_database_finds(operator, value, names):
    if any("\0" in text for text in (value, *names)):
        return  # SQLite's text ends there
    connection = sqlite3.connect(":memory:")
    connection.execute("CREATE TABLE countries (name TEXT)")
    connection.executemany("INSERT INTO countries VALUES (?)", [(name,) for name in names])
    sql, values = to_sql(_query(("name", operator, value)), SCHEMA)
    try:
        found = sorted(name for (name,) in connection.execute(sql, values))
    except UnicodeEncodeError:
        return  # a lone surrogate is no text
    finally:
        connection.close()
    condition = Condition("name", operator, value)
    assert found == sorted(name for name in names if condition.matches({"name": name}))


def test_a_record_without_the_column_does_not_match():
    assert not Condition("name", "!=", "x").matches({}) and not Condition("name", "=", "x").matches(
        {"name": None}
    )
    assert Condition("name", "contains", "LAND").matches({"name": "Iceland"})


def test_order_limit_and_aggregates(database):
    query = _query(
        ("population", ">", 0), columns=("name", "population"), order="population", descending=True, limit=2
    )
    assert run_query(database, query, SCHEMA) == [("France", 66_078_000), ("Nepal", 27_646_053)]
    numbers = [row[2] for row in ROWS if row[2]]
    for aggregate, expected in (
        ("count", len(numbers)),
        ("sum", sum(numbers)),
        ("mean", sum(numbers) / len(numbers)),
        ("smallest", min(numbers)),
        ("largest", max(numbers)),
    ):
        query = _query(columns=("population",), aggregate=aggregate)
        assert run_query(database, query, SCHEMA) == [(pytest.approx(expected),)]


# ---------------------------------------------------------------------------------------------------- parsing

GOOD = {
    "table": "countries",
    "columns": ["name", "population"],
    "conditions": [["population", ">", 1000000]],
    "order": "population",
    "descending": True,
    "limit": 3,
}


def test_the_json_of_an_answer_is_a_query():
    expected = TableQuery(
        "countries",
        ("name", "population"),
        (Condition("population", ">", 1000000),),
        None,
        "population",
        True,
        3,
    )
    for answer in (
        json.dumps(GOOD),
        f"Here it is:\n```json\n{json.dumps(GOOD, indent=1)}\n```",
        json.dumps(GOOD) + "}",
    ):
        assert parse_query(answer, SCHEMA) == expected
    model = ScriptedChatModel([json.dumps(GOOD)])
    assert construct_query(model, "Which are the largest?", SCHEMA) == expected
    assert "population number" in model.calls[0][0].content


VALUES = {"name": [row[0] for row in ROWS], "capital": [row[1] for row in ROWS]}


@pytest.fixture
def chooser(monkeypatch):
    """Stands in for a model: notes what it may choose from, and takes the last."""
    offered = []

    def choose(model, messages, options, memory=None):
        offered.append(list(options))
        return options[-1]

    monkeypatch.setattr("companion.rag.construct.choose", choose)
    return offered


@pytest.mark.verifies("companion.rag.construct.fill_query", against="the choices, by hand")
def test_slots_are_filled_with_what_can_be_there(agree, chooser):
    columns = ["name", "capital", "population"]
    cases = {
        "How many people live in Nepal?": [columns],  # one column, one value: nothing else to choose
        "Is Paris in France?": [columns, ["name", "capital"]],
        "How is the weather?": [
            columns,
            ["name", "capital"],
            sorted(VALUES["capital"], key=len, reverse=True),
        ],
    }
    filled = []
    for question, expected in cases.items():
        chooser.clear()
        query = fill_query(None, question, "countries", SCHEMA, VALUES)
        agree(
            [str(options) for options in chooser], [str(e) for e in expected], tolerance=0, quantity="choices"
        )
        filled.append((query.columns, query.conditions[0].column, query.conditions[0].value))
    assert filled == [
        (("population",), "name", "Nepal"),
        (("population",), "capital", "Paris"),
        (("population",), "capital", "Paris"),
    ]
    with pytest.raises(ConstructionError, match="values must be of columns"):
        fill_query(None, "?", "countries", SCHEMA, {"secret": ["x"]})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"table": "passwords"}, "there is no table 'passwords'"),
        ({"table": 'countries"; DROP TABLE countries; --'}, "there is no table"),
        ({"table": None}, "there is no table None"),
        ({"columns": ["secret"]}, "has no column 'secret'"),
        ({"columns": ["name, (SELECT word FROM passwords)"]}, "has no column"),
        ({"columns": []}, "columns must be at least one"),
        ({"columns": "name"}, "columns must be an array"),
        ({"columns": [["name"]]}, "columns must be an array"),
        ({"order": "random()"}, "has no column"),
        ({"order": ["name"]}, "has no column"),
        ({"aggregate": "load_extension"}, "there is no aggregate"),
        ({"aggregate": ["count"]}, "there is no aggregate"),
        ({"aggregate": "count"}, "an aggregate is of one column"),
        ({"conditions": [["name", "= '' OR 1=1 --", "x"]]}, "there is no operator"),
        ({"conditions": [["name", "=", {"a": 1}]]}, "must be a text or a number"),
        ({"conditions": [["name", "=", 3]]}, "holds a text, and cannot be compared with 3"),
        ({"conditions": [["population", ">", "1 OR 1=1"]]}, "holds a number"),
        ({"conditions": [["population", "contains", "1"]]}, "which contain nothing"),
        ({"conditions": [["population", ">", 10**30]]}, "too large"),
        ({"conditions": [["population", ">", float("nan")]]}, "too large"),
        ({"conditions": [["name", "=", "x" * 201]]}, "at most 200 characters"),
        ({"conditions": [["name", "=", "x"]] * 9}, "at most 8"),
        ({"conditions": [["name"]]}, "conditions must be arrays"),
        ({"limit": 0}, "limit must lie in 1 … 100"),
        ({"limit": 10**9}, "limit must lie in 1 … 100"),
        ({"limit": "3; DROP TABLE countries"}, "limit must lie in 1 … 100"),
        ({"descending": "DESC; --"}, "descending must be true or false"),
        ({"sql": "SELECT 1"}, "a query has no part 'sql'"),
    ],
)
def test_what_is_not_in_the_schema_is_refused(change, message):
    with pytest.raises(ConstructionError, match=message):
        parse_query(json.dumps({**GOOD, **change}), SCHEMA)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "SELECT * FROM countries",
        '{"table": "countries"',
        '{"a": 1, "a": 2}',
        "{" * 5000,
        "[1]",
        '{"x":' * 900,
    ],
)
def test_an_answer_that_is_no_object_is_refused(answer):
    with pytest.raises(ConstructionError, match="JSON object"):
        parse_query(answer, SCHEMA)


@given(st.text(max_size=60))
def test_no_value_leaves_its_place(value):
    sql, values = to_sql(_query(("name", "=", value), ("capital", "contains", value)), SCHEMA)
    condition = '"name" = ? COLLATE NOCASE AND "capital" LIKE ? ESCAPE \'!\''
    assert sql == f'SELECT "name" FROM "countries" WHERE {condition} LIMIT 100'
    assert values[0] == value and len(values) == 2


# ----------------------------------------------------------------------------- walls that stand by themselves


@pytest.mark.parametrize(
    "sql",
    [
        "DROP TABLE countries",
        "DELETE FROM countries",
        "UPDATE countries SET name = 'x'",
        "INSERT INTO countries (name) VALUES ('x')",
        "SELECT word FROM passwords",
        "SELECT name FROM countries UNION SELECT word FROM passwords",
        "SELECT (SELECT word FROM passwords) FROM countries",
        "SELECT secret FROM countries",
        "SELECT * FROM countries",
        "SELECT name FROM countries; DROP TABLE countries",
        "ATTACH DATABASE 'other.db' AS other",
        "PRAGMA table_info(countries)",
        "SELECT * FROM pragma_table_info('countries')",
        "SELECT sql FROM sqlite_schema",
        "SELECT load_extension('evil')",
        "SELECT randomblob(1000000000)",
        "SELECT printf('%.*c', 100000000, 'x') FROM countries",
        "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c) SELECT n FROM c",
        "CREATE TEMP TABLE t AS SELECT name FROM countries",
        "VACUUM INTO 'copy.db'",
        "BEGIN EXCLUSIVE",
        "not sql at all",
    ],
)
def test_the_database_itself_refuses(database, sql):
    before = database.read_bytes()
    with pytest.raises(ConstructionError, match="the database refuses the query"):
        run_select(database, sql, schema=SCHEMA)
    assert database.read_bytes() == before and sorted(p.name for p in database.parent.iterdir()) == [
        "world.db"
    ]


@pytest.mark.parametrize(
    "sql",
    [
        "DROP TABLE countries",
        "DELETE FROM countries",
        "UPDATE countries SET name = 'x'",
        "INSERT INTO countries (name) VALUES ('x')",
        "CREATE TABLE more (word TEXT)",
        "ATTACH DATABASE 'other.db' AS other",
    ],
)
def test_without_the_authoriser_nothing_is_changed_either(database, monkeypatch, sql):
    monkeypatch.setattr("companion.rag.construct._authoriser", lambda _: lambda *_: sqlite3.SQLITE_OK)
    before = database.read_bytes()
    with pytest.raises(ConstructionError, match="readonly database|too many attached"):
        run_select(database, sql, schema=SCHEMA)
    assert database.read_bytes() == before and sorted(p.name for p in database.parent.iterdir()) == [
        "world.db"
    ]


def test_an_honest_select_is_answered(database):
    rows = run_select(database, "SELECT name FROM countries WHERE population > ?", [10**7], SCHEMA)
    assert {name for (name,) in rows} == {"Nepal", "France", "Côte d'Ivoire"}


def test_work_and_rows_are_limited(database):
    join = "SELECT count(a.name) FROM " + ", ".join(f"countries {letter}" for letter in "abcdefghijkl")
    with pytest.raises(ConstructionError, match="it took too many steps"):
        run_select(database, join, schema=SCHEMA, max_steps=50_000)
    many = "SELECT a.name FROM countries a, countries b, countries c, countries d"
    assert len(run_select(database, many, schema=SCHEMA)) == MAX_ROWS


def test_no_file_is_made(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no database absent.db"):
        run_query(tmp_path / "absent.db", _query(), SCHEMA)
    (tmp_path / "noise.db").write_bytes(b"\0" * 5000)
    with pytest.raises(ConstructionError, match="refuses"):
        run_query(tmp_path / "noise.db", _query(), SCHEMA)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["noise.db"]


def test_a_schema_has_names_that_need_no_quotes():
    with pytest.raises(ValueError, match="identifiers for names"):
        Schema({'x"; --': {"a": "text"}})
    with pytest.raises(ValueError, match="must be one of 'text', 'number'"):
        Schema({"x": {"a": "blob"}})
