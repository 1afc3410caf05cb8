"""The rules every page keeps, each failing with one sentence: which rule, where, and what mends it.

The rules are functions from a page to the sentences it deserves; `RULES` runs each of them on each page. What
joins pages to one another and to the reference part (contents, errata, glossary, notation) comes after them.
"""

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path

import nbformat
import pytest
import yaml

ROOT = Path(__file__).parents[1]
BOOK = ROOT / "book"
DATA = BOOK / "reference" / "_data"
sys.path.insert(0, str(ROOT / "tools"))

import notebooks  # noqa: E402

SECTIONS = (
    "The mechanism",
    "Build it",
    "See it",
    "What the notes say",
    "In practice",
    "Exercises",
    "References",
)
SHORT_ANSWER_WORDS = 120
TEACHING_LINES = 25
CJK = re.compile(r"[\u4e00-\u9fff]")
TIMERS = re.compile(r"\b(perf_counter|process_time|monotonic|time\.time|timeit|%%?time)\b")
SECONDS = re.compile(r"\b\d+(\.\d+)?\s?(seconds?|secs?|ms|µs|minutes?|s)\b(?!\^)")


@dataclass(frozen=True)
class Page:
    """A page of a chapter: book/qaN/qM-slug.md, read as the notebook it describes."""

    path: Path
    text: str = field(repr=False)
    notebook: nbformat.NotebookNode = field(repr=False, compare=False, hash=False)

    @cached_property
    def name(self) -> str:
        return self.path.relative_to(ROOT).as_posix()

    @cached_property
    def stem(self) -> str:
        """qa1/q6-multi-head-attention: how the toc, the errata and the map name the page."""
        return self.path.relative_to(BOOK).with_suffix("").as_posix()

    @cached_property
    def label(self) -> str:
        chapter, question = re.match(r"(qa\d+)/(q\d+)-", self.stem).groups()
        return f"{chapter}-{question}"

    @cached_property
    def prose(self) -> str:
        return "\n\n".join(cell.source for cell in self.notebook.cells if cell.cell_type == "markdown")

    @cached_property
    def code(self) -> list:
        return [cell for cell in self.notebook.cells if cell.cell_type == "code"]

    @cached_property
    def headings(self) -> list[str]:
        return re.findall(r"^## +(.+?) *$", _without_fences(self.prose), flags=re.MULTILINE)

    def section(self, title: str) -> tuple[str, list]:
        """The prose and the code cells between one heading of level two and the next."""
        prose, code, inside = [], [], False
        for cell in self.notebook.cells:
            if cell.cell_type == "code":
                code += [cell] if inside else []
                continue
            for line in cell.source.splitlines():
                if re.match(r"## ", line):
                    inside = line[3:].strip() == title
                elif inside:
                    prose.append(line)
        return "\n".join(prose), code

    def twin(self) -> nbformat.NotebookNode | None:
        try:
            return nbformat.read(self.path.with_suffix(".ipynb"), as_version=4)
        except Exception:  # `rule_twin` says what is wrong with it
            return None


def _without_fences(text: str) -> str:
    """Markdown without its fenced blocks of code, so that a comment in one is no heading."""
    return re.sub(r"^(`{3,})[^`\n]*\n.*?^\1\s*$", "", text, flags=re.MULTILINE | re.DOTALL)


def _page_paths() -> list[Path]:
    return sorted(p for p in BOOK.glob("qa*/q*-*.md") if re.fullmatch(r"qa\d+/q\d+-[a-z0-9-]+", _stem(p)))


def _stem(path: Path) -> str:
    return path.relative_to(BOOK).with_suffix("").as_posix()


@cache
def _load(path: Path) -> Page:
    return Page(path, path.read_text(encoding="utf-8"), notebooks.from_source(path))


PAGES = _page_paths()


@cache
def _yaml(name: str):
    path = DATA / name
    return yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else None


def _questions() -> dict[str, dict]:
    """Every question of the notes, by its page's label."""
    return {
        f"{chapter['id']}-{question['id']}": question
        for chapter in _yaml("map.yml")
        for question in chapter["questions"]
    }


