"""A report's page in a real browser: it draws, answers to mouse and keyboard, and loads nothing."""

from __future__ import annotations

import functools
import io
import itertools
import json
import shutil
import urllib.parse
from pathlib import Path

import pytest
import reports

from minilora.lab.report.page import render

pytestmark = pytest.mark.browser

ALL = ["clean", "adalora", "gpt2", "hostile"]
WIDTHS = [360, 1400]
OPTIONS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--hide-scrollbars",
    "--window-size=1400,900",
)
# Every chart has been drawn when Plotly has put its traces into the element.
DRAWN = """
return [...document.querySelectorAll(".chart")].every(c => c.querySelector(".mlayer"))
"""
BOXES = """
return [...document.querySelectorAll(".chart")].map((chart) => {
  const box = chart.getBoundingClientRect();
  return [chart.id, box.left + scrollX, box.top + scrollY, box.width, box.height];
})
"""
OUTSIDE = """
const limit = document.documentElement.clientWidth + 0.5;
const isClipped = (e) => e.closest(".scroll, .chart, select");
return [...document.body.querySelectorAll("*")]
  .filter((e) => !isClipped(e) && e.getBoundingClientRect().right > limit)
  .map((e) => e.outerHTML.slice(0, 80))
"""
# The elements that the Tab key reaches, in the order of the document; of a text, its tokens.
FOCUSABLE = """
const all = "a[href], summary, input, select, [tabindex='0']";
return [...document.querySelectorAll(all)].filter((e) => e.checkVisibility())
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Chromium with a new profile."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    for option in (*OPTIONS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    driver = webdriver.Chrome(options=options, service=service)
    driver.set_page_load_timeout(120)
    driver.set_script_timeout(120)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The file of a report's page, by the report's name."""
    folder = tmp_path_factory.mktemp("pages")

    @functools.cache
    def write(name: str) -> Path:
        path = folder / f"{name}.html"
        path.write_text(render(getattr(reports, name)()), encoding="utf-8")
        return path

    return write


def resize(browser, width: int) -> None:
    """A window's content of this width: windows themselves have a least one."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def open_page(browser, path: Path, width: int = 1400) -> None:
    resize(browser, width)
    browser.get_log("browser")
    browser.get_log("performance")
    browser.get(path.as_uri())
    wait(browser, lambda: browser.execute_script(DRAWN))


def wait(browser, condition) -> None:
    """Until a condition holds: the browser reports some changes to the page a frame later."""
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 60, 0.1).until(lambda _: condition())


def find(browser, selector: str):
    return browser.find_element("css selector", selector)


def text_of(browser, selector: str) -> str:
    return find(browser, selector).get_property("textContent")


def trace(browser, chart: str, index: int) -> tuple[list, list]:
    """(x, y) of a trace as the browser draws it."""
    script = "const t = document.getElementById(arguments[0]).data[arguments[1]]; return [t.x, t.y]"
    x, y = browser.execute_script(script, chart, index)
    return x, y


def requested(browser) -> list[str]:
    """The addresses that the page has asked for."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    return [parameters["request"]["url"] for parameters in sent]


# ---- every report at every width -----------------------------------------------------------------


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ALL)
def test_page_draws_every_chart_in_its_place_and_loads_nothing(browser, pages, name, width):
    from PIL import Image

    open_page(browser, pages(name), width)
    assert browser.get_log("browser") == []
    addresses = requested(browser)
    assert addresses[0] == pages(name).as_uri()
    assert {urllib.parse.urlsplit(address).scheme for address in addresses} <= {"file", "data"}
    assert browser.execute_script("return window.pwned") is None
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.execute_script(OUTSIDE) == []

    boxes = browser.execute_script(BOXES)
    assert len(boxes) >= 3
    for _, left, _, wide, high in boxes:
        assert wide > 200
        assert high > 100
        assert 0 <= left <= left + wide <= width
    for one, other in itertools.combinations(boxes, 2):
        assert are_apart(one, other), (one, other)
    for name_of_chart, *_ in boxes:
        picture = Image.open(io.BytesIO(find(browser, f"#{name_of_chart}").screenshot_as_png))
        assert len(picture.convert("RGB").getcolors(2**24)) > 5, name_of_chart


def are_apart(one, other) -> bool:
    """Whether two boxes (name, left, top, width, height) do not overlap."""
    _, left, top, wide, high = one
    _, left2, top2, wide2, high2 = other
    return (
        left + wide <= left2 or left2 + wide2 <= left or top + high <= top2 or top2 + high2 <= top
    )


