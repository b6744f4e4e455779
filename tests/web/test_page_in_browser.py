"""The live page in a real browser: headless Chromium against a daemon between real servers."""

from __future__ import annotations

import asyncio
import re
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from support.daemon_process import Daemon, models
from support.kafka_client import feed, produce_clicks
from support.waiting import eventually
from support.workload import NO_EVENTS, Record, click

pytest.importorskip("playwright", reason="playwright is not installed: pip install '.[test]'")

from playwright.async_api import Page, async_playwright, expect

from streamrec.redis.client import RedisClient
from streamrec.registry import Registry
from streamrec.schemas import PublishedList
from streamrec.serving.inspection import published

StartDaemon = Callable[..., Daemon]

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
TOKEN = "t0ken-of-enough-characters"
HOSTILE = "<script>window.pwned = 1</script><img src=x onerror='window.pwned = 1'>"
DEMO = ("streamrec.demo.daemon",)
TIMEOUT_MS = 20_000  # Playwright's default of 5 s is short for a browser, a daemon and its servers beside other tests

expect.set_options(timeout=TIMEOUT_MS)


class Visitor:
    """A browser, the errors in its pages, and the requested URLs."""

    def __init__(self, browser: Any) -> None:
        self._browser = browser
        self.errors: list[str] = []
        self.requested: list[str] = []

    async def open(self, url: str, width: int = 1280, **options: Any) -> Page:
        """Open a page with its own cookies, none at first."""
        context = await self._browser.new_context(
            viewport={"width": width, "height": 900}, reduced_motion="reduce", **options
        )
        page: Page = await context.new_page()
        page.set_default_timeout(TIMEOUT_MS)
        page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", lambda request: self.requested.append(request.url))
        await page.goto(url, wait_until="domcontentloaded")
        return page


@pytest.fixture
async def visitor() -> AsyncIterator[Visitor]:
    async with async_playwright() as playwright:
        installed = next(filter(None, map(shutil.which, BROWSERS)), playwright.chromium.executable_path)
        if not Path(installed).exists():
            pytest.skip("no browser: apt install chromium, or playwright install chromium")
        browser = await playwright.chromium.launch(executable_path=installed, args=["--no-sandbox"])
        yield Visitor(browser)
        await browser.close()


async def live(page: Page) -> Page:
    await expect(page.locator("#state")).to_have_text("live")
    return page


async def published_for(daemon: Daemon, user: str) -> PublishedList | None:
    async with RedisClient(daemon.settings.redis) as redis:
        async for _, found in published(redis, [user]):
            return found
    return None


async def test_the_numbers_move_and_a_page_opened_late_shows_the_past(
    start_daemon: StartDaemon, visitor: Visitor
) -> None:
    daemon = start_daemon()
    await daemon.wait_ready()
    page = await live(await visitor.open(daemon.http))
    await expect(page.locator("#events")).to_have_text("0 since the start")
    await produce_clicks(daemon.settings, [(f"u{n % 10}", f"i{n % 7}") for n in range(300)])
    await expect(page.locator("#events")).to_have_text("300 since the start")
    await produce_clicks(daemon.settings, [(f"u{n % 10}", f"i{n % 7}") for n in range(300)])
    await expect(page.locator("#events")).to_have_text("600 since the start")
    await expect(page.locator("#events-per-s")).not_to_have_text("0")
    await expect(page.locator("#p50")).to_have_text(re.compile(r"^[\d.]+ m?s$"))
    await expect(page.locator("#hit-rate")).to_have_text(re.compile(r"^[01]\.\d{3}$"))
    await expect(page.locator("#cache")).to_have_text(re.compile(r"^[\d.]+ %$"))
    await expect(page.locator("#lag")).to_have_text("0")
    await expect(page.locator("#events-per-s")).to_have_text("0")
    await feed(daemon.settings, [Record(b"k", NO_EVENTS["no item"], bad=True)])
    await expect(page.locator("#dead")).to_have_text("1")
    shown = await page.evaluate("Array.from(document.querySelectorAll('#dead-table td'), (cell) => cell.textContent)")
    assert "missing required field `item_id`" in shown[-1], "number and reason are shown at once"
    version = (await page.locator("#version").text_content()) or "-"
    late = await live(await visitor.open(daemon.http))
    for opened in (page, late):
        legend = opened.locator("#hit-legend")
        await expect(legend).to_have_text(re.compile(rf"model {re.escape(version)}[01]\.\d+popularity[01]\.\d+"))
        for chart in ("hit", "latency", "rate"):
            await expect(opened.locator(f"#{chart}-plot canvas")).to_have_count(1)
        await expect(opened.locator("#latency-plot")).to_have_attribute("aria-label", re.compile("median [0-9.]+ m?s"))
    assert visitor.errors == []
    assert {url for url in visitor.requested if not url.startswith(daemon.http)} == set(), "no request to another host"


