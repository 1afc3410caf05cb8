"""`python -m companion rag`: index a folder of documents, and ask it."""

from pathlib import Path
from typing import Annotated

import typer

from companion.cli import Model, Server, chat_model, note, one_line_errors

STORE = ".companion-rag.db"  # in the indexed folder, where the loader passes over it
PASSAGE = 600  # characters of a passage
OVERLAP = 120

app = typer.Typer(
    help="Answer questions from a folder of documents (text, Markdown, HTML, PDF), on this machine.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)


@app.command()
@one_line_errors
def index(
    folder: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="The documents.")],
) -> None:
    """Cut the documents of a folder into passages, embed these with MiniLM, and store them there.

    What did not change since the last time is not embedded again; what is gone is forgotten. Files that
    cannot be read are named and left out. The store is the file .companion-rag.db in the folder.

    Example:

    - python -m companion rag index ~/notes
    """
    from companion.rag.load import load
    from companion.rag.pipeline import Pipeline
    from companion.rag.split import split_sentences

    skipped: list = []
    documents = load(folder, skipped=skipped)
    for error in skipped:
        note(f"Left out: {error}")
    encode, dimension, name = encoder()
    with _store(folder, dimension, name) as store:
        trace = Pipeline(store, encode).index(
            documents, lambda document: split_sentences(document, PASSAGE, OVERLAP)
        )
    detail = trace.stages[0].detail
    changes = f"{detail['new_or_changed']} new or changed, {detail['removed']} removed"
    passages = trace.stages[-1].detail["passages"]
    note(f"{detail['documents']} documents, {changes}; {passages} passages, {trace.seconds:.1f} s")


@app.command()
@one_line_errors
def ask(
    question: Annotated[str, typer.Argument(help="What you want to know.")],
    folder: Annotated[
        Path,
        typer.Option(exists=True, file_okay=False, help="A folder that was indexed.", show_default="here"),
    ] = Path("."),
    model: Model = None,
    server: Server = None,
    free: Annotated[
        bool,
        typer.Option("--free", help="Let the model write, not quote a sentence. Always so with --server."),
    ] = False,
    keep: Annotated[int, typer.Option(min=1, max=50, help="Passages that the model is given at most.")] = 4,
    sources: Annotated[bool, typer.Option("--sources", help="Show these passages.")] = False,
    trace: Annotated[bool, typer.Option("--trace", help="Show the steps and their times.")] = False,
) -> None:
    """Answer a question from an indexed folder, with the number of the passage it is from.

    SmolLM2 answers with a sentence of a passage, so that it cannot invent one; it may quote the wrong one.
    What a written answer cites is held against the passages; a warning says where they do not hold its words.

    Examples:

    - python -m companion rag ask "When is the library closed?" --folder ~/notes --sources

    - python -m companion rag ask "Summarise the minutes." --server http://localhost:8080/v1 --model my-model
    """
    from companion.rag.pipeline import Pipeline

    if not (folder / STORE).is_file():
        raise FileNotFoundError(f"{folder} is not indexed: run `python -m companion rag index {folder}`")
    encode, dimension, name = encoder()
    free = free or server is not None
    with _store(folder, dimension, name) as store:
        pipeline = Pipeline(
            store, encode, chat_model(model, server), answer="free" if free else "quote", keep=keep
        )
        answer = pipeline.ask(question)
    print(answer.text)
    if sources:
        for number, passage in enumerate(answer.passages, 1):
            place = f"characters {passage.start} to {passage.end}"
            print(f"\n[{number}] {passage.document}, {place}\n{passage.text}")
    if free and not answer.report.refused and not answer.report.is_supported:
        note("The passages do not hold all that this answer says, or it does not cite them.", "yellow")
    if trace:
        note(str(answer.trace))


def encoder():
    """The encoder, the length of its vectors, and its name in the store."""
    from companion.models.bert import SentenceEncoder

    return SentenceEncoder.minilm().encode, 384, "all-MiniLM-L6-v2"


def _store(folder: Path, dimension: int, name: str):
    from companion.rag.store import VectorStore

    return VectorStore(folder / STORE, dimension, model=name)