# ---- one page ------------------------------------------------------------------------------------------


def rule_twin(page: Page) -> Iterator[str]:
    """The executed twin is there, in step with the source, and clean."""
    yield from notebooks.problems(page.path)


def rule_front_matter(page: Page) -> Iterator[str]:
    if page.path not in notebooks.sources():
        yield "the front matter must name a kernel (kernelspec), as that of every other page does."


def rule_title(page: Page) -> Iterator[str]:
    """Label, title, and the notes' own question under it."""
    number = page.label.split("-q")[1]
    lines = [line for line in page.prose.splitlines() if line.strip()]
    titles = [i for i, line in enumerate(lines) if line.startswith("# ")]
    if not titles:
        yield f"it has no title: write `# Q-{number} · …?` under `({page.label})=`."
        return
    at = titles[0]
    if not re.fullmatch(rf"# Q-{number} · \S.*\?", lines[at]):
        yield f"its title must read `# Q-{number} · …?`, got `{lines[at]}`."
    if at == 0 or lines[at - 1].strip() != f"({page.label})=":
        yield f"the label `({page.label})=` must stand above the title."
    below = lines[at + 1].strip() if at + 1 < len(lines) else ""
    chinese = _questions().get(page.label, {}).get("chinese", "")
    if not (below.startswith("*") and CJK.search(below)):
        yield f"the notes' question in Chinese must stand in italics under the title: `*{chinese}*`."
    elif chinese and chinese.rstrip("?？") not in below:
        yield f"the Chinese under the title must be the notes' question `{chinese}`, got `{below}`."


def rule_sections(page: Page) -> Iterator[str]:
    if tuple(page.headings) != SECTIONS:
        yield f"its level-two headings must be {list(SECTIONS)} in this order, got {page.headings}."


def rule_short_answer(page: Page) -> Iterator[str]:
    opening = page.prose.split("\n## ")[0]
    found = re.search(
        r"^(:{3,}|`{3,})\{admonition\} Short answer *\n(.*?)^\1 *$", opening, re.MULTILINE | re.DOTALL
    )
    if not found:
        yield "`:::{admonition} Short answer` must stand between the title and `## The mechanism`."
        return
    body = "\n".join(line for line in found[2].splitlines() if not re.match(r":[a-z-]+:", line))
    words = len(body.split())
    if not 0 < words <= SHORT_ANSWER_WORDS:
        yield f"the short answer must have 1 to {SHORT_ANSWER_WORDS} words, it has {words}."


def rule_start(page: Page) -> Iterator[str]:
    """`notebooks.problems` looks after the setup cell; the cell after it starts the page."""
    if len(page.code) < 2 or not re.search(r"\bstart\(", page.code[1].source):
        yield "the cell after the setup cell must call `companion.book.start()`."


def rule_build_it(page: Page) -> Iterator[str]:
    _, cells = page.section("Build it")
    for cell in cells:
        lines = sum(bool(line.strip()) for line in cell.source.splitlines())
        if lines > TEACHING_LINES:
            opening = cell.source.strip().splitlines()[0]
            yield f"`{opening}` in Build it has {lines} lines, at most {TEACHING_LINES}: split the cell."
    source = "\n".join(cell.source for cell in cells)
    if "assert" not in source:
        yield "Build it must hold the teaching code against the companion with `assert_close`."
    if "companion" not in "\n".join(cell.source for cell in page.code[1:]):
        yield "the page must import the mechanism from `companion`."