async def test_a_swap_is_marked_and_each_version_has_a_line(
    start_daemon: StartDaemon, visitor: Visitor, model_dir: Path, tmp_path: Path
) -> None:
    from sasrec import load_model

    saved, registry = load_model(model_dir), Registry(tmp_path)
    first = registry.publish(saved.model, saved.vocab, {"first": 1})
    registry.promote(first, "by the test")
    daemon = start_daemon(model_dir=None, registry_dir=tmp_path, registry_poll_s=0.2)
    await daemon.wait_ready()
    page = await live(await visitor.open(daemon.http))
    await expect(page.locator("#version")).to_have_text(first[:12])
    for handled in (30, 60):  # clicks in one batch with the first are judged against the popular list
        await produce_clicks(daemon.settings, [("ann", f"i{n % 7}") for n in range(30)])
        await daemon.wait_handled(handled)
    await expect(page.locator("#hit-legend li")).to_have_count(2)
    saved.model.item_embedding.weight.data.mul_(1.5)
    second = registry.publish(saved.model, saved.vocab, {"second": 1})
    assert second != first
    assert models(daemon.settings, "promote", second).returncode == 0
    await expect(page.locator("#swaps li")).to_contain_text(f"{first[:12]} replaced by {second[:12]}")
    for handled in (90, 120):  # the first 30 may all be judged against lists of the replaced version
        await produce_clicks(daemon.settings, [("ann", f"i{n % 7}") for n in range(30)])
        await daemon.wait_handled(handled)
    await expect(page.locator("#hit-legend li")).to_have_count(3)
    await expect(page.locator("#hit-plot")).to_have_attribute("aria-label", re.compile("1 model swaps"))
    assert visitor.errors == []


async def test_a_user_is_found_by_keyboard_and_shown_with_titles_and_explanation(
    start_daemon: StartDaemon, visitor: Visitor, tmp_path: Path
) -> None:
    items = tmp_path / "items.csv"
    items.write_text("item_id,title\n" + "".join(f"i{n},Film no. {n}\n" for n in range(50)))
    daemon = start_daemon(http_titles=items, lists_top_k=5)
    await daemon.wait_ready()
    await produce_clicks(daemon.settings, [("ann", "i3"), ("ann", "i4"), ("ann", "i5"), ("bob", "i9")])
    await daemon.wait_handled(4)
    page = await live(await visitor.open(daemon.http))
    await page.keyboard.press("Tab")  # to "skip to the search"
    await page.keyboard.press("Enter")
    await page.keyboard.type("ann")
    await page.keyboard.press("Enter")
    await expect(page.locator("#clicks .name")).to_have_text([f"Film no. {n} i{n}" for n in (5, 4, 3)])
    listed = await eventually(lambda: published_for(daemon, "ann"))
    assert listed
    names = [f"Film no. {item[1:]} {item}" for item in listed.items]
    await expect(page.locator("#list .name")).to_have_text(names)
    await expect(page.locator("#list .score")).to_have_text([f"{score:.2f}" for score in listed.scores])
    await expect(page.locator("#list-hint")).to_have_text(
        re.compile(rf"^by model {listed.model[:12]}.*, after 3 clicks, [\d.]+ s ago$")
    )
    await expect(page.locator("#why-title")).to_contain_text(f"Why Film no. {listed.items[0][1:]}?")
    await expect(page.locator("#clicks .fall")).to_have_text([re.compile(r"^[+\u2212]?\d+\.\d\d$")] * 3)
    await page.get_by_role("button", name=f"Why Film no. {listed.items[2][1:]}?", exact=True).press("Enter")
    await expect(page.locator("#why-title")).to_contain_text(f"Why Film no. {listed.items[2][1:]}?")
    await expect(page.locator("#list [aria-pressed=true]")).to_be_focused()
    await page.locator("#search").fill("unknown")
    await page.keyboard.press("Enter")
    await expect(page.locator("#user-state")).to_contain_text("This user has no clicks yet")
    await page.get_by_role("button", name="bob", exact=True).click()
    await expect(page.locator("#clicks .name")).to_have_text(["Film no. 9 i9"])  # a list: until then there are others
    again = await live(await visitor.open(page.url))
    await expect(again.locator("#clicks-title")).to_have_text("Last clicks of bob")
    await expect(page.get_by_role("button", name="Click yourself")).to_be_hidden()
    assert visitor.errors == []


