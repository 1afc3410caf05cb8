"""What the book adds to Sphinx: mathematics offline, addresses at deployment, how to run and cite a page.

BOOK_REPOSITORY and BOOK_URL, the addresses of the repository and of the site, are read from the environment.
Where they are missing, the book has no launch or repository buttons and cites pages by their path.
"""

import hashlib
import html
import importlib.util
import os
import re
import shutil
from pathlib import Path

import yaml
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.errors import ConfigError, ExtensionError

ROOT = Path(__file__).resolve().parents[1]
MATHJAX_PACKAGE = "sphinx-mathjax-offline"
MATHJAX_PARTS = ("tex-mml-chtml.js", "input/tex/extensions", "output/chtml/fonts/woff-v2")
LAUNCHERS = {"binderhub_url": "https://mybinder.org", "colab_url": "https://colab.research.google.com"}


def setup(app: Sphinx) -> dict:
    app.add_config_value("book_repository", os.environ.get("BOOK_REPOSITORY", "").rstrip("/"), "html", [str])
    app.add_config_value("book_url", os.environ.get("BOOK_URL", "").rstrip("/"), "html", [str])
    app.add_config_value("book_citation", {}, "html", [dict])
    app.add_config_value("book_static", "", "html", [str])
    if os.environ.get("BOOK_URL"):
        app.setup_extension("sphinxext.opengraph")
    app.connect("config-inited", remove_thebe, priority=100)
    app.connect("config-inited", fill_in, priority=400)
    app.connect("html-page-context", hint_at_launch)
    app.connect("html-page-context", append_citation)
    app.connect("build-finished", copy_mathjax)
    app.connect("build-finished", open_front_door, priority=100)  # before sphinx_external_toc's own redirect
    return {"version": "1.0", "parallel_read_safe": True, "parallel_write_safe": True}


def remove_thebe(app: Sphinx, config: Config) -> None:
    """Disconnect sphinx_thebe, which Jupyter Book always loads and which names a CDN in every page."""
    app.registry.css_files[:] = [x for x in app.registry.css_files if x[0] != "sphinx-thebe.css"]
    for listeners in app.events.listeners.values():
        listeners[:] = [x for x in listeners if x.handler.__module__.partition(".")[0] != "sphinx_thebe"]


def fill_in(app: Sphinx, config: Config) -> None:
    """Set the title beside the logo, and turn the addresses, where there are any, into buttons and tags."""
    options = config.html_theme_options
    options["logo"] = {"text": config.html_title}
    config.book_citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    config.book_static = _digest(ROOT / "book" / "_static")  # without it, an edited style alone is not copied
    if config.book_repository:
        if not re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+", config.book_repository):
            raise ConfigError(
                f"BOOK_REPOSITORY must be https://github.com/OWNER/NAME, got {config.book_repository}"
            )
        options["repository_url"] = config.book_repository
        options["use_repository_button"] = options["use_issues_button"] = True
        options["launch_buttons"] = {**options["launch_buttons"], **LAUNCHERS}
    if config.book_url:
        if not re.fullmatch(r"https?://[^\s/]+(/\S*)?", config.book_url):
            raise ConfigError(f"BOOK_URL must be an http address, got {config.book_url}")
        config.html_baseurl = config.ogp_site_url = config.book_url + "/"
        config.ogp_social_cards = {"enable": False}


def hint_at_launch(app: Sphinx, pagename: str, templatename: str, context: dict, doctree) -> None:
    """Say under the title of a notebook how to run it; the question in Chinese stands between."""
    path = Path(app.env.doc2path(pagename)) if doctree is not None else Path()
    if path.suffix != ".ipynb" or "body" not in context:
        return
    way = f"open <code>{html.escape(path.relative_to(ROOT).as_posix())}</code> in Jupyter"
    if app.config.book_repository:
        way += ", or take the rocket above to Colab or Binder"
    hint = f'<p class="launch-hint">Run and change this page: {way}.</p>'
    title = r"(<h1>.*?</h1>\s*(?:<p><em>[^<]*</em></p>)?)"
    context["body"] = re.sub(title, lambda found: found[1] + hint, context["body"], count=1, flags=re.DOTALL)


def append_citation(app: Sphinx, pagename: str, templatename: str, context: dict, doctree) -> None:
    """Close every page with a collapsed "Cite this page"; the copy button comes from sphinx-copybutton."""
    if doctree is None or "body" not in context:
        return
    entry = bibtex(app.config, pagename, app.env.titles[pagename].astext())
    context["body"] += (
        '<details class="cite-this-page"><summary>Cite this page</summary>\n'
        '<div class="highlight-bibtex notranslate"><div class="highlight">'
        f"<pre>{html.escape(entry)}</pre></div></div>\n</details>\n"
    )


def bibtex(config: Config, pagename: str, title: str) -> str:
    """The BibTeX entry of a page: its own title, and its URL, or its path where the site has no address."""
    book = config.book_citation
    author = " and ".join(f"{{{person['name']}}}" for person in book["authors"])
    key = re.sub(r"\W+", "-", pagename.removeprefix("book/"))
    place = f"{pagename}.html"
    fields = {
        "author": author,
        "title": "{" + re.sub(r"([&%$#_{}])", r"\\\1", title) + "}",
        "howpublished": book["title"] if title != book["title"] else "",
        "year": str(book["date-released"])[:4],
    }
    if config.book_url:
        fields |= {"url": f"{config.book_url}/{place}", "note": f"Version {book['version']}"}
    else:
        fields["note"] = f"Version {book['version']}, page {place}".replace("_", r"\_")
    lines = [f"  {name:<12} = {{{value}}}" for name, value in fields.items() if value]
    return f"@misc{{attention-to-agents-{key},\n" + ",\n".join(lines) + "\n}\n"


def copy_mathjax(app: Sphinx, exception: Exception | None) -> None:
    """Copy what a page needs of MathJax, 2 MB, from the installed package into the book."""
    if exception or app.builder.format != "html":
        return
    package = importlib.util.find_spec(MATHJAX_PACKAGE)
    if package is None:
        raise ExtensionError(f"{MATHJAX_PACKAGE} is not installed: build the book with `make book`.")
    source = Path(package.submodule_search_locations[0]) / "static" / "mathjax"
    target = Path(app.outdir) / "_static" / "mathjax"
    for part in MATHJAX_PARTS:
        if (source / part).is_dir():
            shutil.copytree(source / part, target / part, dirs_exist_ok=True)
        else:
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source / part, target / part)


def open_front_door(app: Sphinx, exception: Exception | None) -> None:
    """Write index.html, which leads to the first page; its icon is empty, or a browser would look for one."""
    if exception or app.builder.format != "html":
        return
    first, title = f"{app.config.root_doc}.html", html.escape(app.config.html_title)
    (Path(app.outdir) / "index.html").write_text(
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<link rel="icon" href="data:,"><meta http-equiv="refresh" content="0; url={first}"></head>'
        f'<body><a href="{first}">{title}</a></body></html>\n',
        encoding="utf-8",
    )


def _digest(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
