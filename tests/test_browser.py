"""The built book as a browser sees it: `make browser` serves _build/html and reads every page in Chromium.

Chromium is the machine's own (CHROMIUM names another one); playwright drives it and downloads nothing.
"""

import functools
import os
import re
import shutil
import subprocess
import threading
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="`make browser` installs playwright")
pytestmark = pytest.mark.browser

ROOT = Path(__file__).parents[1]
SITE = ROOT / "_build" / "html"
PAGES = sorted(p.relative_to(SITE).as_posix() for p in SITE.glob("book/**/*.html"))
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

SETTLE = """async () => {
    if (window.MathJax && MathJax.startup) await MathJax.startup.promise;
    for (const e of document.querySelectorAll('details')) e.open = true;
    for (const e of document.querySelectorAll('.toggle-hidden')) e.classList.remove('toggle-hidden');
    for (const e of document.querySelectorAll('img')) e.loading = 'eager';
    await Promise.all([...document.images].map(e => e.decode().catch(() => {})));
    await document.fonts.ready;
}"""

MATHEMATICS = r"""() => {
    const found = [];
    for (const e of document.querySelectorAll('.math'))
        if (!e.querySelector('mjx-container')) found.push('not typeset: ' + e.textContent.slice(0, 60));
    for (const e of document.querySelectorAll('mjx-merror, [data-mml-node="merror"]'))
        found.push('an error in the mathematics: ' + (e.getAttribute('title') || e.textContent).slice(0, 80));
    for (const e of document.querySelectorAll('mtext[mathcolor="red"]'))
        found.push('a macro that MathJax does not know: ' + e.textContent);
    const walk = document.createTreeWalker(document.querySelector('article'), NodeFilter.SHOW_TEXT);
    const raw = /\$\$|\\\(|\\\[|\\begin\{|\\frac|\$[\\\w{][^$]*[\\^_][^$]*\$/;
    while (walk.nextNode()) {
        const node = walk.currentNode;
        if (raw.test(node.data) && !node.parentElement.closest('code, pre, script, style, mjx-container'))
            found.push('raw TeX: ' + node.data.trim().slice(0, 60));
    }
    return found;
}"""

FIGURES = """() => {
    const found = [], article = document.querySelector('article');
    const name = e => (e.getAttribute('alt') || e.getAttribute('aria-label')
        || (e.querySelector && e.querySelector(':scope > title') || {}).textContent || '').trim();
    for (const e of article.querySelectorAll('img')) {
        const where = 'the image ' + (e.getAttribute('src') || '').slice(-60);
        if (!e.naturalWidth || !e.getBoundingClientRect().width) found.push(where + ' has no size');
        if (!name(e)) found.push(where + ' has no alt text');
    }
    for (const e of article.querySelectorAll('svg')) {
        if (e.parentElement.closest('svg, button, mjx-container') || e.closest('.svg-inline--fa')) continue;
        if (e.getAttribute('aria-hidden') === 'true') continue;
        const box = e.getBoundingClientRect(), where = 'the drawing ' + e.outerHTML.slice(0, 70);
        if (!box.width || !box.height) found.push(where + ' has no size');
        if (!name(e) && !e.hasAttribute('aria-labelledby')) found.push(where + ' has no aria-label');
    }
    return found;
}"""

TOO_WIDE = """() => {
    const limit = document.documentElement.clientWidth;
    if (document.scrollingElement.scrollWidth <= limit) return [];
    const scrolls = e => e && e !== document.body && e !== document.documentElement
        && (getComputedStyle(e).overflowX !== 'visible' || scrolls(e.parentElement));
    const wide = [...document.querySelectorAll('main *')].filter(
        e => e.getBoundingClientRect().right > limit + 1 && !scrolls(e.parentElement));
    return [`the page is ${document.scrollingElement.scrollWidth} px wide in a window of ${limit}: `
        + wide.slice(0, 3).map(e => e.outerHTML.slice(0, 80)).join(' | ')];
}"""

