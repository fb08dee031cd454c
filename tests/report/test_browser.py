"""The page in a real browser: it renders without errors, loads nothing, filters and sorts, shows its pictures, and is accessible."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipeline.report.pictures import Pictures
from pipeline.report.values import Clip, Decoded, Histogram, Report
from pipeline.report.written import write_report
from tests.report.browser import address, browser, visit
from tests.report.outputs import SCRIPT

ROWS = 10_000


@pytest.fixture(scope="module")
def chromium() -> Any:
    with browser() as opened:
        yield opened


def webp(frames: int = 1) -> bytes:
    out = io.BytesIO()
    pictures = [Image.new("RGB", (64, 32), (60 * n, 90, 200)) for n in range(frames)]
    pictures[0].save(out, "WEBP", save_all=True, append_images=pictures[1:], duration=50)
    return out.getvalue()


@pytest.fixture(scope="module")
def with_pictures(report: Report) -> tuple[Report, Pictures]:
    """The hostile report with one decoded clip, whose key is hostile as well, and 10,000 rows."""
    clip = Clip(
        id="clip-1",
        key=SCRIPT,
        source="s3://corpus/a.tar",
        bucket="v17x64x48",
        variant="base",
        frames=17,
        fps=8.0,
        caption=f"{SCRIPT} \u202egpj",
        psnr=30.0,
        ssim=0.9,
        frame_psnr=(30.0,) * 17,
        frame_ssim=(0.9,) * 17,
        shown="worst",
        pictures={"still": "clip-1-still", "play": "clip-1-play"},
    )
    network = {"network": "tiny"}
    decoded = Decoded(network, (clip,), 0, 1, (0.8, 0.9), {"first": (1.0, 2.0), "others": (0.5, 1.0)}, "clip-1")
    first = report.rows.cells[0]
    cells = [(f"row-{n:05d}", f"key {n}", f"caption {n}", first[3], n % 100, *first[5:]) for n in range(ROWS)]
    labels = tuple(f"{1000 + n}.5 to {1001 + n}.5" for n in range(12))
    wide = Histogram("Frame height", "pixels", labels, {"source": (1,) * 12, "stored": (2,) * 12})
    rows = replace(report.rows, cells=(*report.rows.cells, *cells), histograms=(*report.rows.histograms, wide))
    pictures = {"clip-1-still": webp(), "clip-1-play": webp(3), "channel-0": webp(), "channel-1": webp()}
    return replace(report, decoded=decoded, rows=rows), Pictures(pictures)


@pytest.fixture(scope="module")
def page(with_pictures: tuple[Report, Pictures], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_report(*with_pictures, path)
    return path


@pytest.mark.parametrize("assets", [False, True])
def test_it_renders_and_loads_nothing_else(chromium, page, with_pictures, tmp_path, assets):
    if assets:
        page = tmp_path / "report.html"
        write_report(*with_pictures, page, assets=True)
    with visit(chromium, address(page)) as seen:
        assert seen.page.title().startswith("films </script>")
        assert seen.page.evaluate("window.broken") is None
        images = seen.page.locator("img")
        assert images.count() == 4
        seen.page.locator("figure[data-clip]").scroll_into_view_if_needed()
        seen.page.get_by_role("button", name="Play clip").click()
        seen.page.locator("img.play").wait_for(state="visible")
        decoded = "async (image) => { await image.decode(); return image.naturalWidth; }"
        assert [image.evaluate(decoded) for image in images.all()] == [64] * 4
        assert seen.logged == []
        folder = address(page).rpartition("/")[0]
        assert [url for url in seen.loaded if not url.startswith(f"{folder}/report")] == []


def test_rows_are_filtered_sorted_and_paged(chromium, page):
    with visit(chromium, address(page)) as seen:
        rows, state = seen.page.locator("#rows-body tr"), seen.page.locator("#rows-state")
        assert state.inner_text() == "10,010 of 10,010 rows, page 1 of 101"
        assert rows.count() == 100
        seen.page.get_by_role("searchbox").fill("CAPTION row-077")
        assert state.inner_text() == "100 of 10,010 rows, page 1 of 1"
        seen.page.get_by_role("searchbox").fill("row-07")
        assert state.inner_text() == "1,000 of 10,010 rows, page 1 of 10"
        frames = seen.page.get_by_role("button", name="frames", exact=True)
        frames.click()
        assert rows.first.locator("td").nth(4).inner_text() == "0"
        frames.click()
        assert rows.first.locator("td").nth(4).inner_text() == "99"
        head = seen.page.locator("#rows-table th").nth(4)
        assert head.get_attribute("aria-sort") == "descending"
        seen.page.get_by_role("button", name="Next page").click()
        assert state.inner_text().endswith("page 2 of 10")
        assert seen.page.get_by_role("button", name="Previous page").is_enabled()
        seen.page.get_by_role("searchbox").fill("window.broken=1")
        assert rows.count() == 1
        assert SCRIPT in rows.first.inner_text()
        seen.page.get_by_role("searchbox").fill("")
        seen.page.locator("#rows-captions").select_option("without")
        assert state.inner_text().startswith("1 of ")
        assert seen.logged == []


def test_all_of_it_is_reached_by_keyboard(chromium, page):
    with visit(chromium, address(page)) as seen:
        seen.page.keyboard.press("Tab")
        assert seen.page.evaluate("document.activeElement.textContent") == "Skip to content"
        seen.page.get_by_role("button", name="Play clip").focus()
        seen.page.keyboard.press("Enter")
        seen.page.locator("img.play").wait_for(state="visible")
        seen.page.get_by_role("button", name="id", exact=True).focus()
        seen.page.keyboard.press("Space")
        assert seen.page.locator("#rows-table th").first.get_attribute("aria-sort") == "ascending"


def test_labels_of_charts_do_not_overlap(chromium, page):
    boxes = """() => [...document.querySelectorAll('svg.chart')].map((chart) => [...chart.querySelectorAll('text')]
      .map((text) => text.getBoundingClientRect()).map((box) => [box.left, box.right, box.top, box.bottom]))"""
    with visit(chromium, address(page)) as seen:
        charts = seen.page.evaluate(boxes)
    assert len(charts) == 2 + 4 + 3  # source videos, rows, quality
    for chart in charts:
        for number, (left, right, top, bottom) in enumerate(chart):
            for other in chart[number + 1 :]:
                assert right <= other[0] or other[1] <= left or bottom <= other[2] + 1 or other[3] <= top + 1


def test_it_fits_on_a_phone(chromium, page):
    with visit(chromium, address(page), width=360) as seen:
        assert seen.page.evaluate("document.documentElement.scrollWidth") <= 360


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_it_meets_wcag_aa(chromium, page, theme):
    """In the dark, only what depends on colours."""
    from axe_playwright_python.sync_playwright import Axe

    tags = {"type": "tag", "values": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]}
    rules = tags if theme == "light" else {"type": "rule", "values": ["color-contrast"]}
    with visit(chromium, address(page), theme=theme) as seen:
        seen.page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
        seen.page.get_by_role("searchbox").fill("row-00012")  # one row: others are alike
        found = Axe().run(seen.page, options={"runOnly": rules}).response["violations"]
        assert [(item["id"], [node["html"] for node in item["nodes"]][:3]) for item in found] == []
