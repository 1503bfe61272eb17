"""Charts: their values, words, smoothing and files, and what a browser does with them."""

from __future__ import annotations

import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from tests.bench.page import Browser
from tests.unit.reports.conftest import CURVE, MakeRun, finish, log, predict
from tests.unit.reports.pages import Page, data_of

from afina.reports import drawing, write_report
from afina.reports import page as page_colours
from afina.reports.charts import thin


def test_colours_have_the_contrast_that_wcag_wants() -> None:
    """WCAG 2.2, 1.4.3 and 1.4.11: 4.5 for text, 3 for the lines of charts, on the page and on its cards, light and dark."""

    def luminance(colour: str) -> float:
        digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for colours in ({**drawing.LIGHT, **page_colours._PAGE}, page_colours._DARK):
        lines = dict.fromkeys((name for name in colours if name.startswith("line")), 3.0)
        for name, least in {"text": 4.5, "soft": 4.5, **lines}.items():
            for behind in ("page", "card"):
                darker, lighter = sorted((luminance(colours[name]), luminance(colours[behind])))
                assert (lighter + 0.05) / (darker + 0.05) >= least, (name, behind)


def test_charts_have_a_description_in_words_and_hold_their_values(make_run: MakeRun) -> None:
    run = make_run()
    finish(run)
    log(run, *CURVE)
    svgs = Page(write_report(run.path)).svgs()
    assert list(svgs) == ["loss", "metrics"]
    for svg, title in zip(svgs.values(), ("Loss by step", "Metrics by step"), strict=True):
        assert svg.get("role") == "img"
        named = [svg.find(f"*[@id='{i}']") for i in str(svg.get("aria-labelledby")).split()]
        assert [n.tag for n in named if n is not None] == ["title", "desc"] and named[0] is not None
        assert named[0].text == title
    desc = svgs["loss"].find("desc")
    assert desc is not None
    assert desc.text == "training: 1.5 at step 10, 0.7 at step 40; validation: 0.9 at step 20, 0.5 at step 40."
    assert json.loads(str(svgs["loss"].get("data-names"))) == ["training", "validation"]
    for part, points in (("d0", [(10, 1.5), (20, 1.0), (40, 0.7)]), ("d1", [(20, 0.9), (40, 0.5)])):
        assert [pytest.approx(point, rel=2e-3) for point in points] == data_of(svgs["loss"], part)[0]
    dashes = [
        re.search(r"stroke-dasharray: ([\d., ]+)", ElementTree.tostring(g, "unicode"))
        for g in svgs["loss"].iter("g")
        if str(g.get("id")).startswith("loss-d")
    ]
    assert [dash is None for dash in dashes] == [True, False], "colour is not the only sign"
    assert "best: 0.7500 at step 40" in str(svgs["metrics"].find("desc").text)  # type: ignore[union-attr]


def test_a_long_curve_is_smoothed_and_its_values_stay_visible(make_run: MakeRun) -> None:
    run = make_run()
    loss = [2 - i / 10_000 + (-1) ** i / 10 for i in range(10_000)]
    log(run, *({"step": i, "loss": value} for i, value in enumerate(loss, start=1)), {"step": 10_000, "eval_loss": 1.0})
    path = write_report(run.path)
    page = Page(path)
    svg = page.svgs()["loss"]
    (line,), (pale,) = data_of(svg, "d0"), data_of(svg, "f0")
    assert max(abs(y - (2 - x / 10_000)) for x, y in line[50:]) < 0.03 and max(y for _, y in pale) > 2.05
    assert re.search(
        r"Strong line: moving average over about 400 values of training; pale: the values themselves\. 8\d\d of 20,001 points are drawn",
        page.text,
    )
    assert path.stat().st_size < 150_000


