"""The page in a real browser, over real nodes: what is live, what a kill looks like, light and dark, on a phone.

``PRIME_ASYNC_SCREENSHOTS=FOLDER pytest tests/test_dashboard.py`` writes what it saw there.
"""

from __future__ import annotations

import base64
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest
import trio

from tests.browser import MISSING, browser, complaints, emulate
from tests.node_processes import PACED_RUN, NodeProcess, Nodes, merged, node_processes

FAILURE_S: Final = 4.0
SLACK_S: Final = 3.0
"""For the view, the roster, the delta and the drawing; on a busy machine."""
RUN: Final = merged(PACED_RUN, {"name": "shakespeare-demo", "heartbeat_s": 0.5, "failure_timeout_s": FAILURE_S,
                                "round": {"inner_steps": 20}})  # fmt: skip
PATIENCE_S: Final = 60.0
SCREENSHOTS: Final = os.environ.get("PRIME_ASYNC_SCREENSHOTS", "")

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)

STATES: Final = """
return Object.fromEntries([...document.querySelectorAll('#rows tr')].map((r) => [r.dataset.member, r.dataset.state]));
"""
TEXT: Final = "return document.getElementById(arguments[0]).textContent"
EVENTS: Final = "return [...document.querySelectorAll('#events p')].map(p => p.textContent)"
THEME: Final = "return document.documentElement.dataset.theme"
TIP: Final = "return document.querySelector('#c-loss .tip').textContent"
TIP_HIDDEN: Final = "return document.querySelector('#c-loss .tip').hidden"
ROUNDS: Final = "return document.querySelectorAll('#c-rounds .round').length"
FITS: Final = """
const chart = document.querySelector('#c-loss');
return chart.querySelector('svg').viewBox.baseVal.width === chart.clientWidth;
"""
LOOKS: Final = (("light", 1280, 1100), ("dark", 1280, 1100), ("phone", 390, 844), ("small phone", 320, 568))
CURVES: Final = "return document.querySelectorAll('#c-loss path.curve').length"
OVERFLOW: Final = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
LONG_FIGURES: Final = """
const figures = { 't-heldout': '11.762', 't-round': '10,000 / 10,000', 't-sent': '1,023.9 GiB' };
for (const [id, text] of Object.entries(figures)) document.getElementById(id).textContent = text;
"""
CUT: Final = """
return [...document.querySelectorAll('.tile dd')].filter((e) => {
  const written = document.createRange();
  written.selectNodeContents(e);
  return written.getBoundingClientRect().right > e.getBoundingClientRect().right + 0.5;
}).map((e) => e.textContent);
"""
CONTRAST: Final = """
const bright = (c) => c.match(/[0-9.]+/g).slice(0, 3).map((v) => v / 255)
  .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const ground = (e) => { for (; e; e = e.parentElement) {
  const c = getComputedStyle(e).backgroundColor;
  if (!/, 0\\)$/.test(c) && c !== 'transparent') return c; } return 'rgb(255, 255, 255)'; };
const poor = [];
for (const e of document.querySelectorAll('h1,h2,p,dt,dd,td,th,a,small,li,span,b,time')) {
  const written = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
  if (!written || e.closest('.skip') || !e.offsetParent) continue;
  const [a, b] = [bright(getComputedStyle(e).color), bright(ground(e))].sort((x, y) => y - x);
  const ratio = (a + 0.05) / (b + 0.05);
  if (ratio < 4.5) poor.push(`${e.tagName} "${e.textContent.slice(0, 30)}" ${ratio.toFixed(2)}`);
}
return poor;
"""


async def until(driver: Any, condition: Callable[[Any], object], limit_s: float = PATIENCE_S) -> float:
    """Wait until it holds of the page. Returns after how many seconds it did."""

    def wait() -> float:
        from selenium.webdriver.support.ui import WebDriverWait

        began = time.monotonic()
        WebDriverWait(driver, limit_s, poll_frequency=0.1).until(condition)
        return time.monotonic() - began

    return await trio.to_thread.run_sync(wait)


def states(driver: Any) -> dict[str, str]:
    return dict(driver.execute_script(STATES))


def text(driver: Any, id: str) -> str:
    return str(driver.execute_script(TEXT, id))


def screenshot(driver: Any, name: str) -> None:
    if SCREENSHOTS:
        Path(SCREENSHOTS).mkdir(parents=True, exist_ok=True)
        taken = driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
        Path(SCREENSHOTS, f"{name}.png").write_bytes(base64.b64decode(taken["data"]))


def has_theme(theme: str, driver: Any) -> bool:
    return bool(driver.execute_script(THEME) == theme)


async def start(nodes: Nodes) -> tuple[NodeProcess, NodeProcess]:
    """Four nodes: the leader, two more, and a witness, which shows the run. Returns the third and the witness."""
    leader = await nodes.start("anna", evaluate_every=1, snapshot_every=5)
    await nodes.start("bert")
    victim = await nodes.start("carla")
    witness = await nodes.start("witness", witness=True, dashboard="127.0.0.1:0", log_format="json")
    await leader.until(lambda: any(f["contributors"] == 3 for f in leader.told("round_planned")))
    return victim, witness


