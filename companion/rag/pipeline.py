"""The whole way from documents to an answer.

Load, split, embed, store; then, for each question, transform, retrieve, fuse, rerank, pack, generate, check.
A `Pipeline` is a store of passages with what is done before and after it. Every step leaves a `Stage` in the
trace: what came in, what went out, how long it took. The steps are functions that can be exchanged; the
defaults are the smallest that work: dense and sparse retrieval fused by ranks, and a sentence quoted from a
passage for an answer.
"""

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from companion._checks import check_choice, check_positive
from companion.chat import ChatModel, LocalChatModel
from companion.rag.evaluate import contains_answer
from companion.rag.fusion import reciprocal_rank_fusion
from companion.rag.load import Document
from companion.rag.prompt import (
    PLAIN,
    REFUSAL,
    SYSTEM,
    CitationReport,
    build_messages,
    check_citations,
    pack,
    quote,
)
from companion.rag.sparse import BM25, Analyser, analyse_english
from companion.rag.split import Passage
from companion.rag.store import VectorStore

ANSWERS = ("quote", "free")
DIGEST = "sha256"  # the key of a passage's metadata that says which text of its document it was cut from


@dataclass(frozen=True, slots=True)
class Stage:
    """One step: its name, its seconds, and what is worth knowing of it."""

    name: str
    seconds: float
    detail: dict


@dataclass
class Trace:
    """The steps of one run, in order."""

    stages: list[Stage] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str) -> Iterator[dict]:
        """Time a step; what is put into the dictionary is its detail."""
        detail: dict = {}
        start = time.perf_counter()
        yield detail
        self.stages.append(Stage(name, time.perf_counter() - start, detail))

    @property
    def seconds(self) -> float:
        """Of all steps together."""
        return sum(stage.seconds for stage in self.stages)

    def __str__(self) -> str:
        return "\n".join(
            f"{stage.name:10} {1000 * stage.seconds:9.1f} ms   "
            + ", ".join(f"{key} {value}" for key, value in stage.detail.items())
            for stage in self.stages
        )


@dataclass(frozen=True)
class Answer:
    """What was answered, from what, and how far it can be checked.

    Attributes:
        text: the answer; of a quotation, with the number of its source in brackets.
        passages: the sources in the order of their numbers, from 1.
        report: what checking the citations found.
        log_prob: mean log-probability of a quotation's tokens; None for a free answer.
        trace: the steps.
    """

    text: str
    passages: tuple[Passage, ...]
    report: CitationReport
    log_prob: float | None
    trace: Trace


