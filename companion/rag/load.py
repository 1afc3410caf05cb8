"""Documents from files: plain text, Markdown, HTML and PDF.

A file comes from anywhere, so it is read as hostile input. Its size is checked before it is read, what it
expands to while it expands; text that is no text in its encoding is refused, not guessed; a symbolic link in
a folder is not followed. Whatever is wrong with a file is one `DocumentError` that names it. What the text
says is nobody's concern here: "ignore your instructions" is loaded as the three words it is, and it is for
the prompt to set documents apart from instructions.

HTML and PDF are read by libraries (Beautiful Soup on lxml; pypdf), imported when the first such file comes.
"""

import codecs
import logging
import os
import re
import stat
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from companion._checks import check_positive

KINDS = {
    ".txt": "text",
    ".text": "text",
    ".md": "markdown",
    ".markdown": "markdown",
    ".html": "html",
    ".htm": "html",
    ".xhtml": "html",
    ".pdf": "pdf",
}
"""The endings of the files that are read (in either case), and what they hold."""

MAX_ELEMENTS = 200_000
"""Elements that an HTML file may have; each takes about a thousand bytes of memory, however few wrote it."""

MAX_OPERATIONS = 5_000_000
"""Operators that a PDF may have on its pages and in the forms that pages repeat."""

MAX_SECONDS = 120
"""Time that a PDF may take, looked at between operators; forms within forms multiply what a count shows."""


class DocumentError(ValueError):
    """A file that cannot be read as a document.

    Attributes:
        document: the id of the file or folder.
        reason: what is wrong with it.
    """

    def __init__(self, document: str, reason: str):
        super().__init__(document, reason)
        self.document, self.reason = document, reason

    def __str__(self):
        return f"{self.document!r} {self.reason}"


@dataclass(frozen=True)
class Document:
    """The text of one file.

    Attributes:
        id: name of the file; in a folder, its path from there, with "/" between the parts on every system.
        text: its text; passages point into it by character offsets.
        metadata: "kind" is "text", "markdown", "html" or "pdf"; "title" where HTML or PDF has one; for a PDF
            "page_starts", the offset at which each page begins.
    """

    id: str
    text: str
    metadata: Mapping = field(default_factory=dict)

    def __post_init__(self):
        for name in ("id", "text"):
            if not isinstance(value := getattr(self, name), str):
                raise TypeError(f"{name} must be a str, got {type(value).__name__}")
        if not self.id:
            raise ValueError("id must not be empty")
        if not isinstance(self.metadata, Mapping):
            raise TypeError(f"metadata must be a mapping, got {type(self.metadata).__name__}")


def load(
    path: str | os.PathLike,
    *,
    encoding: str = "utf-8",
    max_bytes: int = 2**25,
    max_characters: int = 2**24,
    max_pages: int = 2_000,
    max_files: int = 10_000,
    max_depth: int = 256,
    skipped: list | None = None,
) -> list[Document]:
    """The documents of a file or of a folder and the folders in it, sorted by id.

    In a folder, names that begin with a dot are passed over. Files of other kinds and symbolic links, to
    files or folders, are not loaded either; a list given as `skipped` receives a `DocumentError` for each.

    Args:
        path: a file of one of `KINDS`, or a folder.
        encoding: of a text without a byte-order mark and of HTML that does not declare its own.
        max_bytes: of a file, and of what the pages of a PDF expand to.
        max_characters: of a document.
        max_pages: of a PDF.
        max_files: that a folder may hold, loaded or not.
        max_depth: of folders in folders, and of HTML elements in elements; at most 1,000.
        skipped: receives the error of each file that cannot be read. None: the first such file raises it.

    Text and Markdown are kept to the character, line ends among them. Of HTML stays what a reader is shown
    and what a style sheet hides: paragraphs with an empty line between them, headings with Markdown's "#",
    items of lists with "- ", cells of a table with a tab; white space is one space but in <pre>. A PDF's
    pages are joined by line ends.

    Raises DocumentError for a file that is too large, malformed, encrypted, no text in its encoding or of
    another kind, and for a folder of too many files; FileNotFoundError where nothing has that name; and
    ImportError where the library for a kind is missing.
    """
    limits = _Limits(max_bytes, max_characters, max_pages, max_files, max_depth)
    _check_encoding(encoding)
    if not isinstance(skipped, (list, type(None))):
        raise TypeError(f"skipped must be a list or None, got {type(skipped).__name__}")
    path = Path(path)
    if not stat.S_ISDIR(path.stat().st_mode):
        return [_load_file(path, path.name, encoding, limits)]
    documents, left_out = [], []
    for file, name, reason in sorted(_files(path, limits), key=lambda found: found[1]):
        if reason is not None:
            left_out.append(DocumentError(name, reason))
            continue
        try:
            documents.append(_load_file(file, name, encoding, limits, follow=False))
        except DocumentError as error:
            if skipped is None:
                raise
            left_out.append(error)
    if skipped is not None:
        skipped.extend(left_out)
    return documents