async def test_in_the_demo_a_click_changes_the_visitors_list(
    start_daemon: StartDaemon, visitor: Visitor, tmp_path: Path
) -> None:
    items = tmp_path / "items.csv"
    items.write_text("item_id,title\n" + "".join(f"i{n},Film no. {n}\n" for n in range(50)))
    daemon = start_daemon(command=DEMO, http_titles=items, lists_top_k=5)
    await daemon.wait_ready()
    await produce_clicks(daemon.settings, [("ann", "i3")])
    await daemon.wait_handled(1)
    page = await live(await visitor.open(daemon.http))
    await page.get_by_role("button", name="Click yourself").click()
    await expect(page.locator("#user-state")).to_contain_text("You have clicked nothing yet")
    lists = []
    for number, title in enumerate(("Film no. 31", "Film no. 12"), start=1):
        await page.locator("#find").fill(title)
        await page.locator("#items").get_by_role("button", name=f"Click {title}", exact=True).click()
        await expect(page.locator("#user-state")).to_have_text(re.compile(r"published [\d.]+ m?s after the click"))
        await expect(page.locator("#list-hint")).to_contain_text(f"after {number} clicks")
        lists.append(await page.locator("#list .name").all_text_contents())
    assert lists[0] != lists[1]
    await expect(page.locator("#clicks .name")).to_have_text(["Film no. 12 i12", "Film no. 31 i31"])
    user = await page.locator("#search").input_value()
    listed = await published_for(daemon, user)
    assert listed and [f"Film no. {item[1:]} {item}" for item in listed.items] == lists[1]
    await page.locator("#list").get_by_role("button", name="Click").first.click()
    await expect(page.locator("#list-hint")).to_contain_text("after 3 clicks")
    # a list may have changed before its explanation was requested
    assert not [error for error in visitor.errors if "404" not in error]


async def test_the_token_is_required(start_daemon: StartDaemon, visitor: Visitor) -> None:
    daemon = start_daemon(http_token=TOKEN)
    await daemon.wait_ready()
    page = await visitor.open(daemon.http)
    token = page.get_by_label("Token of this daemon")
    await expect(token).to_be_focused()
    assert await page.locator("#events").count() == 0
    await token.fill("wrong")
    await page.keyboard.press("Enter")
    await expect(page.get_by_text("That is not the token")).to_be_visible()
    await token.fill(TOKEN)
    await page.keyboard.press("Enter")
    await live(page)
    await page.reload()
    await live(page)
    await page.context.clear_cookies()
    await page.reload()
    await expect(token).to_be_visible()
    assert not [error for error in visitor.errors if "401" not in error]