def rule_figures(page: Page) -> Iterator[str]:
    """At least one figure, and alternative text on each."""
    figures = 0
    twin = page.twin()
    for cell in twin.cells if twin else []:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            opening = cell.source.strip().splitlines()[0] if cell.source.strip() else ""
            if "image/png" in data or "image/jpeg" in data:
                figures += 1
                if not cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "").strip():
                    yield f"the figure of `{opening}` has no alt text: set mystnb → image → alt in its cell."
            for svg in re.findall(r"<svg\b[^>]*>", data.get("text/html", "") + data.get("image/svg+xml", "")):
                figures += 1
                if not re.search(r'aria-label="[^"]+"', svg) and 'aria-hidden="true"' not in svg:
                    yield f"the drawing of `{opening}` has no aria-label on its <svg>."
    for svg in re.findall(r"<svg\b[^>]*>", page.prose):
        figures += 1
        if not re.search(r'aria-label="[^"]+"', svg) and 'aria-hidden="true"' not in svg:
            yield "a drawing in the prose has no aria-label on its <svg>."
    for alt, target in re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", page.prose):
        figures += 1
        if not alt.strip():
            yield f"the image {target} has no alt text."
    for fence, kind, target, body in re.findall(
        r"^(:{3,}|`{3,})\{(figure|image)\} *(\S*)\n(.*?)^\1 *$", page.prose, re.MULTILINE | re.DOTALL
    ):
        figures += 1
        if not re.search(r"^:alt: *\S", body, re.MULTILINE):
            yield f"the {fence}{{{kind}}} {target} has no :alt: line."
    if twin and not figures:
        yield "it has no figure: See it needs one that a person would rather look at than read."


def rule_exercises(page: Page) -> Iterator[str]:
    exercises = re.findall(
        r"^(:{3,}|`{3,})\{exercise\}[^\n]*\n(.*?)^\1 *$", page.section("Exercises")[0], re.M | re.S
    )
    labels = [found[1] for _, body in exercises if (found := re.search(r"^:label: *(\S+)", body, re.M))]
    if not 2 <= len(exercises) <= 3:
        yield f"Exercises must hold two or three `{{exercise}}` directives, it holds {len(exercises)}."
    if len(labels) != len(exercises) or len(set(labels)) != len(labels):
        yield "every exercise needs a `:label:` of its own."
    starts = {
        found[1]: found
        for found in re.finditer(r"\{solution-start\} *(\S+)(.*?)\{solution-end\}", page.text, re.DOTALL)
    }
    for label in labels:
        if label not in starts:
            yield f"exercise {label} has no `{{solution-start}} {label}` … `{{solution-end}}`."
            continue
        body = starts[label][2]
        if not re.search(r"^:class: *dropdown", body, re.MULTILINE):
            yield f"the solution of {label} must be collapsed: give it `:class: dropdown`."
        if "{code-cell}" not in body:
            yield f"the solution of {label} has no code cell that runs."


def rule_references(page: Page) -> Iterator[str]:
    prose, _ = page.section("References")
    if not re.search(r"\{bibliography\}[^\n]*\n(:[^\n]*\n)*:filter: docname in docnames", prose):
        yield "References must list the page's sources: `{bibliography}` with `:filter: docname in docnames`."
    cited = _cited(page.prose)
    if not cited:
        yield "it cites nothing: name its primary sources with `{cite}`."
    if missing := sorted(cited - _bib_keys()):
        yield f"it cites {missing}, which book/references.bib does not have."


def rule_errata(page: Page) -> Iterator[str]:
    """The table of What the notes say and errata.yml name the same ids, and each id has its anchor."""
    prose, _ = page.section("What the notes say")
    in_table = {
        e for line in prose.splitlines() if line.startswith("|") for e in re.findall(r"\bE\d{3}\b", line)
    }
    entries = {entry["id"]: entry for entry in _yaml("errata.yml") or [] if entry["page"] == page.stem}
    for erratum in sorted(entries.keys() - in_table):
        yield f"{erratum} names this page in errata.yml and has no row in the table of What the notes say."
    for erratum in sorted(in_table - entries.keys()):
        yield f"{erratum} has a row in the table and does not name this page in errata.yml."
    for erratum, entry in sorted(entries.items()):
        if f"({entry['anchor']})=" not in page.prose:
            yield f"{erratum} needs its anchor `({entry['anchor']})=` before what shows the correction."


def rule_words(page: Page) -> Iterator[str]:
    yield from _forbidden_words(page.text)