@dataclass(frozen=True)
class _Limits:
    max_bytes: int
    max_characters: int
    max_pages: int
    max_files: int
    max_depth: int

    def __post_init__(self):
        for name, value in vars(self).items():
            check_positive(name, value)
        if self.max_depth > 1000:
            raise ValueError(f"max_depth must be at most 1000, got {self.max_depth}")


class _Refusal(Exception):
    """What is wrong with a file, from where its name is not known."""


# ---------------------------------------------------------------------------------------------------- files


def _files(folder: Path, limits: _Limits) -> Iterator[tuple[Path, str, str | None]]:
    """Path, id and, of what is not to be loaded, the reason, for everything in a folder."""
    count, waiting = 0, [(folder, "")]
    while waiting:
        folder, prefix = waiting.pop()
        if prefix.count("/") > limits.max_depth:
            raise DocumentError(prefix, f"lies more than max_depth={limits.max_depth} folders deep")
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    count += 1
                    if count > limits.max_files:
                        raise DocumentError(
                            folder.name, f"holds more than max_files={limits.max_files} files"
                        )
                    name = prefix + entry.name
                    if entry.is_symlink():
                        yield Path(entry.path), _printable(name), "is a symbolic link, which is not followed"
                    elif entry.is_dir(follow_symlinks=False):
                        waiting.append((Path(entry.path), name + "/"))
                    elif _kind(entry.name) is None:
                        yield Path(entry.path), _printable(name), f"is not one of {', '.join(KINDS)}"
                    else:
                        yield Path(entry.path), name, None
        except OSError as error:
            if not prefix:
                raise
            yield folder, _printable(prefix), f"cannot be opened: {error.strerror}"


def _load_file(path: Path, name: str, encoding: str, limits: _Limits, follow: bool = True) -> Document:
    try:
        if (kind := _kind(name)) is None:
            raise _Refusal(f"is not one of {', '.join(KINDS)}")
        if name != _printable(name):
            raise _Refusal("has a name that is no Unicode text")
        data = _read(path, limits.max_bytes, follow)
        text, metadata = _READERS[kind](data, encoding, limits)
        if len(text) > limits.max_characters:
            raise _Refusal(f"has {len(text)} characters, more than max_characters={limits.max_characters}")
    except _Refusal as error:
        raise DocumentError(_printable(name), str(error)) from error.__cause__
    return Document(name, text, {"kind": kind} | metadata)


def _kind(name: str) -> str | None:
    return KINDS.get(os.path.splitext(name)[1].lower())


