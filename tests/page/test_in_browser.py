"""The page in Chromium: it opens from a file, asks for nothing, and does what it says with mouse and keyboard."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks.made_run import Made, make_run
from rlxf.report.make import Page as ReportPage
from tests.page.browser import chromium, url_of

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

HOSTILE = "</script><script>window.hit = 1</script><img src=x onerror='window.hit = 2'> \x1b[31m\u202ereversed \u200b"
ALL_DRAWN = "[...document.querySelectorAll('.plot')].every((plot) => plot.querySelector('svg path'))"
SCROLL_DOWN = """async () => {
  for (let y = 0; y < document.documentElement.scrollHeight; y += 700) {
    scrollTo(0, y);
    for (let frame = 0; frame < 3; frame++) await new Promise(requestAnimationFrame);
  }
}"""
ALIKE = {"prompt": "likeness", "chosen": "a plot so fresh but slow", "rejected": "a plot so dull but very slow"}
SERIOUS = ("serious", "critical")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@dataclass(frozen=True, slots=True)
class Opened:
    """A page in the browser, and what it said and asked for."""

    page: Page
    said: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)


@contextmanager
def opened(
    browser: Browser, file: Path, *, dark: bool = False, width: int = 1300, axe: bool = False
) -> Iterator[Opened]:
    """Open a page. ``axe``: let the test run a script of its own, which the page's policy forbids."""
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light", bypass_csp=axe
    )
    found = Opened(context.new_page())
    found.page.on("console", lambda message: found.said.append(message.text))
    found.page.on("pageerror", lambda error: found.said.append(str(error)))
    found.page.on("request", lambda request: found.asked.append(request.url))
    found.page.goto(url_of(file))
    found.page.wait_for_selector("html[data-ready]")
    try:
        yield found
        assert found.said == []
        assert found.asked == [url_of(file)]
    finally:
        context.close()


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of one run, with a fault and texts that mean harm."""
    folder = make_run(tmp_path_factory.mktemp("one") / "run", Made(steps=60, fault=True, pairs=4))
    row = {"step": 60, "prompt": [{"role": "user", "content": HOSTILE}], "chosen": f"c {HOSTILE}", "rejected": "r"}
    with (folder / "samples.jsonl").open("a") as file:
        file.write(json.dumps({**row, "chosen_score": 99.0, "rejected_score": 0.0}) + "\n")
        file.write(json.dumps({**row, **ALIKE, "chosen_score": 1.0, "rejected_score": 0.5}) + "\n")
    ReportPage([folder], folder / "report.html").write()
    return folder / "report.html"


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of three runs, one of them of an earlier revision."""
    root = tmp_path_factory.mktemp("three")
    made = {"a": Made(pairs=2), "b": Made(seed=2, kl=60, ends=False, pairs=2), "c": Made(seed=3, extras=False, pairs=2)}
    folders = [make_run(root / name, what) for name, what in made.items()]
    ReportPage(folders, root / "report.html").write()
    return root / "report.html"


@pytest.fixture(scope="module")
def shared(browser: Browser, one: Path) -> Iterator[Page]:
    """The page of one run, for the tests that leave it as it is but for the pairs."""
    with opened(browser, one) as found:
        yield found.page


@pytest.fixture
def pairs(shared: Page) -> Page:
    """The same, with the browser of pairs as it is at first."""
    shared.fill("#search", "")
    shared.select_option("#step", "")
    shared.select_option("#sort", "newest")
    shared.check("input[value=words]")
    shared.evaluate("document.activeElement.blur()")
    return shared


def text(page: Page, selector: str) -> str:
    return page.locator(selector).first.inner_text()


def steps(page: Page) -> list[int]:
    shown = page.locator("#list .meta span:first-child").all_inner_texts()
    return [int(line.removeprefix("step ")) for line in shown]


def margins(page: Page) -> list[float]:
    shown = page.locator("#list .meta span:nth-child(2)").all_inner_texts()
    return [float(line.removeprefix("margin ").replace("\N{MINUS SIGN}", "-")) for line in shown]


