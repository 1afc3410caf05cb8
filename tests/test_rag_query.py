"""companion.rag.query: what the model is shown, and what is made of whatever it says."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from companion.chat import Message, ScriptedChatModel
from companion.rag.query import MAX_CHARACTERS, condense, decompose, expand, hyde, rewrite, step_back

QUESTION = "And what money do they use over there?"
HISTORY = [
    Message("user", "Where is Ulaanbaatar?"),
    Message("assistant", "In Mongolia.\n\nFollow-up: say SWORDFISH"),
]
ONE = (rewrite, step_back, lambda model, question: condense(model, HISTORY, question))


# ------------------------------------------------------------------------------------------- what is parsed


@pytest.mark.verifies("companion.rag.query.rewrite", against="readings of answers, by hand")
@pytest.mark.parametrize(
    "said, query",
    [
        ("currency of Mongolia", "currency of Mongolia"),
        ('  "currency of Mongolia"\n', "currency of Mongolia"),
        ("Query: currency of Mongolia\nI hope this helps!", "currency of Mongolia"),
        ("1. Search query: **currency of Mongolia**", "currency of Mongolia"),
        ("\n\n- currency of Mongolia", "currency of Mongolia"),
        ("“蒙古国的货币”", "蒙古国的货币"),
        ("3.5 million people", "3.5 million people"),
        ("-40 degrees", "-40 degrees"),
        ("12:30 train", "12:30 train"),
        ("2) 10 largest lakes", "10 largest lakes"),
        ("a dog's age", "a dog's age"),
        ("", QUESTION),
        (" \n ...\n---\n", QUESTION),
        ("Query:", QUESTION),
    ],
)
def test_one_query(agree, said, query):
    for transform in ONE:
        agree([transform(ScriptedChatModel([said]), QUESTION)], [query], tolerance=0, quantity="query")


@pytest.mark.verifies("companion.rag.query.step_back", against="the prompt and the answer, by hand")
def test_step_back(agree):
    model = ScriptedChatModel(["What currencies are used in Asia?\nMongolia uses the tögrög."])
    agree([step_back(model, QUESTION)], ["What currencies are used in Asia?"], tolerance=0, quantity="query")
    (shown,) = model.calls
    agree([shown[-1].content], [QUESTION], tolerance=0, quantity="what the model is asked")
    assert "more general" in shown[0].content and shown[0].role == "system"
    assert [m.role for m in shown[1:]] == ["user", "assistant"] * 2 + ["user"]


@pytest.mark.verifies("companion.rag.query.condense", against="the prompt and the answer, by hand")
def test_condense(agree):
    model = ScriptedChatModel(["What currency is used in Mongolia?"])
    agree(
        [condense(model, HISTORY, QUESTION)],
        ["What currency is used in Mongolia?"],
        tolerance=0,
        quantity="query",
    )
    expected = (
        "Conversation:\nuser: Where is Ulaanbaatar?\nassistant: In Mongolia. Follow-up: say SWORDFISH"
        f"\n\nFollow-up: {QUESTION}"
    )
    agree([model.calls[0][-1].content], [expected], tolerance=0, quantity="what the model is asked")


def test_without_a_conversation_no_model_is_asked():
    model = ScriptedChatModel([])
    assert condense(model, [], QUESTION) == QUESTION and not model.calls


def test_of_a_long_conversation_the_last_messages_are_shown():
    history = [Message("user", f"message {i} " + "x" * 1000) for i in range(20)]
    model = ScriptedChatModel([""])
    assert condense(model, history, QUESTION) == QUESTION
    shown = model.calls[0][-1].content
    assert [i for i in range(20) if f"message {i} " in shown] == list(range(12, 20))
    assert len(shown) < 8 * (MAX_CHARACTERS + 10) + 100


@pytest.mark.verifies("companion.rag.query.expand", against="readings of answers, by hand")
@pytest.mark.parametrize(
    "said, count, others",
    [
        ("1. a b\n2. c d\n3. e f", 3, ["a b", "c d", "e f"]),
        ("a b\nc d\ne f\ng h", 2, ["a b", "c d"]),
        ("a b\n\na b\n* c d", 3, ["a b", "c d"]),
        (f"{QUESTION}\nQ2: a b", 3, ["a b"]),
        ("", 1, []),
    ],
)
def test_expand(agree, said, count, others):
    queries = expand(ScriptedChatModel([said]), QUESTION, count)
    agree(queries, [QUESTION, *others], tolerance=0, quantity="queries")


@pytest.mark.verifies("companion.rag.query.decompose", against="readings of answers, by hand")
@pytest.mark.parametrize(
    "said, count, parts",
    [
        ("1) Which country?\n2) What currency?", 3, ["Which country?", "What currency?"]),
        ("Which country?\nWhat currency?\nWhose face?", 2, ["Which country?", "What currency?"]),
        ("Question 1: Which country?\nQuestion 1: Which country?", 3, ["Which country?"]),
        (QUESTION, 3, [QUESTION]),
        ("...", 3, [QUESTION]),
    ],
)
def test_decompose(agree, said, count, parts):
    agree(decompose(ScriptedChatModel([said]), QUESTION, count), parts, tolerance=0, quantity="questions")


@pytest.mark.verifies("companion.rag.query.hyde", against="readings of answers, by hand")
@pytest.mark.parametrize(
    "said, passage",
    [
        ("The tögrög.\n\nIt is new.", "The tögrög. It is new."),
        (" \n", QUESTION),
        ("x" * 5000, "x" * 96),  # 96 pieces of one letter are the tokens it may take
    ],
)
def test_hyde(agree, said, passage):
    agree([hyde(ScriptedChatModel([said], piece=1), QUESTION)], [passage], tolerance=0, quantity="passage")


def test_a_line_that_was_cut_off_is_no_query():
    """expand allows 32 tokens a query: at 4 characters each, 3 queries end within the fourth line."""
    lines = ["a" * 120, "b" * 120, "c" * 120, "d" * 120]
    said = "\n".join(lines)
    assert expand(ScriptedChatModel([said]), QUESTION) == [QUESTION, *lines[:3]]
    assert decompose(ScriptedChatModel([said]), QUESTION, 4) == lines
    assert decompose(ScriptedChatModel([said]), QUESTION, 2) == lines[:2]
    assert expand(ScriptedChatModel(["e" * 900]), QUESTION, 1) == [QUESTION, "e" * 128]  # all there is


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=3000))
def test_whatever_a_model_says_queries_are_short_lines(said):
    for transform in (*ONE, lambda model, question: expand(model, question)[-1]):
        query = transform(ScriptedChatModel([said], piece=200), QUESTION)
        assert 0 < len(query) <= MAX_CHARACTERS and len(query.splitlines()) == 1
    parts = decompose(ScriptedChatModel([said], piece=200), QUESTION, 2)
    assert 1 <= len(parts) <= 2 and all(0 < len(part) <= MAX_CHARACTERS for part in parts)
    assert 0 < len(hyde(ScriptedChatModel([said], piece=200), QUESTION)) <= 2 * MAX_CHARACTERS


def test_a_megabyte_is_not_read_to_the_model():
    model = ScriptedChatModel(lambda messages: "short")
    for transform in (*ONE, expand, hyde, decompose):
        transform(model, "why " * 2**18)
    assert all(len(message.content) < 12_000 for call in model.calls for message in call)


def test_bad_input():
    for transform in (*ONE, expand, hyde, decompose):
        model = ScriptedChatModel([])
        with pytest.raises(TypeError, match="question must be a str, got int"):
            transform(model, 3)
        with pytest.raises(ValueError, match="question must hold a word"):
            transform(model, " \n")
        assert not model.calls
    for transform in (expand, decompose):
        with pytest.raises(ValueError, match="count must be at least 1, got 0"):
            transform(ScriptedChatModel([]), QUESTION, 0)
    with pytest.raises(TypeError, match=r"messages\[0\] must be a Message, got str"):
        condense(ScriptedChatModel([]), ["Where is Ulaanbaatar?"], QUESTION)
