"""Routing: which of several ways a question should take, and how sure that is.

Three routers with one method. Rules are fast, readable and blind to other words; vectors compare a question
with examples of each route; a model is asked. Each gives a route and a confidence, so that what is not sure
enough can go to a default.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from companion._checks import check_number, check_positive
from companion.chat import LocalChatModel, Message
from companion.rag.prompt import PromptMemory, choose


@dataclass(frozen=True, slots=True)
class Route:
    """A decision.

    Attributes:
        name: of the route.
        confidence: in [0, 1]; what it means is the router's to say.
    """

    name: str
    confidence: float


class RuleRouter:
    """The first route one of whose patterns occurs in the question; the default, with confidence 0, else.

    Args:
        rules: route → regular expressions, in order; case does not matter.
        default: the route where none fits.
    """

    def __init__(self, rules: Mapping[str, Sequence[str]], default: str):
        _check_lists("rules", rules)
        self.rules = {
            name: [re.compile(p, re.IGNORECASE) for p in patterns] for name, patterns in rules.items()
        }
        self.default = default

    def __call__(self, question: str) -> Route:
        """The route of a question; confidence 1 where a rule decides."""
        _check_question(question)
        for name, patterns in self.rules.items():
            if any(pattern.search(question) for pattern in patterns):
                return Route(name, 1.0)
        return Route(self.default, 0.0)


class EmbeddingRouter:
    """The route whose examples are nearest: a k-nearest-neighbour vote among embedded examples.

    Args:
        encode: from n texts to vectors (n, d) of length 1.
        examples: route → questions that take it, at least one each.
        default: where the confidence is below the threshold; None where there is no default.
        threshold: of the confidence, in [0, 1].
        neighbours: how many examples vote, each with the softmax weight of its cosine.
        temperature: of that softmax; smaller lets the nearest decide.
    """

    def __init__(
        self,
        encode: Callable[[Sequence[str]], object],
        examples: Mapping[str, Sequence[str]],
        *,
        default: str | None = None,
        threshold: float = 0.0,
        neighbours: int = 5,
        temperature: float = 0.1,
    ):
        _check_lists("examples", examples)
        check_positive("neighbours", neighbours)
        check_number("threshold", threshold)
        check_number("temperature", temperature)
        if not 0 <= threshold <= 1 or temperature <= 0:
            raise ValueError(
                f"threshold must lie in [0, 1] and temperature above 0, got {threshold} and {temperature}"
            )
        if threshold and default is None:
            raise ValueError(
                f"default must name a route where there is a threshold, got None and {threshold}"
            )
        self.encode, self.default, self.threshold = encode, default, threshold
        self.neighbours, self.temperature = neighbours, temperature
        self.names = list(examples)
        texts = [text for questions in examples.values() for text in questions]
        self._routes = np.repeat(
            np.arange(len(self.names)), [len(questions) for questions in examples.values()]
        )
        self._vectors = np.asarray(encode(texts))
        if self._vectors.ndim != 2 or len(self._vectors) != len(texts):
            raise ValueError(f"encode must give ({len(texts)}, d) vectors, got {self._vectors.shape}")

    def __call__(self, question: str) -> Route:
        """The route with the largest share of the votes; the share is the confidence."""
        _check_question(question)
        (vector,) = np.asarray(self.encode([question]))
        cosines = self._vectors @ vector
        nearest = np.argsort(-cosines, kind="stable")[: self.neighbours]
        weights = np.exp((cosines[nearest] - cosines[nearest[0]]) / self.temperature)
        votes = np.bincount(self._routes[nearest], weights, minlength=len(self.names)) / weights.sum()
        best = int(votes.argmax())
        if self.default is not None and votes[best] < self.threshold:
            return Route(self.default, float(votes[best]))
        return Route(self.names[best], float(votes[best]))


class ModelRouter:
    """The route that a language model names, held to naming one of them.

    Args:
        model: a model on this machine, whose tokens can be constrained.
        routes: route → what it is for, in a few words.
        examples: pairs of a question and its route, shown to the model as earlier turns.
    """

    def __init__(
        self, model: LocalChatModel, routes: Mapping[str, str], examples: Sequence[tuple[str, str]] = ()
    ):
        if len(routes) < 2:
            raise ValueError(f"routes must be at least two, got {len(routes)}")
        if unknown := [name for _, name in examples if name not in routes]:
            raise ValueError(f"examples must name routes, got {unknown[0]!r}")
        self.model, self.routes, self.examples = model, dict(routes), tuple(examples)
        self._memory = PromptMemory(1)  # of the instructions, which every question shares

    def __call__(self, question: str) -> Route:
        """The route that the model chooses; the confidence is 1, for it gives none."""
        _check_question(question)
        kinds = "\n".join(f"{name}: {purpose}" for name, purpose in self.routes.items())
        shown = [m for ask, name in self.examples for m in (Message("user", ask), Message("assistant", name))]
        system = Message("system", f"Name the kind of the user's question. The kinds:\n{kinds}")
        messages = [system, *shown, Message("user", question)]
        return Route(choose(self.model, messages, list(self.routes), memory=self._memory), 1.0)


def _check_lists(name: str, lists: Mapping[str, Sequence[str]]) -> None:
    if not lists:
        raise ValueError(f"{name} must hold at least one route, got none")
    for route, texts in lists.items():
        if isinstance(texts, str):  # would be taken for a list of its letters
            raise TypeError(f"{name}[{route!r}] must be a sequence of str, got one str")
        if not texts:
            raise ValueError(f"{name}[{route!r}] must hold at least one text, got none")


def _check_question(question: str) -> None:
    if not isinstance(question, str):
        raise TypeError(f"question must be a str, got {type(question).__name__}")
