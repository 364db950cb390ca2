"""What people see, in a real browser, over real streams."""

from __future__ import annotations

import time
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from tests.support.browser import Browser, collector
from tests.support.streamed_job import LAYERS, LOUD_LAYER, LOUD_RANK, Job
from tests.support.waiting import free_port

pytestmark = pytest.mark.integration

Jobs = Callable[..., Job]


def press(browser: Browser, *keys: str) -> None:
    for key in keys:
        ActionChains(browser.driver).send_keys(key).perform()


def shown_range(browser: Browser) -> Any:
    return browser.ask("document.querySelector('[data-chart=norm] .js-plotly-plot').layout.xaxis.range")


def exploded(job: Job, steps: int = 200) -> int:
    """Train, explode, break; the step that broke."""
    job.train(steps)
    job.train(6, explode=True)
    job.train(1, nan=True)
    return steps + 7


def test_new_steps_of_a_live_run_show_on_their_own(
    url: str, job: Jobs, browser: Browser, record_property: Callable[[str, Any], None]
) -> None:
    run = job("live")
    run.train(40)
    run.stored()
    browser.open(f"{url}/run/live")
    browser.until("document.querySelector('[data-level=step] dd')?.innerText === '40'", "step 40")
    delays = []
    for _ in range(3):
        run.train(5)
        committed = run.stored()
        browser.until(f"document.querySelector('[data-level=step] dd').innerText === '{run.sent}'", "new steps")
        delays.append(time.time() - committed)
    browser.drawn(run.sent)
    record_property("seconds_from_commit_to_screen", max(delays))
    assert browser.text("#connection") == "live"


def test_an_incident_shows_on_its_own_with_what_where_and_what_to_do(
    url: str, job: Jobs, browser: Browser, record_property: Callable[[str, Any], None]
) -> None:
    run = job("doomed")
    run.train(200)
    run.stored()
    browser.open(f"{url}/run/doomed")
    browser.drawn(200)
    assert browser.text("#incident") == ""
    run.train(6, explode=True)
    run.train(1, nan=True)
    sent = time.time()
    browser.until("document.querySelector('article.incident')", "the incident")
    record_property("seconds_from_sending_the_nan_to_screen", time.time() - sent)
    card = browser.text("article.incident")
    layer = LAYERS[LOUD_LAYER]
    for word in ("Exploding gradients", "step 207", f"rank\n{LOUD_RANK}", f"layer\n{layer}", "Try", "checkpoint"):
        assert word in card, card
    assert "failing" in browser.text("#condition")
    browser.drawn(207)
    browser.driver.find_element(By.LINK_TEXT, "Open the runbook").click()
    browser.until("document.querySelector('h1').innerText === 'ForeshockExplodingGradients'", "the runbook")


def test_the_fleet_names_what_is_wrong_first(url: str, job: Jobs, browser: Browser) -> None:
    healthy, bad, ended = job("healthy"), job("bad"), job("ended")
    ended.train(30)
    ended.stored()
    ended.finish()
    exploded(bad)
    bad.stored()
    healthy.train(60)
    healthy.stored()
    browser.open(url)
    browser.until("document.querySelector('tr[data-run=bad][data-condition=failing]')", "a failing run")
    browser.until("document.querySelector('tr[data-run=ended][data-condition=ended]')", "an ended run")
    assert browser.text("h1") == "2 runs active, 1 failing"
    order = browser.ask("[...document.querySelectorAll('tr[data-run]')].map(row => row.dataset.run)")
    assert order == ["bad", "healthy", "ended"]
    alarm = browser.text("tr[data-run=bad] .alarm")
    assert f"Exploding gradients at step 207, first sign at step 202, rank {LOUD_RANK}" in alarm
    assert browser.ask("document.querySelectorAll('tr[data-run=healthy] .spark .line').length") == 2
    # A click that begins on a link ends on it, whatever has come in between.
    browser.driver.execute_script("window.link = document.querySelector('tr[data-run=healthy] a')")
    healthy.train(10)
    browser.until("document.querySelector('tr[data-run=healthy] td[data-label=step]').innerText === '70'", "step 70")
    assert browser.ask("window.link.isConnected")
    browser.driver.find_element(By.LINK_TEXT, "bad").click()
    browser.drawn(207)
    assert browser.text("h1") == "bad"