# The contrast (WCAG 2.1) of each paragraph, heading, list item, table cell and listing to its background.
FAINT = """() => {
    const parse = s => (s.match(/[\\d.]+/g) || []).map(Number);
    const light = ([r, g, b]) => [r, g, b].map(c => c / 255)
        .map(c => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
        .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
    const over = ([r, g, b, a = 1], under) => [r, g, b].map((c, i) => a * c + (1 - a) * under[i]);
    const background = e => {
        if (!e) return [255, 255, 255];
        const own = parse(getComputedStyle(e).backgroundColor);
        return own.length < 4 || own[3] === 1 ? own.slice(0, 3) : over(own, background(e.parentElement));
    };
    const found = [];
    for (const e of document.querySelectorAll('article :is(p, h1, h2, h3, li, td, th, pre, summary, dt)')) {
        if (!e.textContent.trim() || !e.getClientRects().length) continue;
        const under = background(e), text = over(parse(getComputedStyle(e).color), under);
        const [a, b] = [light(text), light(under)].sort((x, y) => y - x);
        const ratio = (a + 0.05) / (b + 0.05);
        if (ratio < 4.5) found.push(`contrast ${ratio.toFixed(1)}: ${e.textContent.trim().slice(0, 50)}`);
    }
    return found;
}"""


@pytest.fixture(scope="session")
def address():
    """The address at which the built book is served, on this machine alone."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(SITE)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture(scope="session")
def chromium():
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.fail("no Chromium on this machine: install your system's `chromium`, or set CHROMIUM to one")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path)
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium):
    """`visit(url, lands=url, **context)`: the page, settled, and what went wrong on the way."""
    contexts = []

    def visit(url, lands=None, **options):
        context = chromium.new_context(viewport=DESKTOP, **options)
        contexts.append(context)
        page, wrong, home = context.new_page(), [], urlsplit(url)
        ours = (home.scheme, home.netloc)

        def on_request(request):
            parts = urlsplit(request.url)
            if parts.scheme not in ("data", "blob") and (parts.scheme, parts.netloc) != ours:
                wrong.append(f"a request to another host: {request.url}")

        def on_response(response):
            if response.status >= 400:
                wrong.append(f"status {response.status} for {response.url}")

        page.on("request", on_request)
        page.on("response", on_response)
        page.on("requestfailed", lambda r: wrong.append(f"a failed request: {r.url} ({r.failure})"))
        page.on("pageerror", lambda error: wrong.append(f"an uncaught error: {error}"))
        page.on("console", lambda m: m.type == "error" and wrong.append(f"an error on the console: {m.text}"))
        page.goto(url, wait_until="load")
        page.wait_for_url(lands or url)
        page.evaluate(SETTLE)
        return page, wrong

    yield visit
    for context in contexts:
        context.close()


def test_the_book_is_built():
    assert PAGES, "there is no book in _build/html: run `make book`"


@pytest.mark.parametrize("name", PAGES)
def test_page(name, address, visit):
    """It loads whole, is typeset, legible in light and dark, fits a phone, and says how to cite it."""
    page, wrong = visit(address + name)
    wrong += page.evaluate(MATHEMATICS) + page.evaluate(FIGURES) + _citation(name, page)
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        page.wait_for_function(f"document.documentElement.dataset.theme === '{scheme}'")
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        if (max(map(int, re.findall(r"\d+", colour)[:3])) < 128) != (scheme == "dark"):
            wrong.append(f"the background is {colour} in the {scheme}")
        wrong += [f"in the {scheme}, {one}" for one in page.evaluate(FAINT)]
    page.set_viewport_size(PHONE)
    wrong += page.evaluate(TOO_WIDE)
    assert not wrong, _list(name, wrong)


def _citation(name: str, page) -> list[str]:
    block = page.locator("details.cite-this-page")
    if block.count() != 1:
        return ["the block `Cite this page` is missing"]
    entry = block.locator("pre").inner_text().replace("\\", "")
    title = page.evaluate("document.querySelector('article h1').firstChild.textContent").strip()
    home = os.environ.get("BOOK_URL", "").rstrip("/")
    wrong = [] if title in entry else [f"the citation does not name the title {title}"]
    if (f"{home}/{name}" if home else name) not in entry:
        wrong.append("the citation does not name the page's address")
    if block.locator("button.copybtn").count() != 1:
        wrong.append("the citation has no copy button")
    return wrong


def test_the_address_of_the_site_leads_to_the_front_door(address, visit):
    _, wrong = visit(address, lands=f"{address}book/index.html")
    assert not wrong, _list("index.html", wrong)
    # Without an icon of its own a browser asks for /favicon.ico, once, and only sometimes in time to be seen.
    assert '<link rel="icon" href="data:' in (SITE / "index.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("place", ["http", "file"])
def test_search_finds_multi_head(place, address, visit):
    home = address if place == "http" else SITE.as_uri() + "/"
    page, wrong = visit(f"{home}search.html?q=multi-head")
    page.wait_for_selector("#search-results li a", timeout=10_000)
    links = page.eval_on_selector_all("#search-results li a", "all => all.map(a => a.href)")
    assert any("/book/" in link for link in links), f"search finds no page, only {links}"
    if place == "http":  # from a folder, a browser lets no script read the pages to quote them
        assert not wrong, _list("search.html", wrong)


def test_a_page_opens_from_a_folder(visit):
    """Without a server: scripts, styles and mathematics come from files beside the page."""
    page, wrong = visit((SITE / _one_with_mathematics()).as_uri())
    assert page.locator("mjx-container").count(), "no mathematics was typeset"
    missing = [one for one in wrong if "FILE_NOT_FOUND" in one or "host" in one]
    missing += page.evaluate(MATHEMATICS)
    assert not missing, _list(page.url, missing)


class _Links(HTMLParser):
    """The ids and the links of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.ids, self.links = set(), []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.ids |= {attributes[key] for key in ("id", "name") if attributes.get(key)}
        if tag == "a":
            self.links += [attributes[key] for key in ("href", "xlink:href") if attributes.get(key)]