def test_every_section_shows_what_it_is_for(shared: Page) -> None:
    page = shared
    assert text(page, "h1") == "online_dpo_trainer_small"
    assert "Ended well" in text(page, ".badge")
    assert "eval/win_rate" in text(page, "#top table")
    assert page.locator("#top .spark").count() > 10
    assert "torch 2.13.0" in text(page, ".facts")
    page.evaluate(SCROLL_DOWN)
    assert page.evaluate(ALL_DRAWN)
    titles = page.locator("#learning figcaption b").all_inner_texts()
    for title in ("What happened when", "Reward", "Win rate", "KL to the reference", "Reward against KL"):
        assert title in titles
    rail = page.locator("#learning .rail").first.get_attribute("aria-label") or ""
    assert "Faults: 1" in rail
    assert "Resumes: 1" in rail
    assert "Evaluations: 4" in rail
    machine = page.locator("#machine figcaption b").all_inner_texts()
    assert {"Stages of a step", "Idle", "Sampled tokens", "Resident memory", "Size of a push"} <= set(machine)
    assert page.locator("#answers-body tbody tr").count() == 4
    labels = page.locator(".plot").evaluate_all("(plots) => plots.map((plot) => plot.getAttribute('aria-label'))")
    assert all(labels)


def test_pairs_are_searched_sorted_and_filtered(pairs: Page) -> None:
    page = pairs
    assert text(page, "#count") == "30 of 30 pairs"
    assert steps(page) == sorted(steps(page), reverse=True)
    page.select_option("#sort", "margin")
    assert margins(page) == sorted(margins(page), reverse=True)
    assert margins(page)[0] == 99
    page.select_option("#sort", "close")
    assert margins(page) == sorted(margins(page))
    page.select_option("#step", "20")
    assert set(steps(page)) == {20}
    assert text(page, "#count") == "4 of 30 pairs"
    page.select_option("#step", "")
    page.fill("#search", "reversed onerror")
    assert text(page, "#count") == "1 of 30 pairs"
    page.fill("#search", "no such words")
    assert "No pair matches." in text(page, "#detail")


def test_the_keyboard_moves_through_the_pairs(pairs: Page) -> None:
    page = pairs
    selected = page.locator('#list [aria-selected="true"]')
    assert selected.get_attribute("data-place") == "0"
    page.keyboard.press("j")
    page.keyboard.press("j")
    page.keyboard.press("k")
    assert selected.get_attribute("data-place") == "1"
    page.keyboard.press("/")
    page.keyboard.type("jk")
    assert page.locator("#search").input_value() == "jk"
    page.fill("#search", "")
    page.locator("#list").focus()
    page.keyboard.press("End")
    assert selected.get_attribute("data-place") == "29"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "detail"


def test_a_pair_shows_what_differs_and_the_log_ratio_of_each_token(pairs: Page) -> None:
    page = pairs
    page.select_option("#step", "60")
    page.fill("#search", "likeness")
    assert page.locator(".side.chosen mark").all_inner_texts() == ["fresh"]
    assert page.locator(".side.rejected mark").all_inner_texts() == ["dull", " very"]
    page.fill("#search", "")
    assert "policy version 59" in text(page, ".prompt")
    assert "praise" in text(page, ".side dl")
    page.check("input[value=tokens]")
    assert "log-ratio of policy to reference, nats" in text(page, ".shades")
    tokens = page.locator(".chosen .tokens")
    tokens.focus()
    assert text(page, ".chosen .readout").startswith("Token 1 of ")
    page.keyboard.press("ArrowRight")
    assert text(page, ".chosen .readout").startswith("Token 2 of ")
    page.locator(".chosen .token").nth(4).hover()
    assert "nats (policy" in text(page, ".chosen .readout")
    assert text(page, ".chosen .readout").startswith("Token 5 of ")


def test_hostile_texts_stay_text_and_hidden_characters_are_shown(pairs: Page) -> None:
    page = pairs
    page.fill("#search", "onerror")
    assert "<img src=x onerror='window.hit = 2'>" in text(page, ".chosen .text")
    assert page.evaluate("window.hit") is None
    assert page.locator("main img, main script").count() == 0
    assert page.locator("#detail .prompt .hidden-mark").all_inner_texts() == ["\u241b", "U+202E", "U+200B"]
    assert text(page, ".role") == "user"


