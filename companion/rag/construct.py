"""Query construction: from words to a filter, or to SQL, that can do no harm.

What a language model writes is never executed. It is parsed into a `TableQuery`, of which every part is
looked up in a `Schema`: a table, a column or an operator that is not on the list is refused, and values
travel as parameters, in which no sign has a meaning. The SQL is written by `to_sql` alone. `run_query` opens
the database read-only, lets SQLite itself refuse everything but reading the listed columns (its authoriser is
asked about every access while a statement is prepared), and stops after a number of steps and rows. A hole in
one of these walls leaves the others.
"""

import json
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from companion._checks import check_choice, check_positive
from companion.chat import ChatModel, LocalChatModel, Message
from companion.rag.prompt import PromptMemory, choose

OPERATORS = {"=": "=", "!=": "<>", "<": "<", "<=": "<=", ">": ">", ">=": ">=", "contains": "LIKE"}
AGGREGATES = {"count": "count", "sum": "total", "mean": "avg", "smallest": "min", "largest": "max"}
MAX_ROWS = 100
MAX_STEPS = 2_000_000  # of SQLite's virtual machine
MAX_CONDITIONS = 8
MAX_TEXT = 200  # characters of a value
MAX_ANSWER = 4000  # characters of a model's answer that are parsed


class ConstructionError(ValueError):
    """An answer that is no query of the schema."""


@dataclass(frozen=True)
class Schema:
    """What may be asked for.

    Args:
        tables: table → column → "text" or "number". Names are identifiers: letters, digits and underscores.
    """

    tables: Mapping[str, Mapping[str, str]]

    def __post_init__(self):
        for table, columns in self.tables.items():
            for name in (table, *columns):
                if not (isinstance(name, str) and name.isascii() and name.isidentifier()):
                    raise ValueError(f"tables must have identifiers for names, got {name!r}")
            for kind in columns.values():
                check_choice("the kind of a column", kind, ("text", "number"))

    def kind(self, table: str, column: str) -> str:
        """What a column holds; a ConstructionError where it is not listed."""
        if not isinstance(table, str) or table not in self.tables:
            raise ConstructionError(
                f"there is no table {_shown(table)}; the tables are {', '.join(self.tables)}"
            )
        columns = self.tables[table]
        if not isinstance(column, str) or column not in columns:
            raise ConstructionError(
                f"table {table} has no column {_shown(column)}; its columns are {', '.join(columns)}"
            )
        return columns[column]


@dataclass(frozen=True, slots=True)
class Condition:
    """column operator value, such as population >= 1000000 or name contains "land"."""

    column: str
    operator: str
    value: str | float

    def matches(self, record: Mapping) -> bool:
        """Whether a record, a passage's metadata for example, fulfils it; one without the column does not.

        Text compares without regard to the case of ASCII letters, as the SQL of `to_sql` does.
        """
        if (own := record.get(self.column)) is None:
            return False
        value = self.value
        if isinstance(value, str):
            own, value = _folded(str(own)), _folded(value)
        return {
            "=": lambda: own == value,
            "!=": lambda: own != value,
            "<": lambda: own < value,
            "<=": lambda: own <= value,
            ">": lambda: own > value,
            ">=": lambda: own >= value,
            "contains": lambda: str(value) in str(own),
        }[self.operator]()


@dataclass(frozen=True, slots=True)
class TableQuery:
    """A question to one table.

    Attributes:
        table: its name.
        columns: what is asked for.
        conditions: all of which must hold.
        aggregate: "count", "sum", "mean", "smallest" or "largest" of the one column; None for the rows.
        order: column to sort by; None for none. descending: the largest first.
        limit: rows at most.
    """

    table: str
    columns: tuple[str, ...]
    conditions: tuple[Condition, ...] = ()
    aggregate: str | None = None
    order: str | None = None
    descending: bool = False
    limit: int = MAX_ROWS


def parse_query(answer: str, schema: Schema) -> TableQuery:
    """A query from the JSON object in a model's answer, checked against the schema.

    The object's keys are those of `TableQuery`; a condition is an array of column, operator and value. Text
    around the object is passed over. Everything that is not in the schema is a `ConstructionError`.
    """
    record = _json_object(answer)
    if unknown := set(record) - set(TableQuery.__dataclass_fields__):
        raise ConstructionError(f"a query has no part {_shown(sorted(unknown)[0])}")
    conditions = record.get("conditions") or []
    if not isinstance(conditions, list) or not all(isinstance(c, list) and len(c) == 3 for c in conditions):
        raise ConstructionError("conditions must be arrays of column, operator and value")
    columns = record.get("columns")
    if not isinstance(columns, list) or not all(isinstance(column, str) for column in columns):
        raise ConstructionError("columns must be an array of names")
    return check_query(
        TableQuery(
            record.get("table"),
            tuple(columns),
            tuple(Condition(*condition) for condition in conditions),
            record.get("aggregate"),
            record.get("order"),
            record.get("descending") or False,
            MAX_ROWS if record.get("limit") is None else record["limit"],
        ),
        schema,
    )


