"""Constrained decoding: filters that let a model say only what is allowed.

A filter (see `companion.generate.sampling`) sees the tokens chosen so far and excludes every token that leads
out of the allowed texts; the model chooses among the rest. What comes out is well-formed by construction, and
nothing more: the model can still choose the wrong one of the allowed answers.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from companion._checks import check_positive


class OneOf:
    """Allow exactly the given sequences of ids, each followed by a stop id.

    Args:
        options: at least one sequence, none empty; one may begin with another.
        prompt_length: how many ids stand before the answer.
        stop_ids: allowed once an option is complete; the first of them is chosen among equals.
    """

    def __init__(self, options: Sequence[Sequence[int]], prompt_length: int, stop_ids: Sequence[int]):
        if not options or not all(options):
            raise ValueError("options must hold at least one sequence of ids, none of them empty")
        check_positive("prompt_length", prompt_length)
        self.prompt_length, self.stop_ids = prompt_length, _stops(stop_ids)
        self._trie: dict = {}
        for option in options:
            node = self._trie
            for token in option:
                node = node.setdefault(token, {})
            node.update(dict.fromkeys(self.stop_ids, {}))

    def __call__(self, logits: Tensor, ids: Tensor) -> Tensor:
        """(b, V), ids (b, n) → logits with −∞ where the option would be left."""
        rows = ids[:, self.prompt_length :].tolist()
        return _only(logits, [self.allowed(row) for row in rows])

    def allowed(self, said: Sequence[int]) -> Iterable[int]:
        """The ids that may come after the answer so far."""
        node = self._trie
        for token in said:
            if token not in node:
                raise ValueError(f"the answer so far, {said}, is the beginning of no option")
            node = node[token]
        return node or self.stop_ids


class Copying:
    """Allow only what stands, in a row, in one of the sources: an answer that is a quotation.

    Args:
        sources: sequences of ids, at least one of them not empty.
        prompt_length: how many ids stand before the answer.
        stop_ids: allowed after the first token. What must be said is at least one token.
        starts: of each source, the places where a quotation may begin, such as beginnings of words; every
            place where it is None.
        ends: likewise the places after which it may end.
        alternatives: further sequences that may be said instead, such as a refusal.
    """

    def __init__(
        self,
        sources: Sequence[Sequence[int]],
        prompt_length: int,
        stop_ids: Sequence[int],
        *,
        starts: Sequence[Iterable[int]] | None = None,
        ends: Sequence[Iterable[int]] | None = None,
        alternatives: Sequence[Sequence[int]] = (),
    ):
        check_positive("prompt_length", prompt_length)
        self.prompt_length, self.stop_ids = prompt_length, _stops(stop_ids)
        if not any(sources):
            raise ValueError("sources must hold at least one token")
        for name, places in (("starts", starts), ("ends", ends)):
            if places is not None and len(places) != len(sources):
                raise ValueError(f"{name} must be {len(sources)}, one for each source, got {len(places)}")
        self._tokens: list[int] = []  # all sources, each followed by −1, which no token is
        self._starts: list[int] = []
        self._ends: set[int] = set()
        for i, source in enumerate([*sources, *alternatives]):
            base, last = len(self._tokens), len(source) - 1
            whole = i >= len(sources)
            first = [0] if whole else range(len(source)) if starts is None else starts[i]
            final = [last] if whole else range(len(source)) if ends is None else ends[i]
            for name, places in (("starts", first), ("ends", final)):
                if any(not 0 <= place <= last for place in places):
                    raise ValueError(f"{name} must lie in the source, in 0 … {last}")
            self._starts += [base + place for place in first]
            self._ends.update(base + place for place in final)
            self._tokens += [*source, -1]

    def __call__(self, logits: Tensor, ids: Tensor) -> Tensor:
        """(b, V), ids (b, n) → logits with −∞ where the quotation would be left."""
        rows = ids[:, self.prompt_length :].tolist()
        return _only(logits, [self.allowed(row) for row in rows])

    def places(self, said: Sequence[int]) -> list[tuple[int, int]]:
        """Where the sources say this: (place of its first token, of its last), in all sources in a row."""
        tokens, size = self._tokens, len(said)
        said = list(said)
        return [(p, p + size - 1) for p in self._starts if tokens[p : p + size] == said] if said else []

    def allowed(self, said: Sequence[int]) -> set[int]:
        """The ids that may come after the answer so far."""
        if not said:
            return {self._tokens[place] for place in self._starts}
        found = self.places(said)
        if not found:
            raise ValueError(f"the answer so far, {said}, stands in no source")
        allowed = {self._tokens[last + 1] for _, last in found} - {-1}
        if not allowed or any(last in self._ends for _, last in found):
            allowed.update(self.stop_ids)
        return allowed


def _only(logits: Tensor, allowed: Sequence[Iterable[int]]) -> Tensor:
    kept = torch.full_like(logits, -torch.inf)
    for row, tokens in enumerate(allowed):
        index = torch.tensor(sorted(tokens), device=logits.device)
        kept[row, index] = logits[row, index]
    return kept


def _stops(stop_ids: Sequence[int]) -> tuple[int, ...]:
    if not stop_ids:
        raise ValueError("stop_ids must hold at least one id, or an answer cannot end")
    return tuple(stop_ids)