class Pipeline:
    """Retrieval-augmented generation over one store.

    Args:
        store: holds the passages and their vectors.
        encode: from n texts to their vectors (n, d): the model that the store is named after.
        model: answers; None where nothing but retrieval is wanted.
        transform: from a question to the queries that are searched for instead (rewriting, several of them,
            a hypothetical answer); the question itself where it is None.
        rerank: from a question and passages to new scores, one a passage.
        answer: "quote" holds the model to a sentence of a passage, which needs a `LocalChatModel`; "free"
            lets it write, and checks its citations afterwards.
        refuse_below: a quotation whose mean log-probability is lower becomes a refusal.
        candidates: passages that each search gives.
        keep: passages that are given to the model at most.
        budget: tokens that these may take together.
        count_tokens: the length of a text in tokens; words where it is None.
        order: of the passages in the prompt, see `companion.rag.prompt.pack`.
        analyse: for the sparse search; None searches by vectors alone.
    """

    def __init__(
        self,
        store: VectorStore,
        encode: Callable[[Sequence[str]], object],
        model: ChatModel | None = None,
        *,
        transform: Callable[[str], Sequence[str]] | None = None,
        rerank: Callable[[str, Sequence[Passage]], Sequence[float]] | None = None,
        answer: str = "quote",
        refuse_below: float = -math.inf,
        candidates: int = 20,
        keep: int = 4,
        budget: int = 600,
        count_tokens: Callable[[str], int] | None = None,
        order: str = "best_first",
        analyse: Analyser | None = analyse_english,
    ):
        check_choice("answer", answer, ANSWERS)
        for name, value in (("candidates", candidates), ("keep", keep), ("budget", budget)):
            check_positive(name, value)
        if answer == "quote" and model is not None and not isinstance(model, LocalChatModel):
            raise TypeError(
                f'answer "quote" constrains the tokens of a LocalChatModel, got a {type(model).__name__}: '
                'use answer="free"'
            )
        self.store, self.encode, self.model = store, encode, model
        self.transform, self.rerank = transform, rerank
        self.answer, self.refuse_below = answer, refuse_below
        self.candidates, self.keep, self.budget, self.order = candidates, keep, budget, order
        self.count_tokens = count_tokens or (lambda text: len(text.split()))
        self.analyse = analyse
        self._sparse: tuple[BM25, list[str]] | None = None

    def index(self, documents: Sequence[Document], split: Callable[[Document], Sequence[Passage]]) -> Trace:
        """Bring the store to hold exactly these documents.

        A document whose text is stored already costs nothing, a changed one is cut and embedded again, one
        that is not there any more is removed. Documents without text are passed over.
        """
        trace = Trace()
        with trace.stage("compare") as detail:
            digests = {
                document.id: hashlib.sha256(document.text.encode()).hexdigest() for document in documents
            }
            stored = {p.document: p.metadata.get(DIGEST) for p in self.store.passages()}
            gone = [id for id in stored if stored[id] != digests.get(id)]
            new = [document for document in documents if stored.get(document.id) != digests[document.id]]
            detail.update(
                documents=len(documents), new_or_changed=len(new), removed=len(set(gone) - set(digests))
            )
        with trace.stage("split") as detail:
            passages = [
                Passage(
                    id=p.id,
                    text=p.text,
                    document=p.document,
                    start=p.start,
                    end=p.end,
                    metadata={**p.metadata, DIGEST: digests[document.id]},
                )
                for document in new
                for p in split(document)
                if p.text.strip()
            ]
            detail.update(passages=len(passages))
        with trace.stage("embed") as detail:
            vectors = np.asarray(self.encode([p.text for p in passages])) if passages else None
            detail.update(vectors=0 if vectors is None else len(vectors))
        with trace.stage("store") as detail:
            for document in gone:
                self.store.delete_document(document)
            if passages:
                self.store.add(passages, vectors)
            detail.update(passages=len(self.store))
        self._sparse = None
        return trace

    def retrieve(self, question: str, trace: Trace | None = None) -> list[tuple[Passage, float]]:
        """Passages and scores, the best first: fused, and reranked where there is a reranker."""
        if not isinstance(question, str) or not question.strip():
            raise ValueError(f"question must be a text, got {question!r}")
        trace = Trace() if trace is None else trace
        with trace.stage("transform") as detail:
            queries = [question] if self.transform is None else list(self.transform(question))
            detail.update(queries=len(queries))
        passages: dict[str, Passage] = {}
        rankings = []
        with trace.stage("dense") as detail:
            for vector in np.asarray(self.encode(queries)):
                found = self.store.search(vector, self.candidates)
                passages.update((passage.id, passage) for passage, _ in found)
                rankings.append([passage.id for passage, _ in found])
            detail.update(found=len(passages))
        if self.analyse is not None and len(self.store):
            with trace.stage("sparse") as detail:
                index, ids = self._sparse_index()
                rows = index.search(queries, self.candidates)[1]
                lists = [[ids[row] for row in found if row >= 0] for found in rows]
                new = list(dict.fromkeys(id for found in lists for id in found if id not in passages))
                passages.update(zip(new, self.store.get(new), strict=True))
                rankings += lists
                detail.update(found=len(set().union(*lists)))
        with trace.stage("fuse") as detail:
            ranked = [(passages[id], score) for id, score in reciprocal_rank_fusion(rankings)]
            detail.update(lists=len(rankings), passages=len(ranked))
        if self.rerank is not None and ranked:
            with trace.stage("rerank") as detail:
                ranked = ranked[: self.candidates]
                scores = self.rerank(question, [passage for passage, _ in ranked])
                ranked = [(p, float(s)) for (p, _), s in zip(ranked, scores, strict=True)]
                ranked.sort(key=lambda item: -item[1])
                detail.update(passages=len(ranked))
        return ranked

    def ask(self, question: str) -> Answer:
        """Answer a question from the store."""
        if self.model is None:
            raise ValueError("model must be given to answer; retrieve needs none")
        trace = Trace()
        found = [passage for passage, _ in self.retrieve(question, trace)]
        with trace.stage("pack") as detail:
            chosen = pack(found[: self.keep], self.budget, self.count_tokens, order=self.order)
            system = PLAIN if self.answer == "quote" else SYSTEM
            messages = build_messages(question, chosen, system=system)
            detail.update(passages=len(chosen), tokens=sum(self.count_tokens(p.text) for p in chosen))
        log_prob = None
        with trace.stage("generate") as detail:
            if self.answer == "quote" and chosen:
                said = quote(self.model, messages, chosen)
                text, log_prob = f"{said.text} [{chosen.index(said.passage) + 1}]", said.log_prob
                text = REFUSAL if log_prob < self.refuse_below else text
            elif self.answer == "quote":
                text = REFUSAL
            else:
                text = self.model.complete(messages, max_tokens=128).strip()
            detail.update(characters=len(text))
        with trace.stage("check") as detail:
            report = check_citations(text, chosen)
            detail.update(claims=len(report.claims), refused=report.refused, supported=report.is_supported)
        return Answer(text, tuple(chosen), report, log_prob, trace)

    def evaluate(self, cases: Sequence[tuple[str, Sequence[str]]]) -> dict[str, np.ndarray]:
        """Ask questions whose answers are known: one number a question, for `companion.rag.evaluate`.

        Args:
            cases: pairs of a question and its accepted answers.

        Four arrays: "retrieved", 1 where a passage given to the model holds an accepted answer, else 0;
        "answered", 1 where the answer does; "supported", 1 where its citations hold its words; and "seconds",
        from question to answer.
        """
        rows = []
        for question, truths in cases:
            answer = self.ask(question)
            retrieved = any(contains_answer(passage.text, truths) for passage in answer.passages)
            answered = contains_answer(answer.text, truths)
            rows.append((retrieved, answered, answer.report.is_supported, answer.trace.seconds))
        table = np.array(rows, dtype=float).reshape(-1, 4)
        return dict(zip(("retrieved", "answered", "supported", "seconds"), table.T, strict=True))

    def _sparse_index(self) -> tuple[BM25, list[str]]:
        """BM25 over the store's passages, built when it is first needed after a change."""
        if self._sparse is None:
            passages = list(self.store.passages())
            texts, ids = [p.text for p in passages], [p.id for p in passages]
            self._sparse = BM25(texts, analyse=self.analyse), ids
        return self._sparse