def check_query(query: TableQuery, schema: Schema) -> TableQuery:
    """The query as it is, or a ConstructionError that says what the schema does not allow."""
    if not query.columns or len(set(query.columns)) < len(query.columns):
        raise ConstructionError("columns must be at least one, and different")
    for column in (*query.columns, *([] if query.order is None else [query.order])):
        schema.kind(query.table, column)
    if len(query.conditions) > MAX_CONDITIONS:
        raise ConstructionError(f"conditions must be at most {MAX_CONDITIONS}, got {len(query.conditions)}")
    for condition in query.conditions:
        _check_condition(condition, schema.kind(query.table, condition.column))
    if query.aggregate is not None:
        if not isinstance(query.aggregate, str) or query.aggregate not in AGGREGATES:
            raise ConstructionError(f"there is no aggregate {_shown(query.aggregate)}")
        if len(query.columns) != 1:
            raise ConstructionError("an aggregate is of one column")
        if query.aggregate in ("sum", "mean") and schema.kind(query.table, query.columns[0]) != "number":
            raise ConstructionError(
                f"the {query.aggregate} of {query.columns[0]}, which holds text, is not defined"
            )
    if not isinstance(query.descending, bool):
        raise ConstructionError("descending must be true or false")
    if isinstance(query.limit, bool) or not isinstance(query.limit, int) or not 1 <= query.limit <= MAX_ROWS:
        raise ConstructionError(f"limit must lie in 1 … {MAX_ROWS}, got {_shown(query.limit)}")
    return query


def to_sql(query: TableQuery, schema: Schema) -> tuple[str, list]:
    """The query as one SELECT with ? for every value, and the values.

    Names are written from the schema, after it was checked that they are in it. `contains` becomes LIKE with
    its two wildcards escaped.
    """
    check_query(query, schema)
    columns = ", ".join(f'"{column}"' for column in query.columns)
    if query.aggregate is not None:
        columns = f"{AGGREGATES[query.aggregate]}({columns})"
    sql, values = f'SELECT {columns} FROM "{query.table}"', []
    for i, condition in enumerate(query.conditions):
        sql += " AND " if i else " WHERE "
        text = isinstance(condition.value, str)
        if condition.operator == "contains":
            sql += f"\"{condition.column}\" LIKE ? ESCAPE '!'"
            escaped = str(condition.value).replace("!", "!!").replace("%", "!%").replace("_", "!_")
            values.append(f"%{escaped}%")
        else:
            sql += f'"{condition.column}" {OPERATORS[condition.operator]} ?' + (
                " COLLATE NOCASE" if text else ""
            )
            values.append(condition.value)
    if query.order is not None and query.aggregate is None:
        sql += f' ORDER BY "{query.order}"' + (" DESC" if query.descending else "")
    return f"{sql} LIMIT {query.limit:d}", values


def run_query(
    database: str | Path,
    query: TableQuery,
    schema: Schema,
    *,
    max_steps: int = MAX_STEPS,
) -> list[tuple]:
    """The rows that a query gives on a SQLite file; the file is not changed, whatever the query is."""
    return run_select(database, *to_sql(query, schema), schema, max_steps=max_steps)


def run_select(
    database: str | Path,
    sql: str,
    values: Sequence = (),
    schema: Schema | None = None,
    *,
    max_steps: int = MAX_STEPS,
) -> list[tuple]:
    """One SELECT, from wherever it comes, behind the walls that do not depend on how it was written.

    The connection is read-only; SQLite refuses every statement that is not a SELECT, every table and column
    that the schema does not list, every function but the aggregates; more than `max_steps` steps of its
    machine or 100 rows are an error, or cut off.

    Raises:
        ConstructionError: SQLite refused the statement, or it took too long.
        FileNotFoundError: there is no such file.
    """
    check_positive("max_steps", max_steps)
    path = Path(database)
    if not path.is_file():
        raise FileNotFoundError(f"there is no database {path.name}")
    steps = 0

    def progress():
        nonlocal steps
        steps += 1000
        return steps > max_steps

    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as connection:
            connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 2**20)  # bytes of a value or a statement
            connection.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
            connection.set_authorizer(_authoriser({} if schema is None else schema.tables))
            connection.set_progress_handler(progress, 1000)
            return connection.execute(sql, values).fetchmany(MAX_ROWS)
    except (sqlite3.Error, sqlite3.Warning, ValueError) as error:
        reason = "it took too many steps" if steps > max_steps else str(error)
        raise ConstructionError(f"the database refuses the query: {reason}") from error


