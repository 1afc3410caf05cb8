"""The command line, `python -m companion`: a language model, its vocabulary and its file, from a shell.

What a program reads goes to standard output, what only a person reads (speeds, prompts, errors) to standard
error. Colours are for terminals; in a pipe `tokenize` and `inspect` write plain lines. The exit status is 0,
1 where the work failed, 2 where the command was wrong, 130 after Ctrl-C.

A further group of commands is a `typer.Typer` of its own that joins by `app.add_typer(group, name=…)`; the
annotated types below are the options that commands share. Modules with models are imported where a command
needs them, so that `--help` does not wait for them.
"""

import functools
import sys
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

COLOURS = ("black on bright_cyan", "black on bright_yellow", "black on bright_white")
INTERRUPTED = 130  # what shells report after Ctrl-C: 128 + SIGINT
LONGEST_TEXT = 2**20  # characters that a command reads from standard input: a million

app = typer.Typer(
    help="Run the models of the book *From Attention to Agents* on the book's own code.",
    epilog="Every command has a --help of its own, with examples.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,  # a local may hold a key
    rich_markup_mode="markdown",
)

Model = Annotated[
    str | None,
    typer.Option(
        help="A GGUF file of a llama or qwen model, or with --server the name of a model there.",
        show_default="SmolLM2-135M-Instruct",
    ),
]
Server = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="Ask an OpenAI-compatible server instead, such as http://localhost:8080/v1. "
        "The key is read from OPENAI_API_KEY.",
    ),
]
Weights = Annotated[
    Literal["float32", "blocks", "int8"],
    typer.Option(
        help="How the weights are kept: decoded once, as the file's blocks, or as a byte each. "
        "blocks answers as float32 does, int8 a little worse; both take a fraction of the memory, and less "
        "time a token where there is a single core."
    ),
]
MaxTokens = Annotated[int, typer.Option(min=1, help="Length of an answer at most, in tokens.")]
Temperature = Annotated[
    float, typer.Option(min=0, help="0 takes the most probable token each time; above 0 tokens are drawn.")
]
TopP = Annotated[float, typer.Option(help="Share of the probability mass that tokens are drawn from.")]
Seed = Annotated[int | None, typer.Option(min=0, max=2**63 - 1, help="Makes the draws repeatable.")]
Stop = Annotated[list[str] | None, typer.Option(help="Ends the text where it comes up; may be repeated.")]


def one_line_errors(command: Callable) -> Callable:
    """The command, which reports what can go wrong in one line, and Ctrl-C not at all."""

    @functools.wraps(command)
    def guarded(*arguments, **options):
        try:
            return command(*arguments, **options)
        except KeyboardInterrupt:
            if sys.stderr.isatty():
                note("")  # the shell's prompt begins on a line of its own
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:  # the reader, such as `head`, has seen enough: typer ends quietly
            raise
        except (ValueError, OSError, ImportError) as error:
            note(f"Error: {' '.join(_visible(str(error)).split())}", "bold red")
            raise typer.Exit(1) from None

    return guarded


