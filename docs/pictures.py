"""Take the pictures of the documentation again, from a real run: `make pictures`.

    python docs/pictures.py [RUN]

Without RUN the demo is trained first, in a temporary folder. Writes docs/pictures/*.png. Needs the Debian package `chromium`.
"""

from __future__ import annotations

import base64
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.bench.page import Browser  # noqa: E402

from afina import demo  # noqa: E402
from afina.reports import write_report  # noqa: E402

#: Picture -> the heading at which it begins (None: the top of the page), its width and height in pixels.
PICTURES = {
    "report": (None, 1000, 585),
    "curves": ("Learning curves", 1000, 365),
    "confusion": ("Confusion matrix", 560, 480),
}
WIDTH = 1000


def take(page: Path, out: Path) -> None:
    """Screenshots of parts of a report, light, without its scroll bars."""
    out.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as profile:
        browser = Browser(Path(profile))
        try:
            browser.call("Page.navigate", url=page.as_uri())
            browser.wait_for("Page.loadEventFired")
            browser.call(
                "Emulation.setDeviceMetricsOverride", width=WIDTH, height=900, deviceScaleFactor=1, mobile=False
            )
            browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "light"}])
            for name, (heading, width, height) in PICTURES.items():
                top = 0 if heading is None else _top(browser, heading)
                clip = {"x": 0, "y": top, "width": width, "height": height, "scale": 1}
                shot = browser.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
                (out / f"{name}.png").write_bytes(base64.b64decode(shot["data"]))
        finally:
            browser.close()


def _top(browser: Browser, heading: str) -> float:
    top = browser.evaluate(
        "(() => { const h = [...document.querySelectorAll('h1,h2,h3,h4,figcaption,summary')]"
        f".find(h => h.textContent.trim().startsWith({heading!r}));"
        " return h ? h.getBoundingClientRect().top + window.scrollY - 12 : null })()"
    )
    if top is None:
        sys.exit(f"{heading}: the report has no such heading")
    return float(top)


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        if len(sys.argv) > 1:
            page = write_report(Path(sys.argv[1]).absolute())
        else:
            if code := demo.run_demo(folder):
                return code
            (page,) = Path(folder).glob("scratch/runs/*/report/index.html")
        # The model's folder is this machine's business.
        text = page.read_text(encoding="utf-8").replace(str(demo.model_folder()), "minilm")
        copy = Path(folder) / "page.html"
        copy.write_text(text, encoding="utf-8")
        take(copy, ROOT / "docs/pictures")
    return 0


if __name__ == "__main__":
    sys.exit(main())