def rule_portable(page: Page) -> Iterator[str]:
    """What does not survive translation, offline reading, or a second run."""
    if re.search(r"\[\^[^\]]+\]", _without_fences(page.prose)):
        yield "it has a footnote, which translation loses: use a `{margin}` note or a sentence."
    if heading := re.search(r"^#{2,} .*\$.*$", _without_fences(page.prose), re.MULTILINE):
        yield f"a heading holds mathematics, which contents show raw: `{heading[0]}`."
    source = "\n".join(cell.source for cell in page.code)
    if found := re.search(r"^\s*(?:from|import) (myst_nb|plotly|ipywidgets|jupyterquiz)\b", source, re.M):
        yield f"it imports {found[1]}, which needs a kernel or a network to show anything."


def rule_no_seconds(page: Page) -> Iterator[str]:
    """A duration never repeats: where the time is the point, nbval must not compare it."""
    twin = page.twin()
    for cell in twin.cells if twin else []:
        if cell.cell_type != "code" or "nbval-ignore-output" in cell.metadata.get("tags", []):
            continue
        text = "\n".join(
            output.get("text", "") or output.get("data", {}).get("text/plain", "")
            for output in cell.outputs
            if "text/markdown" not in output.get("data", {})
        )
        found = SECONDS.search(text)
        if found and TIMERS.search(cell.source):
            opening = cell.source.strip().splitlines()[0]
            yield f"`{opening}` prints `{found[0]}`: tag it nbval-ignore-output or count something else."


def rule_links(page: Page) -> Iterator[str]:
    if re.search(r"\]\((?:/|file:)", page.prose):
        yield "a link begins with `/` or `file:`, which leads nowhere once deployed."


RULES = [value for name, value in list(globals().items()) if name.startswith("rule_")]


def _forbidden_words(text: str) -> Iterator[str]:
    for number, line in enumerate(text.splitlines(), 1):
        if re.search(r"\bsimply\b", line, re.IGNORECASE):
            yield f'line {number} says "simply": what is simple to the writer may not be to the reader.'
        if re.search(r"\b(TODO|FIXME|XXX)\b|coming soon", line):
            yield f"line {number} leaves something undone: do it, or take it out."


def _cited(prose: str) -> set[str]:
    roles = re.findall(r"\{cite(?:[:a-z]*)\}`([^`]+)`", prose)
    return {re.sub(r"\{[^}]*\}", "", key).strip() for role in roles for key in role.split(",")}


@cache
def _bib_keys() -> frozenset[str]:
    path = BOOK / "references.bib"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return frozenset(re.findall(r"^@\w+\{\s*([^,\s]+)", text, re.MULTILINE))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__.removeprefix("rule_"))
@pytest.mark.parametrize("path", PAGES, ids=_stem)
def test_page(path: Path, rule):
    page = _load(path)
    sentences = [s if s.startswith("book/") else f"{page.name}: {s}" for s in rule(page)]
    if sentences:
        pytest.fail("\n".join(sentences), pytrace=False)


# ---- the pages together --------------------------------------------------------------------------------


