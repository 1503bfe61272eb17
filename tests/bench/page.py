"""Check a report in headless Chromium: light, dark, narrow and printed; axe-core; the console; every request.

    python tests/bench/page.py RUN_DIR|index.html [--out FOLDER] [--axe axe.min.js] [--json found.json]

Writes light.png, dark.png, narrow.png and print.pdf, prints the findings, and exits with 1 if the page requests anything but itself, writes
to the console, is wider than the screen, or has an axe-core violation of impact serious or critical. Without `--axe`, npm fetches axe-core
from a registry; `--axe none` skips that check. Chromium speaks the DevTools protocol over a pipe (`--remote-debugging-pipe`): no port is
opened. Needs the Debian package `chromium`.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

_FLAGS = (
    "--headless=new",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-extensions",
    "--disable-sync",
    "--disable-domain-reliability",
    "--no-first-run",
    "--no-default-browser-check",
    "--no-pings",
    "--metrics-recording-only",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
#: name -> width, colour scheme.
VIEWS = {"light": (1280, "light"), "dark": (1280, "dark"), "narrow": (390, "light"), "narrow-dark": (390, "dark")}


class Browser:
    """A headless Chromium with one page, and every event that it sent."""

    def __init__(self, profile: Path) -> None:
        program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        if program is None:
            sys.exit("chromium is not installed (Debian: apt-get install chromium)")
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()
        argv = [
            program,
            *_FLAGS,
            f"--user-data-dir={profile}",
            *(["--no-sandbox"] if os.geteuid() == 0 else []),
            "about:blank",
        ]
        # Chromium reads at descriptor 3 and writes at 4.
        shell = ["bash", "-c", f'exec "$@" 3<&{to_read} 4>&{to_write}', "chromium", *argv]
        self._process = subprocess.Popen(
            shell, pass_fds=(to_read, to_write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(to_read)
        os.close(to_write)
        self.events: list[dict[str, Any]] = []
        self._waiting, self._number, self._session = b"", 0, ""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {
            "id": self._number,
            "method": method,
            "params": parameters,
            **({"sessionId": self._session} if self._session else {}),
        }
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return dict(answer["result"])

    def wait_for(self, event: str) -> None:
        while not any(e["method"] == event for e in self.events):
            self._next()

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._waiting:
            block = os.read(self._read, 1 << 20)
            if not block:
                raise RuntimeError("chromium has exited")
            self._waiting += block
        raw, _, self._waiting = self._waiting.partition(b"\0")
        message: dict[str, Any] = json.loads(raw)
        if "method" in message:
            self.events.append(message)
        return message

    def evaluate(self, script: str) -> Any:
        done = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in done:
            raise RuntimeError(str(done["exceptionDetails"])[:500])
        return done["result"].get("value")

    def close(self) -> None:
        try:
            self._session = ""
            self.call("Browser.close")
        except (RuntimeError, OSError):
            self._process.kill()
        self._process.wait(timeout=20)


def examine(page: Path, out: Path, axe: str | None) -> dict[str, Any]:
    """Open `page`; returns requests, console lines, and by view the overflow in pixels and axe-core's violations."""
    out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"page": str(page), "bytes": page.stat().st_size, "views": {}}
    with tempfile.TemporaryDirectory() as profile:
        browser = Browser(Path(profile))
        try:
            browser.call("Page.navigate", url=page.as_uri())
            browser.wait_for("Page.loadEventFired")
            for name, (width, scheme) in VIEWS.items():
                browser.call(
                    "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False
                )
                browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
                wide = browser.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
                shot = browser.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
                (out / f"{name}.png").write_bytes(base64.b64decode(shot["data"]))
                found["views"][name] = {"overflow_px": wide, "violations": _violations(browser, axe)}
            browser.call("Emulation.clearDeviceMetricsOverride")
            pdf = browser.call("Page.printToPDF", printBackground=True, preferCSSPageSize=True)
            (out / "print.pdf").write_bytes(base64.b64decode(pdf["data"]))
            browser.evaluate("1")  # all earlier events have arrived
        finally:
            browser.close()
    urls = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    console = [
        e
        for e in browser.events
        if e["method"] in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
    ]
    found["requests"] = [url for url in urls if url != page.as_uri()]
    found["loaded"] = page.as_uri() in urls
    found["console"] = [json.dumps(event["params"])[:300] for event in console]
    return found


def _violations(browser: Browser, axe: str | None) -> list[dict[str, Any]] | None:
    if axe is None:
        return None
    if not browser.evaluate("typeof window.axe === 'object'"):
        browser.evaluate(axe + "\n;0")
    script = """axe.run(document, {resultTypes: ['violations']}).then(r => r.violations.map(v => (
        {rule: v.id, impact: v.impact, help: v.help, where: v.nodes.slice(0, 3).map(n => n.target.join(' ')), count: v.nodes.length})))"""
    return list(browser.evaluate(script))


def _axe(given: str | None, folder: Path) -> str | None:
    if given == "none":
        return None
    if given:
        return Path(given).read_text(encoding="utf-8")
    subprocess.run(
        [
            "npm",
            "install",
            "--silent",
            "--no-audit",
            "--no-fund",
            "--ignore-scripts",
            "--prefix",
            str(folder),
            "axe-core",
        ],
        check=True,
    )
    return (folder / "node_modules/axe-core/axe.min.js").read_text(encoding="utf-8")


def problems_of(found: dict[str, Any]) -> list[str]:
    """The problems, in words."""
    problems = [f"request to {url}" for url in found["requests"]] + [f"console: {line}" for line in found["console"]]
    if not found["loaded"]:
        problems.append("the page was not loaded")
    for name, view in found["views"].items():
        if view["overflow_px"] > 0:
            problems.append(f"{name}: {view['overflow_px']} px wider than the screen")
        problems += [
            f"{name}: {v['impact']}: {v['help']} ({v['rule']}, {v['count']} ×, {'; '.join(v['where'])})"
            for v in view["violations"] or []
            if v["impact"] in ("serious", "critical")
        ]
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("--out", type=Path, default=Path("page-seen"))
    parser.add_argument("--axe")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    page = given.page.absolute()
    if page.is_dir():
        page = page / "report/index.html"
    with tempfile.TemporaryDirectory() as folder:
        found = examine(page, given.out, _axe(given.axe, Path(folder)))
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{page}: {found['bytes']:,} bytes, {len(found['requests'])} requests, {len(found['console'])} console lines")
    for name, view in found["views"].items():
        listed = view["violations"]
        checked = "axe-core was not run" if listed is None else f"axe-core: {len(listed)} violations"
        print(f"  {name}: {max(0, view['overflow_px'])} px too wide, {checked}")
        for v in listed or []:
            print(f"    {v['impact']}: {v['help']} ({v['rule']}, {v['count']} ×) {'; '.join(v['where'])}")
    problems = problems_of(found)
    for problem in problems:
        print(f"WRONG {problem}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