async def test_markup_in_events_and_catalogue_is_shown_as_text(
    start_daemon: StartDaemon, visitor: Visitor, tmp_path: Path
) -> None:
    items = tmp_path / "items.csv"
    items.write_text(f'item_id,title\ni1,"{HOSTILE}"\n' + "".join(f'i{n},"{HOSTILE} {n}"\n' for n in range(2, 50)))
    daemon = start_daemon(command=DEMO, http_titles=items, lists_top_k=5)
    await daemon.wait_ready()
    await produce_clicks(daemon.settings, [(HOSTILE, "i1"), (HOSTILE, HOSTILE)])
    await feed(daemon.settings, [Record(b"k", click("ann", "i1", HOSTILE), bad=True)])  # type: ignore[arg-type]
    await daemon.wait_handled(2)
    page = await live(await visitor.open(daemon.http))
    await page.locator("#recent button").click()
    await expect(page.locator("#clicks .name")).to_have_text([HOSTILE, f"{HOSTILE} i1"])
    await expect(page.locator("#list .name").first).to_contain_text(HOSTILE)
    await expect(page.locator("#why-title")).to_contain_text(f"Why {HOSTILE}")
    await expect(page.locator("#dead-table tbody tr")).to_have_count(1)
    await page.locator("#search").fill(HOSTILE)
    await page.keyboard.press("Enter")
    await expect(page.locator("#clicks-title")).to_contain_text(HOSTILE)
    await page.get_by_role("button", name="Click yourself").click()
    await page.locator("#find").fill("script")
    await expect(page.locator("#items button").first).to_contain_text(HOSTILE)
    await page.locator("#items button").first.click()
    await expect(page.locator("#user-state")).to_contain_text("after the click")
    assert await page.evaluate("window.pwned") is None
    assert await page.locator("main script, main img").count() == 0
    assert not [error for error in visitor.errors if "404" not in error]


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_it_fits_a_phone_with_readable_contrast_in_both_color_schemes(
    start_daemon: StartDaemon, visitor: Visitor, scheme: str
) -> None:
    daemon = start_daemon()
    await daemon.wait_ready()
    long = "a user with a name that is as long as a name can be " * 4
    await produce_clicks(daemon.settings, [(long, "i" * 200), (long, "i1")])
    await daemon.wait_handled(2)
    page = await live(await visitor.open(daemon.http, 360, color_scheme=scheme))
    await page.locator("#recent button").click()
    await expect(page.locator("#clicks .name")).to_have_count(2)
    assert await page.evaluate("document.documentElement.scrollWidth") == 360
    colors = [
        await page.evaluate(f"getComputedStyle(document.querySelector('{place}')).{what}")
        for place, what in (("body", "color"), (".hint", "color"), (".card", "backgroundColor"))
    ]
    ink, soft, card = (luminance(color) for color in colors)
    assert (card > 0.5) is (scheme == "light")
    assert contrast(ink, card) > 10
    assert contrast(soft, card) > 4.5


def luminance(color: str) -> float:
    """Return the relative luminance as WCAG defines it."""
    channels = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: float, other: float) -> float:
    return (max(one, other) + 0.05) / (min(one, other) + 0.05)


async def test_it_pauses_and_reconnects_after_a_restart_of_the_daemon(
    start_daemon: StartDaemon, visitor: Visitor
) -> None:
    daemon = start_daemon()
    await daemon.wait_ready()
    page = await live(await visitor.open(daemon.http))
    await page.get_by_role("button", name="Pause").click()
    await expect(page.locator("#state")).to_have_text("paused")
    await produce_clicks(daemon.settings, [("ann", "i1")])
    await daemon.wait_handled(1)
    await asyncio.sleep(1.2)  # two ticks, which must not be shown
    await expect(page.locator("#events")).to_have_text("0 since the start")
    await page.get_by_role("button", name="Resume").click()
    await expect(page.locator("#events")).to_have_text("1 since the start")
    port = int(daemon.http.rsplit(":", 1)[1])
    daemon.kill()
    await expect(page.locator("#state")).to_have_text("connection lost, reconnecting")
    again = start_daemon(http_port=port)
    await again.wait_ready()
    await live(page)