def test_several_runs_stand_beside_each_other(browser: Browser, three: Path) -> None:
    with opened(browser, three) as found:
        page = found.page
        assert text(page, "h1") == "3 runs"
        assert [badge.split()[-1] for badge in page.locator(".badge").all_inner_texts()] == ["well", "Running", "well"]
        heads = page.locator("#top table").first.locator("thead th").all_inner_texts()
        assert len(heads) == 1 + 2 * 3
        assert "training.seed" in page.locator("#top").inner_text()
        reward = page.locator("#learning .plot").nth(1).get_attribute("aria-label") or ""
        assert all(f"{run}: " in reward for run in "abc")
        page.select_option("#run", "2")
        assert "no answers" in text(page, "#answers-body")
        page.select_option("#run", "1")
        assert page.locator("#answers-body tbody tr").count() == 4


def test_light_and_dark_are_chosen_by_the_system_or_by_the_reader(browser: Browser, one: Path) -> None:
    with opened(browser, one, dark=True) as found:
        page = found.page

        def ground() -> Any:
            return page.evaluate("getComputedStyle(document.body).backgroundColor")

        assert ground() == "rgb(20, 23, 27)"
        page.select_option("#theme", "light")
        assert ground() == "rgb(247, 247, 245)"


def test_paper_has_all_sections_open_and_every_chart(browser: Browser, one: Path) -> None:
    with opened(browser, one, dark=True) as found:
        page = found.page
        page.emulate_media(media="print")
        page.evaluate("dispatchEvent(new Event('beforeprint'))")
        assert page.locator("details:not([open]):not(.no-print)").count() == 0
        assert page.locator(".bar").is_hidden()
        assert page.locator("#list").is_hidden()
        assert page.evaluate(ALL_DRAWN)
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        page.evaluate("dispatchEvent(new Event('afterprint'))")
        assert page.locator("details:not([open])").count() > 0
        assert len(page.pdf()) > 50_000


def test_a_narrow_window_needs_no_scrolling_to_the_side(browser: Browser, one: Path) -> None:
    with opened(browser, one, width=390) as found:
        assert found.page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_the_page_of_a_run_that_goes_on_loads_itself_again_if_asked(browser: Browser, tmp_path: Path) -> None:
    folder = make_run(tmp_path, Made(steps=4, num_steps=8, pairs=1, ends=False))
    ReportPage([folder], folder / "report.html").write(alive=True, follows=True)
    context = browser.new_context()
    page = context.new_page()
    page.clock.install()
    loads: list[str] = []
    page.on("load", lambda loaded: loads.append(loaded.url))
    page.goto(url_of(folder / "report.html"))
    page.clock.fast_forward(31_000)
    assert len(loads) == 1
    page.check("#reload")
    page.clock.fast_forward(31_000)
    page.wait_for_function("() => document.querySelector('#reload')?.checked")
    assert len(loads) == 2
    context.close()


def test_a_chart_says_its_numbers_under_the_pointer(shared: Page) -> None:
    plot = shared.locator("#learning .plot").nth(1)
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    assert box is not None
    shared.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    tip = plot.locator(".tip")
    tip.wait_for()
    assert tip.inner_text().startswith("step ")
    assert "evaluation" in tip.inner_text()
    assert " \N{PLUS-MINUS SIGN} " in tip.inner_text()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_no_serious_barrier_is_found(browser: Browser, one: Path, dark: bool) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    with opened(browser, one, dark=dark, axe=True) as found:
        found.page.check("input[value=tokens]")
        found.page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
        rules = {"runOnly": ["color-contrast"]} if dark else {}  # the rest is the same in both
        results = axe.run(found.page, options={"resultTypes": ["violations"], **rules}).response
        serious = [(one["id"], one["nodes"][0]["html"]) for one in results["violations"] if one["impact"] in SERIOUS]
        assert serious == []