def test_a_single_evaluation_a_flat_line_and_missing_values_are_drawn(make_run: MakeRun) -> None:
    run = make_run()
    log(
        run,
        {"step": 5, "epoch": 1, "eval_loss": 0.5, "eval_pearson": None, "eval_mse": 0.0, "eval_mae": float("nan")},
    )
    svgs = Page(write_report(run.path)).svgs()
    for svg in svgs.values():
        assert not re.search(r"\bnan|\binf\b", ElementTree.tostring(svg, "unicode"), re.IGNORECASE)
    assert list(svgs) == ["loss", "errors"]


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Debian's chromium")
@pytest.mark.timeout(200)
def test_values_zoom_and_sorting_in_a_browser(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run()
    finish(run)
    log(run, *CURVE)
    page = write_report(run.path)
    browser = Browser(tmp_path / "profile")
    try:
        browser.call("Emulation.setDeviceMetricsOverride", width=1280, height=900, deviceScaleFactor=1, mobile=False)
        browser.call("Page.navigate", url=page.as_uri())
        browser.wait_for("Page.loadEventFired")
        place = "(() => { const s = document.querySelector('svg[data-box]'); s.scrollIntoView(); const r = s.getBoundingClientRect(); "
        x, y, width, height = browser.evaluate(place + "return [r.left, r.top, r.width, r.height] })()")

        def mouse(kind: str, across: float, down: float, count: int = 0) -> None:
            button: Any = {"button": "left", "buttons": 1, "clickCount": count} if count else {}
            where = {"x": x + across * width, "y": y + down * height}
            browser.call("Input.dispatchMouseEvent", type=f"mouse{kind}", **where, **button)

        mouse("Moved", 0.97, 0.5)
        shown = browser.evaluate("document.getElementById('value').textContent")
        assert re.fullmatch(
            r"step (40|39\.99\d*|40\.00\d*)\ntraining: 0\.[67]\d*\nvalidation: 0\.(5|49|50)\d*", shown
        ), shown
        ticks = "[...document.querySelector('svg[data-box]').querySelectorAll('.tick-x text')].map(t => +t.textContent)"
        before = browser.evaluate(ticks)
        mouse("Pressed", 0.4, 0.3, 1)
        mouse("Moved", 0.6, 0.6, 1)
        mouse("Released", 0.6, 0.6, 1)
        after = browser.evaluate(ticks)
        assert max(after) - min(after) < 0.4 * (max(before) - min(before))
        for count in (1, 2):
            mouse("Pressed", 0.5, 0.5, count)
            mouse("Released", 0.5, 0.5, count)
        assert browser.evaluate(ticks) == before
        column = "[...[...document.querySelectorAll('table.sortable')].find(t => t.caption.textContent.startsWith('One row per evaluation')).tBodies[0].rows].map(r => r.cells[1].textContent)"
        assert browser.evaluate(column) == ["20", "40"]
        browser.evaluate("[...document.querySelectorAll('th button')].find(b => b.textContent === 'step').click()")
        assert browser.evaluate(column) == ["40", "20"]
        assert [e for e in browser.events if e["method"] in ("Runtime.exceptionThrown", "Log.entryAdded")] == []
    finally:
        browser.close()


def test_figures_are_files_too(make_run: MakeRun) -> None:
    run = make_run()
    finish(run)
    predict(run)
    log(run, *CURVE, {"step": 40, "epoch": 2.0, "loss": 0.7, "learning_rate": 1e-5})
    folder = write_report(run.path, png=True).parent
    names = {p.name for p in folder.iterdir()}
    keys = (
        "score", "classes-eval", "loss", "metrics", "learning-rate", "calibration-eval", "answered-eval",
        "confusion-eval", "pr-eval", "roc-eval",
    )  # fmt: skip
    assert names == {"index.html", *(f"{k}.{s}" for k in keys for s in ("svg", "png"))}
    for key in keys:
        root = ElementTree.parse(folder / f"{key}.svg").getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg" and root.get("style") == "background: #fff"
        raw = (folder / f"{key}.png").read_bytes()
        assert raw.startswith(b"\x89PNG") and len(raw) > 4000
    first = (folder / "loss.png").read_bytes()
    write_report(run.path, png=True)
    assert (folder / "loss.png").read_bytes() == first


def test_many_points_are_thinned_and_no_spike_is_lost() -> None:
    points = [(float(i), 1.0) for i in range(100_000)]
    points[77_777] = (77_777.0, 9.0)
    points[5] = (5.0, -3.0)
    kept = thin(points)
    assert len(kept) <= 700 and points[77_777] in kept and points[5] in kept
    assert kept[0] == points[0] and kept[-1] == points[-1] and kept == sorted(kept)