def note(text: str, style: str = "dim") -> None:
    """A line for the person, on standard error."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(Text(text, style))


# --- Commands -----------------------------------------------------------------------------------------------


@app.command()
@one_line_errors
def chat(
    system: Annotated[str | None, typer.Option(help="The system message: how the model should be.")] = None,
    model: Model = None,
    server: Server = None,
    weights: Weights = "float32",
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    stop: Stop = None,
    timeout: Annotated[float, typer.Option(help="Seconds for which a server may be silent.")] = 60.0,
) -> None:
    """Talk with SmolLM2 on this machine, or with any OpenAI-compatible server.

    Every line you enter is a turn, and the model sees all turns before it. Ctrl-C ends an answer, and at the
    prompt the conversation; so does Ctrl-D. SmolLM2 has 135 million parameters: it writes well and knows
    little, so check what it says.

    Examples:

    - python -m companion chat --system "Answer in one sentence."

    - echo "What is a token?" | python -m companion chat --weights blocks --temperature 0.2 --seed 7

    - python -m companion chat --server http://localhost:8080/v1 --model my-model
    """
    from companion.chat import ChatServerError, Message

    options = sampling(max_tokens, temperature, top_p, seed, stop)
    chosen = chat_model(model, server, timeout, weights)
    messages = [] if system is None else [Message("system", system)]
    interactive, unit = _is_person(), "tokens" if server is None else "chunks"
    for line in _turns(interactive):
        messages.append(Message("user", line))
        said: list[str] = []
        try:
            pieces = chosen.stream(messages, **options)
            write_stream(((piece.text, piece.finish) for piece in pieces), said, unit)
        except (KeyboardInterrupt, ChatServerError) as error:
            if not interactive:
                raise
            note(f"\n{str(error) or '(ended)'}")
        if said:  # what was said stands, though it may be half of an answer
            messages.append(Message("assistant", "".join(said)))
        else:
            messages.pop()


@app.command()
@one_line_errors
def generate(
    text: Annotated[str, typer.Argument(help="The beginning; - reads it from standard input.")] = "-",
    model: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="A GGUF file of a llama or qwen model.",
            show_default="SmolLM2-135M-Instruct",
        ),
    ] = None,
    weights: Weights = "float32",
    max_tokens: MaxTokens = 64,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    stop: Stop = None,
) -> None:
    """Continue a text, with no template around it.

    This is what a language model does by itself: `chat` is the same with a conversation for the text. Only
    the continuation is written.

    Examples:

    - python -m companion generate "The capital of France is" --max-tokens 8

    - python -m companion generate - --temperature 0.8 --seed 1 < beginning.txt
    """
    from functools import partial

    import torch

    from companion.generate import generate_stream
    from companion.generate import temperature as scaled
    from companion.generate import top_p as nucleus

    options = sampling(max_tokens, temperature, top_p, seed, stop)
    text = _read(text)
    if not text:
        raise typer.BadParameter("it must hold a character, got none", param_hint="TEXT")
    local = chat_model(None if model is None else str(model), weights=weights)
    filters = [partial(scaled, value=temperature)] if temperature else []
    filters += [partial(nucleus, p=top_p)] if temperature and top_p < 1 else []
    pieces = generate_stream(
        local.model,
        local.tokenizer,
        [text],
        max_new_tokens=max_tokens,
        stop=options["stop"],
        stop_ids=local.stop_ids,
        filters=filters,
        greedy=temperature == 0,
        generator=None if seed is None else torch.Generator().manual_seed(seed),
    )
    write_stream(((piece.text, piece.finish) for piece in pieces), [], "tokens")


@app.command()
@one_line_errors
def tokenize(
    text: Annotated[str, typer.Argument(help="The text; - reads it from standard input.")] = "-",
    vocabulary: Annotated[
        list[str] | None,
        typer.Option(
            "--vocabulary",
            "-v",
            metavar="NAME",
            help="smollm2, cl100k, minilm or a GGUF file; may be repeated.",
            show_default="smollm2",
        ),
    ] = None,
) -> None:
    """Cut a text into tokens and show their pieces and ids.

    Spaces are shown as ␣, line ends as ⏎, tabs as ⇥, and bytes that are no whole character in hexadecimal. In
    a pipe every token is a line: vocabulary, id and piece, between tabs.

    Examples:

    - python -m companion tokenize "Tokenisation, 分词"

    - python -m companion tokenize "the same text" -v smollm2 -v cl100k -v minilm
    """
    text = _read(text)
    console = Console(highlight=False)
    for name in vocabulary or ["smollm2"]:
        tokenizer = load_tokenizer(name)
        ids = tokenizer.encode(text)
        pieces, shown = [_piece(tokenizer, token) for token in ids], _visible(Path(name).name)
        if not console.is_terminal:
            for token, piece in zip(ids, pieces, strict=True):
                print(shown, token, piece, sep="\t")
            continue
        each = f", {len(text) / len(ids):.2f} characters a token" if ids else ""
        title = f"{shown}: {len(ids)} tokens of {tokenizer.vocab_size:,}{each}"
        console.print(Text(title, "bold"), soft_wrap=True)
        for rows in _wrapped(pieces, ids, console.width):
            console.print(*rows, sep="\n", soft_wrap=True)


@app.command()
@one_line_errors
def inspect(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="The GGUF file.")],
    metadata: Annotated[bool, typer.Option(help="Show the metadata.")] = True,
    tensors: Annotated[bool, typer.Option(help="Show every tensor.")] = True,
) -> None:
    """Show what a GGUF file holds: its metadata, its tensors, and the bytes that each type takes.

    Only the header is read, and every number in it is checked before it is used: a malformed file costs one
    line of error. Bits per weight are 8 × bytes / weights, with the scales of the blocks in the bytes.

    Examples:

    - python -m companion inspect model.gguf

    - python -m companion inspect model.gguf --no-metadata --no-tensors
    """
    import math

    from companion.quantize.gguf import GGUFFile

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=400)  # a table in a pipe is not cut to a window
    with GGUFFile.open(file) as model:
        title = f"{file.name}: GGUF version {model.version}, {len(model.metadata)} metadata pairs, "
        title += f"{len(model.tensors)} tensors, {file.stat().st_size:,} bytes"
        console.print(Text(_visible(title), "bold"))
        if metadata:
            table = _table("key", "type", "value")
            for key, value in model.metadata.items():
                type_ = model.types[key]
                row = (key, type_ if isinstance(type_, str) else "array", _brief(value))
                table.add_row(*map(_plain, row))
            console.print(table)
        counts, weights, taken = Counter(), Counter(), Counter()
        table = _table("tensor", "shape", "type", "-bytes", "-bits per weight")
        for info in model.tensors.values():
            number = math.prod(info.shape)
            counts[info.type] += 1
            weights[info.type] += number
            taken[info.type] += info.nbytes
            shape = " × ".join(map(str, info.shape)) or "scalar"
            row = (info.name, shape, info.type, f"{info.nbytes:,}", _bits(info.nbytes, number))
            table.add_row(*map(_plain, row))
        if tensors:
            console.print(table)
    table = _table("type", "-tensors", "-weights", "-bytes", "-share", "-bits per weight")
    total = sum(taken.values())
    for type_, nbytes in taken.most_common():
        share, bits = f"{nbytes / max(total, 1):.1%}", _bits(nbytes, weights[type_])
        table.add_row(type_, str(counts[type_]), f"{weights[type_]:,}", f"{nbytes:,}", share, bits)
    number = sum(weights.values())
    table.add_section()
    table.add_row("all", str(sum(counts.values())), f"{number:,}", f"{total:,}", "", _bits(total, number))
    console.print(table)


# --- What commands share ------------------------------------------------------------------------------------


def chat_model(
    model: str | None = None, server: str | None = None, timeout: float = 60.0, weights: str = "float32"
):
    """The `ChatModel` that the options --model, --server and --weights name."""
    if server is not None:
        from companion.chat import OpenAIChatModel

        if model is None:
            raise typer.BadParameter("a server needs the name of its model", param_hint="--model")
        return OpenAIChatModel(server, model, timeout=timeout)
    from companion.chat import LocalChatModel
    from companion.data.assets import asset_path

    path = asset_path("smollm2") if model is None else Path(model)
    with Console(stderr=True).status("Loading the model"):
        return LocalChatModel.from_gguf(path, quantised=None if weights == "float32" else weights)


def load_tokenizer(name: str):
    """The tokenizer of a vocabulary: "smollm2", "cl100k", "minilm" or the path of a GGUF file."""
    from companion.data.assets import asset_path
    from companion.quantize.gguf import GGUFFile
    from companion.tokenizers.bpe import CL100K_PATTERN, BPETokenizer
    from companion.tokenizers.wordpiece import WordPieceTokenizer

    if name == "cl100k":
        return BPETokenizer.from_ranks(asset_path("cl100k"), CL100K_PATTERN)
    if name == "minilm":
        return WordPieceTokenizer.from_vocabulary(asset_path("minilm-vocabulary"))
    if name != "smollm2" and not Path(name).is_file():
        raise typer.BadParameter(
            f"{name!r} is neither smollm2, cl100k or minilm nor a file", param_hint="--vocabulary"
        )
    with GGUFFile.open(asset_path("smollm2") if name == "smollm2" else name) as file:
        try:
            return BPETokenizer.from_gguf(file.metadata)
        except TypeError as error:  # a value of the file has the wrong type
            raise ValueError(f"{name} holds no vocabulary: {error}") from None


def sampling(max_tokens: int, temperature: float, top_p: float, seed: int | None, stop: list | None) -> dict:
    """The options of `ChatModel.stream`, refused before a model is loaded where they are wrong."""
    from companion.chat import Sampling

    options = dict(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed, stop=stop or [])
    try:
        Sampling(**options)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return options


def write_stream(pieces: Iterable[tuple[str, str | None]], said: list[str], unit: str) -> None:
    """Write (text, finish) pieces as they come, collect the texts in `said`, and report the speed.

    The speed is that of decoding: the pieces after the first, over the time since the first.
    """
    start, times, finish = time.perf_counter(), [], None
    is_terminal = sys.stdout.isatty()
    for text, finish in pieces:  # noqa: B007
        times.append(time.perf_counter())
        if text:
            said.append(text)
            sys.stdout.write(_visible(text) if is_terminal else text)
            sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()
    report = f"{len(times)} {unit}, the first after {times[0] - start:.2f} s"
    if times[-1] > times[0]:
        report += f", then {(len(times) - 1) / (times[-1] - times[0]):.1f} {unit} per second"
    note(report + ("; cut off at --max-tokens" if finish == "length" else ""))


def _is_person() -> bool:
    """Whether somebody sits before standard input."""
    return sys.stdin.isatty()


def _turns(interactive: bool) -> Iterator[str]:
    """The lines that a person enters, or a pipe holds; empty ones are left out."""
    if interactive:
        import contextlib

        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  input() then has a history
    while True:
        try:
            line = input("> " if interactive else "")
        except EOFError:
            if interactive:
                print()
            return
        if line.strip():
            yield line


def _read(text: str) -> str:
    """The argument, or standard input for "-"."""
    if text != "-":
        return text
    text = sys.stdin.read(LONGEST_TEXT + 1)
    if len(text) > LONGEST_TEXT:
        raise ValueError(f"standard input must have at most {LONGEST_TEXT} characters, got more")
    return text


def _visible(text: str) -> str:
    """The text without control characters, which could command the terminal."""
    kept = (sign if sign in "\n\t" or unicodedata.category(sign) != "Cc" else "\ufffd" for sign in text)
    return "".join(kept)


def _plain(text: str) -> Text:
    """A cell of a table: one line, in which no sign has a meaning."""
    return Text(" ".join(_visible(text).split()), overflow="fold")


def _piece(tokenizer, token: int) -> str:
    """What a token spells, every sign of it visible."""
    if hasattr(tokenizer, "pieces"):
        spelled = tokenizer.pieces[token]
    else:
        spelled = tokenizer.token_bytes(token).decode("utf-8", "backslashreplace")
    spelled = spelled.translate({ord(" "): "␣", ord("\n"): "⏎", ord("\t"): "⇥"})
    return "".join(sign if sign.isprintable() else f"\\x{ord(sign):02x}" for sign in spelled)


def _wrapped(pieces: list[str], ids: list[int], width: int) -> Iterator[tuple[Text, Text]]:
    """Rows of pieces, in alternating colours, each with the row of their ids below."""
    above, below = Text(), Text()
    for number, (piece, token) in enumerate(zip(pieces, ids, strict=True)):
        size = max(cell_len(piece), len(str(token)))
        if above and above.cell_len + size > width:
            yield above, below
            above, below = Text(), Text()
        above.append(piece, COLOURS[number % len(COLOURS)])
        above.append(" " * (size + 1 - cell_len(piece)))
        below.append(f"{token:<{size + 1}}", "dim")
    if above:
        yield above, below


def _table(*columns: str) -> Table:
    """An empty table; columns whose names begin with "-" hold numbers."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in columns:
        table.add_column(name.lstrip("-"), justify="right" if name.startswith("-") else "left")
    return table


def _brief(value: object) -> str:
    """A metadata value in about 60 characters, a list by its first elements and its length."""
    if isinstance(value, list):
        shown = ", ".join(map(_brief, value[:3])) + (", …" if len(value) > 3 else "")
        return f"[{shown[:80]}] ({len(value):,})"
    text = str(value)
    return text if len(text) <= 60 else text[:59] + "…"


def _bits(nbytes: int, weights: int) -> str:
    return f"{8 * nbytes / weights:.2f}" if weights else "-"