def address(node: NodeProcess) -> str:
    log = (node.directory / "node.log").read_text()
    return log.partition('"url": "')[2].partition('"')[0]


async def test_the_page_shows_a_run_live_and_a_kill_within_the_failure_timeout(tmp_path: Path) -> None:
    """given a leader, two nodes and a witness that serves the page; then all of it is seen, and a kill in time"""
    async with node_processes(tmp_path, RUN) as nodes:
        victim, witness = await start(nodes)
        in_thread = trio.to_thread.run_sync
        with browser() as driver:
            emulate(driver, 1280, 1100)
            await in_thread(driver.get, address(witness))
            await until(driver, lambda d: set(states(d)) == {"anna", "bert", "carla", "witness"})
            await until(driver, lambda d: text(d, "live-text") == "live" and text(d, "t-members") == "4")
            await until(driver, lambda d: d.execute_script(CURVES) == 4)  # held-out, and of three
            await until(driver, lambda d: text(d, "t-heldout") != "–" and "%" in text(d, "t-share"))
            round = text(driver, "t-round")
            await until(driver, lambda d: text(d, "t-round") != round)  # and it goes on

            await victim.kill()
            took_s = await until(driver, lambda d: states(d)["carla"] == "lost")
            assert took_s <= FAILURE_S + SLACK_S
            await until(driver, lambda d: any(e.startswith("carla lost in round ") for e in d.execute_script(EVENTS)))
            await until(driver, lambda d: text(d, "t-members") == "3")

            if SCREENSHOTS:  # of a run that went on
                await nodes.start("carla")
                await until(driver, lambda d: states(d)["carla"] == "training")
                await trio.sleep(25)
            for name, width, height in LOOKS:
                emulate(driver, width, height, dark=name == "dark", mobile="phone" in name)
                await until(driver, partial(has_theme, "dark" if name == "dark" else "light"))
                await until(driver, lambda d: d.execute_script(FITS))
                assert driver.execute_script(OVERFLOW) <= 0, f"{name}: it scrolls sideways"
                assert driver.execute_script(CUT) == [], f"{name}: figures leave their tiles"
                assert driver.execute_script(CONTRAST) == [], f"{name}: too little contrast"
                screenshot(driver, name)
            driver.execute_script(LONG_FIGURES)
            assert driver.execute_script(CUT) == [], "long figures leave their tiles on a small phone"
            assert complaints(driver) == []
        assert await witness.leave() == 0  # also with a browser that was connected


async def test_it_can_be_used_with_the_keyboard_and_says_its_parts(tmp_path: Path) -> None:
    async with node_processes(tmp_path, RUN) as nodes:
        node = await nodes.start("anna", dashboard="127.0.0.1:0", log_format="json", evaluate_every=1)
        await node.rounds(1)
        with browser() as driver:
            await trio.to_thread.run_sync(partial(driver.get, address(node)))
            await until(driver, lambda d: d.execute_script(CURVES) == 2)
            from selenium.webdriver.common.keys import Keys

            chart = driver.find_element("css selector", "#c-loss svg")
            assert "held-out" in chart.get_attribute("aria-label")
            driver.execute_script("arguments[0].focus()", chart)
            chart.send_keys(Keys.ARROW_LEFT * 3)
            await until(
                driver,
                lambda d: "anna" in d.execute_script(TIP),
            )
            chart.send_keys(Keys.ESCAPE)
            await until(driver, lambda d: d.execute_script(TIP_HIDDEN))
            driver.find_element("id", "theme").send_keys(Keys.ENTER, Keys.ENTER)
            assert driver.execute_script(THEME) == "dark"
            events = driver.find_element("id", "events")
            assert (events.get_attribute("aria-live"), events.get_attribute("tabindex")) == ("polite", "0")
            assert {e.get_attribute("scope") for e in driver.find_elements("css selector", "th")} == {"col"}


async def test_what_it_showed_is_there_again_after_a_restart(tmp_path: Path) -> None:
    """given a node that was killed; when it is started again; then its page has the rounds and losses of before"""
    async with node_processes(tmp_path, RUN) as nodes:
        settings: dict[str, Any] = {"dashboard": "127.0.0.1:0", "log_format": "json", "evaluate_every": 1}
        node = await nodes.start("anna", **settings)
        await node.rounds(2)
        await node.until(lambda: len(node.told("members_seen")) > 3)
        await node.kill()
        (node.directory / "node.log").unlink()
        again = await nodes.start("anna", **settings)
        with browser() as driver:
            await trio.to_thread.run_sync(partial(driver.get, address(again)))
            began = "anna began the run"
            await until(driver, lambda d: began in d.execute_script(EVENTS))
            await until(driver, lambda d: any("came back from its disk" in e for e in d.execute_script(EVENTS)))
            await until(driver, lambda d: d.execute_script(ROUNDS) >= 2)