def test_page_shows_hostile_texts_as_they_are(browser, pages):
    open_page(browser, pages("hostile"))
    shown = browser.execute_script(
        "return [...document.querySelectorAll('dt, dd')].map(e => e.textContent)"
    )
    for text in ("<img src=x onerror='window.pwned = 1'>", "a\\x00b\\x1b[31m\\x7f", "__proto__"):
        assert text in shown
    ticks = browser.execute_script(
        "return [...document.querySelectorAll('#map-0 .ytick text')].map(e => e.textContent)"
    )
    assert {"<img s…1'>", "<b>bol…gt;"} <= set(ticks)
    assert not browser.find_elements("css selector", ".chart a, .chart b, img, svg[onload]")
    for token in browser.find_elements("css selector", "#tokens span")[:20]:
        browser.execute_script("arguments[0].focus()", token)
    assert browser.execute_script("return window.pwned") is None
    assert browser.get_log("browser") == []


@pytest.mark.parametrize(
    ("extra", "complaint"),
    [
        ("<script>window.pwned = 1</script>", "script"),
        ("<svg onload='window.pwned = 1'></svg>", "script"),
        ("<img src='http://127.0.0.1:9/x.png'>", "image"),
        ("<iframe src='data:text/html,x'></iframe>", "frame"),
    ],
)
def test_page_has_a_policy_that_stops_what_would_get_through(
    browser, pages, tmp_path, extra, complaint
):
    """What escaping prevents, done on purpose: the policy stops it, and the browser says so."""
    path = tmp_path / "page.html"
    page = pages("gpt2").read_text(encoding="utf-8")
    path.write_text(page.replace("<main>", f"<main>{extra}", 1), encoding="utf-8")
    open_page(browser, path)
    (entry,) = browser.get_log("browser")
    assert "Content Security Policy" in entry["message"]
    assert complaint in entry["message"].lower()
    assert browser.execute_script("return window.pwned") is None


# ---- charts and controls -------------------------------------------------------------------------


def test_page_draws_all_points_of_the_report(browser, pages):
    open_page(browser, pages("clean"))
    lengths = {
        chart: [len(trace(browser, chart, i)[1]) for i in range(count)]
        for chart, count in (("losses", 4), ("map-0", 1), ("spectrum", 2), ("rank", 4))
    }
    assert lengths == {
        "losses": [160, 160, 9, 9],
        "map-0": [6],
        "spectrum": [48, 8],
        "rank": [9, 1, 9, 1],
    }
    cells = browser.find_elements("css selector", "#map-0 .heatmap-label")
    assert len(cells) == 42


@pytest.mark.parametrize("chart", ["rank", "scaling"])
def test_page_moves_the_mark_by_arrow_keys(browser, pages, chart):
    from selenium.webdriver.common.keys import Keys

    open_page(browser, pages("clean"))
    mark = {"rank": 1, "scaling": 6}[chart]
    before = trace(browser, chart, mark)
    said = text_of(browser, f"#{chart}-output")
    control = find(browser, f"#{chart}-control")
    control.send_keys(Keys.ARROW_LEFT)
    control.send_keys(Keys.ARROW_LEFT)
    after = trace(browser, chart, mark)
    now = text_of(browser, f"#{chart}-output")
    expected = {"rank": ([6], "Rank 6: "), "scaling": ([0.75] * 3, "λ = 0.75 ")}[chart]
    assert before != after
    assert said != now
    assert after[0] == expected[0]
    assert now.startswith(expected[1])
    assert find(browser, f"#{chart}").get_attribute("aria-label").endswith(now)
    value = {"rank": "6", "scaling": "0.75"}[chart]
    assert control.get_attribute("aria-valuetext") == value


def test_page_shows_the_layer_that_is_chosen(browser, pages):
    from selenium.webdriver.support.ui import Select

    open_page(browser, pages("adalora"))
    wanted = reports.adalora().spectra[4]
    Select(find(browser, "#spectrum-control")).select_by_visible_text(wanted.layer)
    values = [float(f"{value:.5g}") if value > 0 else None for value in wanted.update]
    wait(browser, lambda: trace(browser, "spectrum", 1)[1] == values)
    assert f"from {wanted.update[0]:.3g} to" in text_of(browser, "#spectrum-output")