def test_a_run_named_like_a_script_shows_as_text(url: str, job: Jobs, browser: Browser) -> None:
    name = "<script>alert(1)</script>{seed} 100%/é"
    layers = ("<img src=x onerror=alert(2)>", "<b>b</b>", "c&lt;")
    run = job(name, layers=layers, experiment='"><script>alert(3)</script>')
    exploded(run)
    run.stored()
    browser.open(url)
    browser.until("document.querySelector('tr[data-run] .alarm')", "the run")
    assert browser.text("tr[data-run] th a") == name
    browser.driver.find_element(By.CSS_SELECTOR, "tr[data-run] th a").click()
    browser.drawn(207)
    assert browser.ask("location.pathname") == f"/run/{urllib.parse.quote(name, safe='()')}"
    assert browser.text("h1") == name
    assert browser.text("article.incident [data-fact=layer] strong") == layers[0]
    ticks = "[...document.querySelectorAll('[data-chart=layers] .ytick text')].map(tick => tick.textContent)"
    assert browser.ask(ticks) == ["…nerror=alert(2)>", layers[1], layers[2]]
    assert browser.ask("document.querySelectorAll('main img, main b b, main script').length") == 0


def test_zooming_by_mouse_and_keyboard_shows_fewer_steps_and_the_address_says_which(
    url: str, job: Jobs, browser: Browser
) -> None:
    run = job("zoomed")
    run.train(400)
    run.stored()
    browser.open(f"{url}/run/zoomed")
    browser.drawn(400)
    low, high = shown_range(browser)
    assert low < 1 and high > 400
    drag = browser.driver.find_element(By.CSS_SELECTOR, "[data-chart=norm] .nsewdrag")
    ActionChains(browser.driver).move_to_element(drag).click_and_hold().move_by_offset(200, 0).release().perform()
    browser.until("location.search.includes('first=')", "the zoomed address")
    browser.until("document.querySelector('[data-chart=ranks] .js-plotly-plot').layout.xaxis.range[0] > 150", "a zoom")
    low, high = shown_range(browser)
    assert 180 < low < 220 and 250 < high < 320
    address = browser.ask("location.href")
    browser.open(address)
    browser.drawn(400)
    assert [round(end) for end in shown_range(browser)] == [round(low), round(high)]
    browser.ask("document.querySelector('[data-chart=loss] .frame').focus()")
    press(browser, "0")
    browser.until("document.querySelector('[data-chart=norm] .js-plotly-plot').layout.xaxis.range[0] < 1", "all steps")
    press(browser, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert browser.text("#readout").startswith("step 20")


def test_hovering_tells_the_step_its_norm_and_the_rank_that_stands_out(url: str, job: Jobs, browser: Browser) -> None:
    run = job("hovered")
    exploded(run)
    run.train(60)
    run.stored()
    browser.open(f"{url}/run/hovered?attempt=0&first=196&last=216")
    browser.drawn(267)
    frame = browser.driver.find_element(By.CSS_SELECTOR, "[data-chart=ranks] .frame")
    browser.driver.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", frame)
    left, right = 116, 10
    width = frame.size["width"] - left - right
    x = left + (204 - 195.9) / 20.2 * width - frame.size["width"] / 2
    ActionChains(browser.driver).move_to_element_with_offset(frame, int(x), 0).perform()
    readout = browser.text("#readout")
    assert "step 204" in readout
    assert "usually" in readout
    assert f"rank {LOUD_RANK}: " in readout or "rank 1: " in readout


def test_every_run_and_link_is_reached_by_tab_alone(url: str, job: Jobs, browser: Browser) -> None:
    for name in ("one", "two"):
        run = job(name)
        run.train(30)
        run.stored()
    browser.open(url)
    browser.until("document.querySelectorAll('tr[data-run]').length === 2", "two runs")
    reached = []
    for _ in range(8):
        press(browser, Keys.TAB)
        reached.append(browser.ask("document.activeElement.innerText.trim()"))
    assert reached[0] == "Skip to runs"
    assert {"Foreshock", "Runbooks", "one", "two"} <= set(reached)
    while browser.ask("document.activeElement.innerText.trim()") != "one":
        press(browser, Keys.TAB)
    press(browser, Keys.ENTER)
    browser.until("location.pathname === '/run/one'", "the run")
    browser.drawn(30)
    charts = set()
    for _ in range(25):
        press(browser, Keys.TAB)
        charts.add(browser.ask("document.activeElement.closest('figure')?.dataset.chart ?? ''"))
    assert charts >= {"norm", "loss", "clip", "update", "rate", "ranks", "layers", "updates"}


def test_64_ranks_and_2000_steps_draw_no_more_elements_than_one_rank_and_few(
    url: str, job: Jobs, browser: Browser, record_property: Callable[[str, Any], None]
) -> None:
    """What a browser has to lay out does not grow with the job, so the page keeps answering."""
    small, large = job("small", ranks=1), job("large", ranks=64)
    small.train(10)
    small.stored()
    for _ in range(20):
        large.train(100)
        large.stored()
    elements = {}
    for run, steps in (("small", 10), ("large", 2000)):
        browser.open(f"{url}/run/{run}")
        browser.drawn(steps)
        elements[run] = browser.ask("document.querySelectorAll('[data-chart] *').length")
    assert browser.ask("document.querySelectorAll('[data-chart=ranks] .heatmaplayer image').length") == 1
    large.train(20)
    large.stored()
    browser.drawn(large.sent)
    record_property("64_ranks_longest_task_ms", max(browser.ask("longTasks"), default=0.0))
    assert elements["large"] < 1.5 * elements["small"], elements


@pytest.mark.parametrize("dark", [False, True])
def test_a_phone_needs_no_scrolling_sideways(
    url: str, job: Jobs, open_browser: Callable[..., Browser], dark: bool
) -> None:
    run = job("a-run-with-a-name-as-long-as-schedulers-make-them-2026-11-23-17-00-00-ab12cd34")
    exploded(run)
    run.stored()
    browser = open_browser(width=390, height=844, dark=dark)
    for path in ("/", f"/run/{run.run}", "/runbooks", "/runbooks/ForeshockExplodingGradients"):
        browser.open(url + path)
        if path.startswith("/run/"):
            browser.drawn(207)
        elif path == "/":
            browser.until("document.querySelector('tr[data-run]')", "the run")
        assert browser.ask("document.documentElement.scrollWidth") <= 390, path
    paper = browser.ask("getComputedStyle(document.documentElement).backgroundColor")
    assert paper == ("rgb(15, 19, 23)" if dark else "rgb(252, 252, 251)")


def test_the_page_says_that_the_collector_is_gone_and_goes_on_when_it_is_back(
    tmp_path: Path, open_browser: Callable[..., Browser]
) -> None:
    port = free_port()
    with collector(tmp_path / "gone", http_port=port) as (url, address):
        run = Job(address, "left")
        run.train(30)
        run.stored()
        browser = open_browser()
        browser.open(f"{url}/run/left")
        browser.drawn(30)
        browser.until("document.querySelector('#connection').dataset.state === 'live'", "the stream")
        run.close()
    browser.until("document.querySelector('#connection').dataset.state === 'broken'", "the warning")
    assert "the collector does not answer" in browser.text("#connection")
    with collector(tmp_path / "gone", http_port=port):
        browser.until("document.querySelector('#connection').dataset.state === 'live'", "the stream again")
        assert all("ERR_" in error for error in browser.errors())
        browser.open("about:blank")


def test_without_a_stream_the_page_asks_again_and_again(url: str, job: Jobs, browser: Browser) -> None:
    run = job("polled")
    run.train(30)
    run.stored()
    browser.driver.execute_cdp_cmd("Network.enable", {})
    browser.driver.execute_cdp_cmd("Network.setBlockedURLs", {"urls": ["*/api/v1/live*"]})
    browser.open(f"{url}/run/polled")
    browser.drawn(30)
    run.train(5)
    browser.drawn(35)
    assert browser.text("#connection") == "polling every 2 s"
    assert all("/api/v1/live" in error for error in browser.errors())
    browser.open("about:blank")


def test_updates_are_drawn_where_they_were_measured_and_named_missing_where_not(
    url: str, job: Jobs, browser: Browser
) -> None:
    run = job("moved")
    run.train(60)
    run.stored()
    browser.open(f"{url}/run/moved")
    browser.drawn(60)
    trace = "document.querySelector('[data-chart=update] .js-plotly-plot').data[0]"
    assert browser.ask(f"{trace}.connectgaps") is True
    assert browser.ask(f"{trace}.y.map((value, i) => value === null ? null : i + 1).filter(Boolean)") == [
        *range(1, 61, 10)
    ]
    assert "update" in browser.text("#readout")
    assert browser.ask("document.querySelectorAll('[data-chart=updates] .heatmaplayer image').length") == 1
    browser.open(f"{url}/run/moved?first=2&last=9")
    browser.until("document.querySelector('[data-chart=update] p:not([hidden])')", "words in place of a chart")
    assert browser.text("[data-chart=update] p") == "Not measured on these steps."
    assert browser.errors() == []


def test_a_run_that_has_only_said_hello_and_one_that_there_is_not_are_told_apart(
    url: str, job: Jobs, browser: Browser
) -> None:
    job("silent").stored()
    browser.open(f"{url}/run/silent")
    browser.until("document.querySelector('[data-chart=norm] p:not([hidden])')", "words in place of a chart")
    assert browser.text("[data-chart=norm] p") == "No steps yet."
    assert "running" in browser.text("#condition")
    assert browser.errors() == []
    browser.open(f"{url}/run/nothing")
    browser.until("document.querySelector('#condition').innerText.includes('No run with this name')", "words")
    assert all("404" in error for error in browser.errors())
    browser.open("about:blank")