def _printable(name: str) -> str:
    """The name with what is no Unicode in it written as escapes."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def _read(path: Path, max_bytes: int, follow: bool) -> bytes:
    """The bytes of a regular file: not of a device or a pipe, which may have no end."""
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        descriptor = os.open(path, flags | (0 if follow else getattr(os, "O_NOFOLLOW", 0)))
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise _Refusal("is no regular file")
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise _Refusal(f"cannot be read: {error.strerror}") from error
    if len(data) > max_bytes:
        raise _Refusal(f"is larger than max_bytes={max_bytes}")
    return data


# ----------------------------------------------------------------------------------------------------- text

_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
_CHARSETS = re.compile(
    r"utf-8|ascii|iso8859-\d+|cp125\d|cp874|gb2312|gbk|gb18030|big5|shift_jis|euc_\w+|koi8-\w"
)
_WIDER = {"ascii": "cp1252", "iso8859-1": "cp1252", "gb2312": "gb18030", "gbk": "gb18030"}  # as browsers do


def _check_encoding(encoding: str) -> None:
    if not isinstance(encoding, str):
        raise TypeError(f"encoding must be a str, got {type(encoding).__name__}")
    try:
        is_text = getattr(
            codecs.lookup(encoding), "_is_text_encoding", True
        )  # "zlib" is a codec, but of bytes
    except (LookupError, ValueError):
        is_text = False
    if not is_text:
        raise ValueError(f"encoding must be a text encoding that Python knows, got {encoding!r}")


def _decode(data: bytes, encoding: str) -> str:
    """The text that bytes are in an encoding, or in the one of the mark that they begin with."""
    mark = next((mark for mark in _MARKS if data.startswith(mark)), b"")
    encoding = _MARKS.get(mark, encoding)
    try:
        text = data[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        place = error.start + len(mark)
        raise _Refusal(f"is no {encoding} text: {error.reason} at byte {place}; name its encoding") from None
    except (UnicodeError, LookupError) as error:
        raise _Refusal(f"is no {encoding} text: {error}") from None
    if (place := text.find("\0")) >= 0:
        raise _Refusal(f"is no text: it has a NUL at character {place}")
    return text.removeprefix("\ufeff")


def _read_text(data: bytes, encoding: str, limits: _Limits) -> tuple[str, dict]:
    return _whole(_decode(data, encoding)), {}


def _whole(text: str) -> str:
    """The text without NULs and halves of characters, which some encodings and fonts let through."""
    return re.sub("[\0\ud800-\udfff]", "\ufffd", text)


# ----------------------------------------------------------------------------------------------------- HTML

_MARKERS = {f"h{level}": "#" * level + " " for level in range(1, 7)} | {"li": "- "}
_BLOCKS = frozenset(
    re.findall(
        r"\w+",
        "address article aside blockquote body caption dd details dialog div dl dt fieldset figcaption "
        "figure footer form header hr legend main nav ol option p pre section summary table ul",
    )
)
_LINES = ("br", "tr")
_UNSEEN = ("head", "noscript", "script", "style", "svg", "template", "math")


def _read_html(data: bytes, encoding: str, limits: _Limits) -> tuple[str, dict]:
    parse = _html_parser()
    markup = _decode(data, _declared_charset(data) or encoding)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a short text looks like a path, or HTML like XML
        try:
            soup = parse(markup, limits.max_depth)
        except _Refusal:
            raise
        except Exception as error:  # whatever the parsers raise on foreign bytes
            raise _Refusal(f"is no HTML: {type(error).__name__}: {error}") from error
    title = soup.find("title")
    title = " ".join("".join(title.find_all(string=True)).split()) if title else ""
    return _whole(_html_text(soup)), {"title": _whole(title)} if title else {}


@cache
def _html_parser():
    try:
        import lxml.etree  # noqa: F401
        from bs4 import BeautifulSoup
    except ImportError as error:
        raise ImportError(
            'HTML needs beautifulsoup4 and lxml: run `pip install "attention-to-agents[rag]"`'
        ) from error

    class Soup(BeautifulSoup):
        """A tree that stops growing at a limit."""

        max_depth = elements = 0

        def handle_starttag(self, *arguments, **options):
            self.elements += 1
            if self.elements > MAX_ELEMENTS:
                raise _Refusal(f"has more than {MAX_ELEMENTS} elements")
            if len(self.tagStack) > self.max_depth:
                raise _Refusal(f"has elements nested more than max_depth={self.max_depth} deep")
            return super().handle_starttag(*arguments, **options)

    # lxml takes time in proportion to the text; on Python's html.parser 80 kB of "<!--" take ten seconds.
    def parse(markup: str, max_depth: int):
        return type("Soup", (Soup,), {"max_depth": max_depth})(markup, "lxml")

    return parse


def _declared_charset(data: bytes) -> str | None:
    """The encoding that HTML declares in its first 1,024 bytes, as a browser takes it."""
    match = re.search(
        rb"""<(?:meta|\?xml)[^>]*?(?:charset|encoding)\s*=\s*["']?\s*([\w.:-]+)""", data[:1024], re.I
    )
    if not match:
        return None
    label = match[1].decode("ascii", "replace")
    try:
        name = codecs.lookup(label).name
    except LookupError:
        name = ""
    if name in ("utf-16", "utf-16-le", "utf-16-be"):
        return "utf-8"  # what can be read as ASCII so far is not UTF-16
    if not _CHARSETS.fullmatch(name):
        raise _Refusal(f"declares the encoding {label!r}, which is none of the web's")
    return _WIDER.get(name, name)


