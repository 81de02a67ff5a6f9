"""The site: every public name has an entry, every page a place, and a browser can use it."""

import functools
import http.server
import importlib.util
import inspect
import pathlib
import re
import shutil
import threading
import types
import zlib

import pytest

import logitjax

ROOT = pathlib.Path(__file__).parents[1]
SITE = ROOT / "build" / "site"
SPEC = importlib.util.spec_from_file_location("_reference", ROOT / "docs" / "_reference.py")
reference = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(reference)


def seen(module):
    """Public names as Python finds them: classes and functions of ours, and submodules' own."""
    for name, value in vars(module).items():
        if name.startswith("_"):
            continue
        if isinstance(value, types.ModuleType):
            continue
        home = getattr(value, "__module__", "")
        if (inspect.isclass(value) or inspect.isroutine(value)) and home.startswith("logitjax."):
            yield f"{module.__name__}.{name}"


@functools.cache
def expected():
    return {n for p in reference.PACKAGES if p != "commands" for n in seen(reference.imported(p))}


@pytest.mark.every_change
@pytest.mark.slow
def test_every_public_name_has_an_entry_in_the_reference():
    pages = reference.pages()
    text = "\n".join(pages.values())
    entries = set(re.findall(r"^\.\. auto(?:function|class):: (\S+)", text, re.MULTILINE))
    data = re.findall(r"^\.\. py:data:: (\S+)\n   :module: (\S+)", text, re.MULTILINE)
    entries |= {f"{module}.{name}" for name, module in data}
    # What a module of many names merely imports for itself has its entry at home.
    homes = {name.rpartition(".")[2] for name in entries}
    missing = {n for n in expected() - entries if n.rpartition(".")[2] not in homes}
    assert not missing
    assert {f"{p}.rst" for p in logitjax._PACKAGES} <= set(pages)
    assert len(entries) > 300


def test_every_page_is_in_the_contents():
    text = (ROOT / "docs" / "index.md").read_text()
    listed = set(re.findall(r"^([\w/]+)$", text, flags=re.MULTILINE))
    docs = ROOT / "docs"
    pages = {str(path.relative_to(docs).with_suffix("")) for path in docs.rglob("*.md")} - {"index"}
    assert pages | {"reference/index"} == listed


def built():
    if not (SITE / "objects.inv").exists():
        pytest.skip("there is no site: make docs")


@pytest.mark.slow
def test_the_built_site_has_every_public_name():
    built()
    raw = (SITE / "objects.inv").read_bytes()
    lines = zlib.decompress(raw.split(b"\n", 4)[4]).decode().splitlines()
    names = {line.split(" py:")[0] for line in lines if " py:" in line}
    homes = {name.rpartition(".")[2] for name in names}
    assert not {n for n in expected() - names if n.rpartition(".")[2] not in homes}


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def browser():
    """Debian's chromium, headless, and the address of the site."""
    built()
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium: make docs")
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (binary and driver):
        pytest.skip("no browser: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    service = webdriver.ChromeService(executable_path=driver)
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(SITE))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with webdriver.Chrome(options=options, service=service) as chrome:
        chrome.implicitly_wait(20)
        yield chrome, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.slow
def test_a_browser_finds_its_way_from_the_front_page_to_a_name(browser):
    chrome, address = browser
    chrome.set_window_size(1280, 900)
    chrome.get(f"{address}/index.html")
    chrome.find_element("link text", "Prune and distil a model").click()
    assert chrome.title.startswith("Prune and distil")
    assert "logitjax distill" in chrome.find_element("tag name", "main").text
    chrome.get(f"{address}/search.html?q=linear_cross_entropy")
    first = chrome.find_element("css selector", "#search-results li a")
    first.click()
    assert "linear_cross_entropy" in chrome.find_element("tag name", "main").text


# What reaches beyond the screen and does not scroll by itself, for the error.
WIDEST = """
const inside = e => {
  for (e = e.parentElement; e; e = e.parentElement)
    if (e.tagName != 'HTML' && getComputedStyle(e).overflowX != 'visible') return true;
};
return [...document.querySelectorAll('article *')].filter(e =>
  e.getBoundingClientRect().right > arguments[0] + 1 && !inside(e)
).map(e => `${e.tagName} ${e.className} ${e.textContent.slice(0, 40)}`).slice(0, 5)
"""


# Tables that show a part of themselves; stacked or not, all of it has to be in sight.
CUT_TABLES = """
return [...document.querySelectorAll('article table')].filter(t =>
  t.scrollWidth > t.clientWidth + 1).map(t => t.textContent.slice(0, 60))
"""


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_plots_are_drawn_and_pages_are_not_wider_than_the_screen(browser, width):
    chrome, address = browser
    chrome.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 600},
    )
    wide = {}
    pages = [*SITE.glob("*.html"), *SITE.glob("[!_]*/*.html")]
    for path in sorted(pages):
        chrome.get(f"{address}/{path.relative_to(SITE)}")
        if chrome.execute_script("return document.documentElement.scrollWidth") > width:
            wide[path.name] = chrome.execute_script(WIDEST, width)
        cut = chrome.execute_script(CUT_TABLES)
        assert not cut, (path.name, cut)
        broken = chrome.execute_script(
            "return [...document.querySelectorAll('main img')]"
            ".filter(i => !i.complete || !i.naturalWidth).map(i => i.src)"
        )
        assert not broken, path.name
    assert not wide