def construct_query(
    model: ChatModel, question: str, schema: Schema, examples: Sequence[tuple[str, str]] = ()
):
    """Let a model write a `TableQuery` as JSON, and parse it.

    Args:
        examples: pairs of a question and the JSON of its query, shown as earlier turns.

    Raises ConstructionError where the answer is no query of the schema.
    """
    tables = "\n".join(
        f"{table}({', '.join(f'{column} {kind}' for column, kind in columns.items())})"
        for table, columns in schema.tables.items()
    )
    system = (
        f"Translate the question into a query, as one JSON object.\nTables:\n{tables}\n"
        f"Operators: {', '.join(OPERATORS)}. Aggregates: {', '.join(AGGREGATES)}."
    )
    shown = [m for ask, reply in examples for m in (Message("user", ask), Message("assistant", reply))]
    messages = [Message("system", system), *shown, Message("user", question)]
    return parse_query(model.complete(messages, max_tokens=160, temperature=0.0), schema)


def fill_query(
    model: LocalChatModel,
    question: str,
    table: str,
    schema: Schema,
    values: Mapping[str, Sequence[str]],
    examples: Sequence[tuple[str, str, str, str]] = (),
    *,
    memory: PromptMemory | None = None,
) -> TableQuery:
    """A query with one equality, slot by slot: a small model only chooses, and cannot write anything else.

    Three choices: the column that is asked for, the column of the condition, and its value among those that
    the column has and the question names (all of them where it names none).

    Args:
        values: column → the values that stand in it, of the columns that may be compared.
        examples: (question, asked column, compared column, value), shown as earlier turns.
        memory: spares the reading of tasks and examples where many questions are asked.
    """
    columns = list(schema.tables.get(table, ()))
    if not set(values) <= set(columns) or not values:
        raise ConstructionError(f"values must be of columns of {_shown(table)}")

    def ask(slot: int, task: str, options: Sequence[str]) -> str:
        shown = [m for e in examples for m in (Message("user", e[0]), Message("assistant", e[slot]))]
        if len(options) == 1:
            return options[0]
        messages = [Message("system", task), *shown, Message("user", question)]
        return choose(model, messages, options, memory=memory)

    asked = ask(1, f"Which of {', '.join(columns)} does the question ask for?", columns)
    named = {
        column: [value for value in options if _folded(value) in _folded(question)]
        for column, options in values.items()
    }
    where = [column for column in values if named[column]] or list(values)
    column = ask(2, f"Which of {', '.join(where)} does the question give?", where)
    options = sorted(named[column] or values[column], key=len, reverse=True)
    value = options[0] if named[column] else ask(3, f"Which {column} does the question name?", options)
    return check_query(TableQuery(table, (asked,), (Condition(column, "=", value),)), schema)


def _authoriser(allowed: Mapping[str, Mapping[str, str]]) -> Callable[..., int]:
    """What SQLite asks about each access of a statement: it may select, and read what is listed."""
    functions = {"like", *AGGREGATES.values()}

    def authorise(action, first, second, *_):
        if action == sqlite3.SQLITE_SELECT:
            return sqlite3.SQLITE_OK
        if action == sqlite3.SQLITE_READ and first in allowed and (not second or second in allowed[first]):
            return sqlite3.SQLITE_OK
        if action == sqlite3.SQLITE_FUNCTION and second in functions:
            return sqlite3.SQLITE_OK
        return sqlite3.SQLITE_DENY

    return authorise


def _check_condition(condition: Condition, kind: str) -> None:
    if not isinstance(condition.operator, str) or condition.operator not in OPERATORS:
        raise ConstructionError(f"there is no operator {_shown(condition.operator)}")
    value = condition.value
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ConstructionError(
            f"the value of {condition.column} must be a text or a number, got {_shown(value)}"
        )
    if isinstance(value, str) and len(value) > MAX_TEXT:
        raise ConstructionError(f"the value of {condition.column} must be at most {MAX_TEXT} characters long")
    if not isinstance(value, str) and not abs(value) < 2**62:  # also refuses NaN
        raise ConstructionError(f"the value of {condition.column} is too large: {_shown(value)}")
    if condition.operator == "contains" and kind != "text":
        raise ConstructionError(f"{condition.column} holds numbers, which contain nothing")
    if isinstance(value, str) != (kind == "text"):
        raise ConstructionError(
            f"{condition.column} holds a {kind}, and cannot be compared with {_shown(value)}"
        )


def _json_object(answer: str) -> dict:
    """The first JSON object in a text, of bounded length and without repeated keys."""
    answer = answer[:MAX_ANSWER]
    if (start := answer.find("{")) < 0:
        raise ConstructionError("the answer holds no JSON object")

    def unique(pairs):
        if len({key for key, _ in pairs}) < len(pairs):
            raise ConstructionError("the JSON object has a key twice")
        return dict(pairs)

    try:
        record, _ = json.JSONDecoder(object_pairs_hook=unique).raw_decode(answer, start)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ConstructionError(f"the answer holds no whole JSON object: {error}") from None
    return record


def _folded(text: str) -> str:
    return "".join(sign.lower() if sign.isascii() else sign for sign in text)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:59] + "…"