def test_page_takes_other_colours_in_the_dark_and_the_light_ones_on_paper(browser, pages):
    media = "Emulation.setEmulatedMedia"
    shade = """
    const line = document.querySelector("#losses .trace.scatter:nth-child(2) path.js-line");
    return [getComputedStyle(document.body).backgroundColor, getComputedStyle(line).stroke]
    """
    open_page(browser, pages("clean"))
    light = browser.execute_script(shade)
    dark_screen = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    browser.execute_cdp_cmd(media, dark_screen)
    try:
        wait(browser, lambda: browser.execute_script(shade)[1] != light[1])
        dark = browser.execute_script(shade)
        assert dark[0] != light[0]
        browser.execute_script("dispatchEvent(new Event('beforeprint'))")
        assert browser.execute_script(shade) == light
        browser.execute_script("dispatchEvent(new Event('afterprint'))")
        assert browser.execute_script(shade) == dark
    finally:
        browser.execute_cdp_cmd(media, {"features": []})


# ---- the text, and the keyboard ------------------------------------------------------------------


def test_page_shows_both_models_guesses_on_hover_and_on_focus(browser, pages):
    from selenium.webdriver import ActionChains

    open_page(browser, pages("clean"))
    tokens = browser.find_elements("css selector", "#tokens span")
    report = reports.clean().text.tokens
    assert len(tokens) == len(report)
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", tokens[8])
    ActionChains(browser).move_to_element(tokens[8]).perform()
    hovered = text_of(browser, "#token-output")
    browser.execute_script("arguments[0].focus()", tokens[5])
    focused = text_of(browser, "#token-output")
    for shown, token in ((hovered, report[8]), (focused, report[5])):
        assert f"loss {token.base:.3g} → {token.adapted:.3g} nats" in shown
        assert "the base expects the 31 %" in shown
        assert "the adapter expects" in shown
        assert "self 11 %" in shown
        assert token.text.replace("\n", "↵\n") in shown


def test_page_moves_through_the_text_by_arrow_keys(browser, pages):
    from selenium.webdriver.common.keys import Keys

    open_page(browser, pages("clean"), 360)
    place = """
    const tokens = [...document.querySelectorAll("#tokens span")];
    const stops = tokens.filter((t) => t.tabIndex === 0);
    const chosen = tokens.filter((t) => t.getAttribute("aria-selected") === "true");
    return [tokens.indexOf(document.activeElement), stops.length, chosen.length]
    """
    top = "return document.activeElement.getClientRects()[0].top"
    browser.execute_script("document.querySelector('#tokens span').focus()")
    count = len(reports.clean().text.tokens)
    places = []
    for key in (Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_LEFT, Keys.END, Keys.HOME):
        browser.switch_to.active_element.send_keys(key)
        index, stops, chosen = browser.execute_script(place)
        assert (stops, chosen) == (1, 1)
        places.append(index)
    assert places == [1, 2, 1, count - 1, 0]
    before = browser.execute_script(top)
    browser.switch_to.active_element.send_keys(Keys.ARROW_DOWN)
    browser.switch_to.active_element.send_keys(Keys.ARROW_DOWN)
    index, _, _ = browser.execute_script(place)
    assert browser.execute_script(top) > before or index > 2
    browser.switch_to.active_element.send_keys(Keys.ARROW_UP)
    browser.switch_to.active_element.send_keys(Keys.ARROW_UP)
    assert browser.execute_script(place)[0] < index


def test_page_is_reached_whole_by_the_tab_key_in_reading_order(browser, pages):
    from selenium.webdriver.common.keys import Keys

    open_page(browser, pages("clean"))
    expected = browser.execute_script(FOCUSABLE)
    assert len(expected) > 20
    reached = []
    for _ in expected:
        browser.switch_to.active_element.send_keys(Keys.TAB)
        reached.append(browser.switch_to.active_element)
    assert reached == expected
    assert sum(element.get_attribute("role") == "option" for element in reached) == 1


def test_page_opens_modules_and_tables_by_the_keyboard(browser, pages):
    from selenium.webdriver.common.keys import Keys

    open_page(browser, pages("clean"))
    for selector in (".tree details details details", "#rank_curve .numbers"):
        details = find(browser, selector)
        assert details.get_property("open") is False
        find(browser, f"{selector} > summary").send_keys(Keys.ENTER)
        assert details.get_property("open") is True
    rows = browser.find_elements("css selector", "#rank_curve tbody tr")
    assert len(rows) == 9
    assert rows[2].text.split() == ["2", "2.811", "0.003", "63", "%"]