def _html_text(soup) -> str:
    """The text of a tree, from its first node to its last; a str on the stack is what ends an element."""
    from bs4.element import CData, NavigableString, Tag

    parts: list[str] = []
    fresh = True  # at the beginning of a line
    waiting = [(soup, False)]
    while waiting:
        node, exact = waiting.pop()
        if isinstance(node, Tag):
            if node.name in _UNSEEN:
                continue
            exact = exact or node.name in ("pre", "textarea")
            marker = _MARKERS.get(node.name, "")
            space = "\n" if node.name in _LINES else "\n\n" if marker or node.name in _BLOCKS else ""
            if node.name in ("td", "th") and not fresh:
                parts.append("\t")
            if space:
                parts.append(space + marker)
                fresh = True
                if node.name != "br":
                    waiting.append((space, exact))
            waiting += [(child, exact) for child in reversed(node.contents)]
        elif type(node) is str:
            parts.append(node)
            fresh = True
        elif type(node) in (NavigableString, CData):
            text = str(node) if exact else re.sub(r"\s+", " ", node)
            if fresh and not exact:
                text = text.lstrip()
            if text:
                parts.append(text)
                fresh = text.endswith((" ", "\n"))
    text = re.sub(r"[ \t]+(?=\n)", "", "".join(parts))
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n ")


# ------------------------------------------------------------------------------------------------------ PDF


def _read_pdf(data: bytes, encoding: str, limits: _Limits) -> tuple[str, dict]:
    import io

    try:
        import pypdf
    except ImportError as error:
        raise ImportError('PDF needs pypdf: run `pip install "attention-to-agents[rag]"`') from error
    if not data.lstrip()[:1024].startswith(b"%PDF-"):
        raise _Refusal("is no PDF: it does not begin with %PDF-")
    bounds = {
        name: limits.max_bytes
        for name in pypdf.get_configuration().__dataclass_fields__
        if name.endswith("maximum_output_length")
    }
    logger = logging.getLogger("pypdf")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # what it repairs by itself
    try:
        with pypdf.apply_configuration(**bounds):
            return _pdf_text(pypdf.PdfReader(io.BytesIO(data)), limits)
    except _Refusal:
        raise
    except pypdf.errors.LimitReachedError as error:
        raise _Refusal(f"expands to more than is allowed: {error}") from error
    except Exception as error:  # whatever pypdf raises on foreign bytes
        raise _Refusal(f"is no whole PDF: {type(error).__name__}: {error}") from error
    finally:
        logger.setLevel(level)


def _pdf_text(reader, limits: _Limits) -> tuple[str, dict]:
    if reader.is_encrypted:
        raise _Refusal("is encrypted")
    if (count := len(reader.pages)) > limits.max_pages:
        raise _Refusal(f"has {count} pages, more than max_pages={limits.max_pages}")
    budget = _Budget(limits)
    starts, pages, length = [], [], 0
    for page in reader.pages:
        if (contents := page.get_contents()) is not None:
            budget.bytes(len(contents.get_data()))
        page_text = _whole(
            page.extract_text(visitor_operand_before=budget.operation, visitor_text=budget.text)
        )
        budget.check()
        starts.append(length)
        pages.append(page_text)
        length += len(page_text) + 1
        if length > limits.max_characters + 1:
            raise _Refusal(f"has more than max_characters={limits.max_characters} characters")
    text = "\n".join(pages)
    if not text.strip():
        raise _Refusal("holds no text: its pages may be pictures")
    title = reader.metadata.title if reader.metadata else None
    title = _whole(" ".join(title.split())[:1000]) if isinstance(title, str) else ""
    return text, {"page_starts": tuple(starts)} | ({"title": title} if title else {})


class _Budget:
    """Counts what the pages of a PDF ask for, forms within forms included, and stops where it is too much."""

    def __init__(self, limits: _Limits):
        self.limits = limits
        self.read = self.operations = self.characters = 0
        self.end = time.monotonic() + MAX_SECONDS

    def bytes(self, count: int) -> None:
        self.read += count
        if self.read > self.limits.max_bytes:
            raise _Refusal(f"has pages that expand to more than max_bytes={self.limits.max_bytes}")

    def operation(self, *arguments) -> None:
        self.operations += 1
        self.check()

    def text(self, text: str, *arguments) -> None:
        self.characters += len(text)
        self.check()

    def check(self) -> None:
        if self.operations > MAX_OPERATIONS:
            raise _Refusal(f"has more than {MAX_OPERATIONS} operators on its pages")
        if time.monotonic() > self.end:
            raise _Refusal(f"takes longer than {MAX_SECONDS} seconds")
        if self.characters > 2 * self.limits.max_characters:  # what is seen here is not yet trimmed
            raise _Refusal(f"has more than max_characters={self.limits.max_characters} characters")


_READERS = {"text": _read_text, "markdown": _read_text, "html": _read_html, "pdf": _read_pdf}