@cache
def _toc() -> list[str]:
    """Every file that _toc.yml names, in its order."""
    files: list[str] = []

    def collect(node):
        if isinstance(node, dict):
            files.extend(value for key, value in node.items() if key in ("root", "file"))
            for value in node.values():
                collect(value)
        elif isinstance(node, list):
            for item in node:
                collect(item)

    collect(yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8")))
    return files


def test_every_page_is_in_the_contents_as_its_twin():
    missing = [_stem(path) for path in PAGES if f"book/{_stem(path)}.ipynb" not in _toc()]
    assert not missing, f"_toc.yml must name the twin book/….ipynb of {missing}."


def test_every_file_of_the_contents_exists():
    missing = [name for name in _toc() if not any((ROOT / f"{name}{end}").is_file() for end in ("", ".md"))]
    assert not missing, (
        f"_toc.yml names {missing}, which do not exist: run `make notebooks` or mend the name."
    )


def test_contents_keep_the_order_of_the_questions():
    numbers = [
        tuple(map(int, found.groups())) for name in _toc() if (found := re.search(r"qa(\d+)/q(\d+)-", name))
    ]
    assert numbers == sorted(set(numbers)), f"_toc.yml must list each page once, in order, got {numbers}."


def test_no_twin_without_a_source():
    assert not notebooks.orphans(), f"{notebooks.orphans()} have no source: write it or delete them."


def test_every_chapter_begins_with_its_index():
    for chapter in {path.parent for path in PAGES}:
        index = chapter / "index.md"
        assert index.exists(), f"{chapter.name} needs {chapter.name}/index.md: what it answers and its map."
        text = index.read_text(encoding="utf-8")
        for page in (p for p in PAGES if p.parent == chapter):
            assert page.stem in text or _load(page).label in text, (
                f"{_stem(index)} must link to {_stem(page)}."
            )


def test_every_page_answers_a_question_of_the_map():
    unknown = [_stem(path) for path in PAGES if _load(path).label not in _questions()]
    assert not unknown, f"map.yml has no question for {unknown}: mend the file's name or the map."


def test_labels_of_exercises_and_anchors_are_unique():
    seen: dict[str, str] = {}
    for path in PAGES:
        for label in re.findall(r"^(?::label: *(\S+)|\(([^)]+)\)=)", _load(path).prose, re.MULTILINE):
            name = "".join(label)
            assert name not in seen, f"the label {name} of {_stem(path)} stands already in {seen[name]}."
            seen[name] = _stem(path)


@pytest.mark.parametrize(
    "path",
    [
        path
        for pattern in (
            "*.md",
            "book/**/*.md",
            "book/reference/_data/*.yml",
            "companion/**/*.py",
            "benchmarks/*.py",
        )
        for path in sorted(ROOT.glob(pattern))
        if path not in PAGES
    ],
    ids=lambda path: path.relative_to(ROOT).as_posix(),
)
def test_words(path: Path):
    sentences = list(_forbidden_words(path.read_text(encoding="utf-8")))
    assert not sentences, f"{path.relative_to(ROOT)}: " + " ".join(sentences)


# ---- errata --------------------------------------------------------------------------------------------


def test_errata_are_complete_and_their_pages_exist():
    keys = {"id", "notes", "class", "correct", "why", "source", "page", "anchor"}
    entries = _yaml("errata.yml")
    assert entries, "book/reference/_data/errata.yml is missing or empty."
    ids = [entry["id"] for entry in entries]
    assert len(set(ids)) == len(ids), f"errata.yml repeats {sorted({i for i in ids if ids.count(i) > 1})}."
    for entry in entries:
        name = f"errata.yml, {entry['id']}:"
        assert entry.keys() == keys, f"{name} its keys must be {sorted(keys)}, got {sorted(entry)}."
        assert re.fullmatch(r"E\d{3}", entry["id"]), f"{name} an id reads E001."
        assert entry["class"] in ("CERTAIN", "IMPRECISE", "OUTDATED"), f"{name} no class {entry['class']}."
        assert (BOOK / f"{entry['page']}.md").exists(), f"{name} there is no page {entry['page']}."
        missing = set(entry["source"] or ()) - _bib_keys()
        assert not missing, f"{name} references.bib does not have {sorted(missing)}."


# ---- the rules themselves ------------------------------------------------------------------------------

GOOD_PAGE = """\
---
jupytext:
  text_representation: {extension: .md, format_name: myst}
kernelspec: {display_name: Python 3, language: python, name: python3}
---

(qa1-q6)=
# Q-6 · How does it work?

*多头自注意力机制*

:::{admonition} Short answer
It works.
:::

```{code-cell} ipython3
:tags: [remove-cell]

SETUP
```

```{code-cell} ipython3
from companion.book import start
start()
```

## The mechanism

Words {cite}`KEY`.

## Build it

```{code-cell} ipython3
assert 1 + 1 == 2
```

## See it

## What the notes say

ERRATA

## In practice

## Exercises

:::{exercise}
:label: ex-a
Why?
:::

```{solution-start} ex-a
:class: dropdown
```

```{code-cell} ipython3
1 + 1
```

```{solution-end}
```

:::{exercise}
:label: ex-b
How?
:::

```{solution-start} ex-b
:class: dropdown
```

```{code-cell} ipython3
2 + 2
```

```{solution-end}
```

## References

```{bibliography}
:filter: docname in docnames
```
"""


def _good_page() -> str:
    errata = [entry for entry in _yaml("errata.yml") or [] if entry["page"] == "qa1/q6-multi-head-attention"]
    rows = "".join(f"({entry['anchor']})=\n\n| {entry['id']} | this |\n\n" for entry in errata)
    text = GOOD_PAGE.replace("SETUP", notebooks.SETUP_CELL).replace("KEY", min(_bib_keys()))
    return text.replace("ERRATA", rows)


def _broken(rule, text: str, tmp_path: Path) -> list[str]:
    source = tmp_path / "page.md"
    source.write_text(text, encoding="utf-8")
    page = Page(BOOK / "qa1" / "q6-multi-head-attention.md", text, notebooks.from_source(source))
    return list(rule(page))


@pytest.mark.parametrize(
    "rule, old, new, sentence",
    [
        (rule_title, "(qa1-q6)=\n", "", "must stand above the title"),
        (rule_title, "How does it work?", "It works.", "its title must read"),
        (rule_title, "*多头自注意力机制*", "", "in italics under the title"),
        (rule_title, "*多头自注意力机制*", "*别的问题*", "must be the notes' question"),
        (rule_sections, "## See it\n", "", "level-two headings"),
        (rule_short_answer, "Short answer", "Summary", "must stand between the title"),
        (rule_short_answer, "It works.", "word " * 121, "1 to 120 words, it has 121"),
        (rule_start, "start()\n", "pass\n", "must call `companion.book.start()`"),
        (rule_build_it, "assert 1 + 1 == 2", "x = 1\n" * 26, "has 26 lines, at most 25"),
        (rule_build_it, "assert 1 + 1 == 2", "1 + 1", "assert_close"),
        (rule_figures, "## See it\n", "## See it\n\n![](a.png)\n", "has no alt text"),
        (rule_figures, "## See it\n", "## See it\n\n<svg viewBox='0 0 1 1'></svg>\n", "no aria-label"),
        (rule_exercises, ":label: ex-b\n", "", "a `:label:` of its own"),
        (rule_exercises, "{solution-start} ex-b", "{solution-start} ex-c", "exercise ex-b has no"),
        (rule_exercises, "```{code-cell} ipython3\n2 + 2\n```\n", "", "has no code cell that runs"),
        (rule_exercises, "{solution-start} ex-b\n:class: dropdown", "{solution-start} ex-b", "collapsed"),
        (rule_references, ":filter: docname in docnames\n", "", "must list the page's sources"),
        (rule_references, "{cite}`", "{cite}`nobody1900nothing,", "does not have"),
        (rule_errata, "| this |", "| that | E999", "E999 has a row"),
        (rule_errata, "(e015)=", "", "E015 needs its anchor"),
        (rule_errata, "| E015 |", "| E |", "E015 names this page"),
        (rule_words, "Words", "Words simply", 'says "simply"'),
        (rule_portable, "Words", "Words[^1]", "has a footnote"),
        (
            rule_portable,
            "## In practice",
            "### The $d_k$ rule\n\n## In practice",
            "a heading holds mathematics",
        ),
        (rule_portable, "1 + 1\n", "import plotly\n", "it imports plotly"),
        (rule_links, "Words", "[Words](/qa1)", "a link begins with"),
    ],
)
def test_a_broken_page_is_told_what_is_wrong(rule, old, new, sentence, tmp_path):
    good = _good_page()
    assert old in good
    assert not _broken(rule, good, tmp_path)
    found = _broken(rule, good.replace(old, new), tmp_path)
    assert any(sentence in text for text in found), found