@functools.cache
def _links(name: str) -> _Links:
    return _Links((SITE / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", PAGES)
def test_internal_links_and_anchors_resolve(name):
    broken = []
    for link in _links(name).links:
        target = urlsplit(urljoin(f"http://book/{name}", link)) if not urlsplit(link).scheme else None
        if target is None:
            continue
        path, anchor = unquote(target.path).lstrip("/"), unquote(target.fragment)
        if path.endswith("/") or not path:
            path += "index.html"
        if not (SITE / path).is_file():
            broken.append(f"{link} leads to no file")
        elif anchor and path.endswith(".html") and anchor not in _links(path).ids:
            broken.append(f"{link} leads to no anchor")
    assert not broken, _list(name, broken)


@pytest.mark.parametrize("name", PAGES)
def test_launch_links_lead_to_files_of_the_repository(name):
    patterns = (
        r"https://mybinder\.org/v2/gh/([^/]+/[^/]+)/[^/?]+\?urlpath=lab/tree/(.+)",
        r"https://colab\.research\.google\.com/github/([^/]+/[^/]+)/blob/[^/]+/(.+)",
    )
    repository = os.environ.get("BOOK_REPOSITORY", "")
    launches = [m for link in _links(name).links for p in patterns if (m := re.fullmatch(p, link))]
    mentions = [link for link in _links(name).links if "mybinder.org" in link or "colab.research" in link]
    notebook = (ROOT / name).with_suffix(".ipynb").exists()
    assert len(launches) == len(mentions), f"{name} has a launch link of unknown form: {mentions}"
    assert len(launches) == (2 if repository and notebook else 0), f"{name} has {len(launches)} launch links"
    for launch in launches:
        assert repository.rstrip("/").endswith(launch[1]), f"{name} launches {launch[1]}, not {repository}"
        assert unquote(launch[2]) in _tracked(), f"{name} launches {launch[2]}, which git does not track"


@functools.cache
def _tracked() -> frozenset[str]:
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    return frozenset(listing.stdout.splitlines())


def _one_with_mathematics() -> str:
    return next(p for p in PAGES if 'class="math' in (SITE / p).read_text(encoding="utf-8"))


def _list(name: str, wrong: list[str]) -> str:
    return "\n".join([f"{name}:", *(f"  {one}" for one in dict.fromkeys(wrong))])
