"""What is searched for in place of the question.

Each function is a prompt and a parser around a `ChatModel`; the answer of the model is a query, never a
command, and whatever it says is cut to a few short lines. Where nothing usable comes back, the question
itself is searched for: a transformation that fails costs a call, not the answer.

    rewrite     one better query                          Ma et al. (2023), rewrite–retrieve–read
    condense    a follow-up as a question that stands     Anantha et al. (2021)
    expand      several queries, fused by ranks           Rackauckas (2024), RAG-fusion
    step_back   the more general question behind it       Zheng et al. (2024)
    hyde        an invented answer, to embed              Gao et al. (2023)
    decompose   the questions it is made of               Press et al. (2023); Khot et al. (2023)
"""

import re
from collections.abc import Sequence

from companion._checks import check_positive
from companion.chat import ChatModel, Message, check_messages

MAX_CHARACTERS = 400  # of a query
MAX_QUESTION = 4000  # characters of a question that the model is shown
MAX_HISTORY = 8  # messages of a conversation that `condense` shows the model
# "- ", "2) ", "Query 1: ", also in a row, but not the minus or the point of a number.
LIST_MARK = re.compile(
    r"\s*(?:(?:[-*•]+(?!\d)|\(?\d{1,2}[.):](?!\d)|[a-z]\))\s*)*"
    r"(?:(?:search )?(?:query|question|answer|q|a)\s*\d*\s*:\s*)?",
    re.I,
)


def rewrite(model: ChatModel, question: str) -> str:
    """The question as a search query: what is asked for, without the talk around it."""
    system = (
        "Rewrite the user's message as one short web search query. Keep names, numbers and technical terms. "
        "Reply with the query alone."
    )
    examples = [
        (
            "hi, i was wondering, could you tell me when that tower in paris was built?",
            "Eiffel Tower year built",
        ),
        ("My friend says cats always land on their feet. Is that true?", "do cats always land on their feet"),
    ]
    return _first(_lines(_ask(model, system, question, examples, 48)), question)


def condense(model: ChatModel, history: Sequence[Message], question: str) -> str:
    """A follow-up question with what it refers to put in, so that it can be understood, and searched, alone.

    Args:
        history: the conversation before it, oldest first; the last eight messages are used.
    """
    _check_question(question)
    if not history:
        return question
    history = check_messages(history)
    system = (
        "Given a conversation and a follow-up question, rewrite the follow-up as a question that can be "
        "understood without the conversation. Replace pronouns by what they stand for. "
        "Reply with the question alone."
    )
    examples = [
        (
            "Conversation:\nuser: Who wrote Hamlet?\nassistant: William Shakespeare.\n\n"
            "Follow-up: When was he born?",
            "When was William Shakespeare born?",
        ),
        (
            "Conversation:\nuser: What is the capital of Peru?\nassistant: Lima.\n\n"
            "Follow-up: How many people live there?",
            "How many people live in Lima?",
        ),
    ]
    talk = "\n".join(
        f"{m.role}: {' '.join(m.content.split())[:MAX_CHARACTERS]}" for m in history[-MAX_HISTORY:]
    )
    said = _ask(model, system, f"Conversation:\n{talk}\n\nFollow-up: {question[:MAX_QUESTION]}", examples, 64)
    return _first(_lines(said), question)


def expand(model: ChatModel, question: str, count: int = 3) -> list[str]:
    """The question and up to `count` other wordings of it, all different."""
    check_positive("count", count)
    system = (
        f"Write {count} different search queries for the user's question, one on a line. Use other words."
    )
    examples = [
        (
            "Why is the sky blue?",
            "\n".join(
                [
                    "cause of the blue colour of the sky",
                    "Rayleigh scattering of sunlight",
                    "why does the sky look blue",
                ][:count]
            ),
        )
    ]
    others = _lines(_ask(model, system, question, examples, 32 * count, whole_lines=True))
    return list(dict.fromkeys([question, *others]))[: count + 1]


def step_back(model: ChatModel, question: str) -> str:
    """A more general question, whose answer holds the principle that the question needs."""
    system = (
        "Write one more general question behind the user's question, about the principle or the background. "
        "Reply with the question alone."
    )
    examples = [
        ("Does ice float on petrol?", "What decides whether a solid floats on a liquid?"),
        ("Which school did Ada Lovelace attend in 1830?", "What was Ada Lovelace's education?"),
    ]
    return _first(_lines(_ask(model, system, question, examples, 48)), question)


def hyde(model: ChatModel, question: str) -> str:
    """A passage that could be the answer, right or wrong: it is embedded in place of the question."""
    system = "Write one or two sentences of an encyclopedia that answer the user's question."
    examples = [
        (
            "How do bees make honey?",
            "Bees collect nectar, which enzymes in their stomachs break down; they store it in the comb and "
            "fan it until the water evaporates and honey is left.",
        )
    ]
    said = " ".join(_ask(model, system, question, examples, 96).split())[: 2 * MAX_CHARACTERS]
    return said or question


def decompose(model: ChatModel, question: str, count: int = 3) -> list[str]:
    """Up to `count` simpler questions that lead to the answer; the question itself if it is simple."""
    check_positive("count", count)
    system = (
        f"Split the user's question into at most {count} simpler questions, one on a line, in the order in "
        "which they must be answered. If it is simple already, repeat it."
    )
    examples = [
        (
            "What currency is used in the country whose capital is Oslo?",
            "Which country has the capital Oslo?\nWhat currency is used in that country?",
        ),
        ("Who wrote Hamlet?", "Who wrote Hamlet?"),
    ]
    parts = _lines(_ask(model, system, question, examples, 40 * count, whole_lines=True))
    return list(dict.fromkeys(parts))[:count] or [question]


def _ask(
    model: ChatModel,
    system: str,
    question: str,
    examples: Sequence[tuple[str, str]],
    max_tokens: int,
    whole_lines: bool = False,
) -> str:
    """The model's answer; where it was cut off and `whole_lines` are wanted, without its unfinished line."""
    _check_question(question)
    shown = [m for ask, reply in examples for m in (Message("user", ask), Message("assistant", reply))]
    messages = [Message("system", system), *shown, Message("user", question[: 2 * MAX_QUESTION])]
    pieces = list(model.stream(messages, max_tokens=max_tokens, temperature=0.0))
    said = "".join(piece.text for piece in pieces)
    if whole_lines and pieces and pieces[-1].finish == "length" and "\n" in said.strip():
        said = said.rpartition("\n")[0]
    return said


def _lines(said: str) -> list[str]:
    """The lines of an answer without list marks, labels and quotation marks, cut to a query's length."""
    lines = (line[LIST_MARK.match(line).end() :].strip("\"'“”`* ") for line in said.splitlines())
    return [line[:MAX_CHARACTERS] for line in lines if any(sign.isalnum() for sign in line)]


def _first(lines: list[str], question: str) -> str:
    return lines[0] if lines else question


def _check_question(question: str) -> None:
    if not isinstance(question, str):
        raise TypeError(f"question must be a str, got {type(question).__name__}")
    if not question.strip():
        raise ValueError("question must hold a word, got an empty text")
