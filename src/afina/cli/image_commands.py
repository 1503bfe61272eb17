"""Commands about the image: `afina image info`, `afina image verify`."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

__all__ = ["COMMANDS"]

_MARKS = {"ok": "ok     ", "warning": "WARNING", "failed": "FAILED ", "unknown": "-      "}


@click.group()
def image() -> None:
    """What an image is, whether it is whole, and whether it fits.

    \b
    Examples:
      afina image info afina.sif
      afina image verify
    """


def _options(command: Any) -> Any:
    for decorate in (
        click.option("--json", "as_json", is_flag=True, help="Print JSON."),
        click.option("--site", metavar="FILE", help="Site file that names the image and its key."),
        click.argument("image", required=False),
    ):
        command = decorate(command)
    return command


@image.command()
@_options
def info(image: str | None, site: str | None, as_json: bool) -> None:
    """Print what IMAGE holds, from the file alone; by default the site's AFINA_IMAGE.

    \b
    Examples:
      afina image info afina.sif
      afina image info --json
    """
    from afina.site.gpus import driver_version
    from afina.site.image import fit, image_of, summary

    read = image_of(image, site)[0]
    about, findings = summary(read), fit(read, driver_version())
    if as_json:
        print(json.dumps({**about, "fit": [finding.to_json() for finding in findings]}, indent=2, ensure_ascii=False))
        return
    print(about["image"])
    for name, value in _lines(about):
        print(f"  {name:<11}{value}")
    for finding in findings:
        _tell(finding)


@image.command()
@_options
@click.option("--key", metavar="KEY", help="Who must have signed it: a PEM public key or a PGP fingerprint.")
def verify(image: str | None, site: str | None, key: str | None, as_json: bool) -> None:
    """Check IMAGE: is it whole, signed as AFINA_IMAGE_KEY asks, does it start, does it fit? Exit code 3 if not.

    \b
    Examples:
      afina image verify
      afina image verify afina.sif --key public.pem
    """
    from afina.errors import EXIT_ENVIRONMENT, InputError
    from afina.site import image as images
    from afina.site.settings import image_key, in_container

    if in_container():
        raise InputError("this is inside the image: it cannot be checked from there", "run it on the host")
    read, wanted, runtime, env = images.image_of(image, site)
    findings = []
    with _Reading(read.size_bytes or 0) as reading:
        for finding in images.verify(read, image_key(key) if key else wanted, runtime, env, progress=reading.advance):
            findings.append(finding)
            if not as_json:
                reading.clear()
                _tell(finding)
    if as_json:
        found = {"image": str(read.path), "findings": [finding.to_json() for finding in findings]}
        print(json.dumps(found, indent=2, ensure_ascii=False))
    if any(finding.level == "failed" for finding in findings):
        sys.exit(EXIT_ENVIRONMENT)


class _Reading:
    """A bar for the bytes of the image that have been read, on a terminal only."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.bar: Any = None

    def __enter__(self) -> _Reading:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()

    def advance(self, done: int) -> None:
        if not sys.stderr.isatty():
            return
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

        if self.bar is None:
            columns = (TextColumn("  reading"), BarColumn(), DownloadColumn())
            self.bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self.task = self.bar.add_task("", total=self.total)
            self.bar.start()
        self.bar.update(self.task, completed=done)

    def clear(self) -> None:
        if self.bar is not None:
            self.bar.stop()
        self.bar = None


def _tell(finding: Any) -> None:
    print(f"  {_MARKS[finding.level]} {finding.check}: {finding.message}", flush=True)
    if finding.remedy and finding.level in ("failed", "warning"):
        print(f"          remedy: {finding.remedy}", flush=True)


def _lines(about: dict[str, Any]) -> list[tuple[str, str]]:
    """Name and text of what is known, in the order of interest."""
    cuda = f", CUDA {about['cuda']}, driver {about['minimum_driver'] or '?'} or newer" if about["cuda"] else ""
    signed = ", ".join(s["by"] or "a PEM key" for s in about["signatures"]) or "no"
    size = "" if about["size_bytes"] is None else f"{about['size_bytes'] / 1e6:.1f} MB"
    files = "" if about["files"] is None else f", {about['compression']}, {about['files']} files and folders"
    base = " @ ".join(word for word in (about["base"], about["base_digest"]) if word)
    built = f"{about['built']}" if about["built"] else ""
    by = f" with Apptainer {about['built_with']}" if about["built_with"] else ""
    lines = [
        ("afina", f"{about['version']} ({about['revision'] or 'revision unknown'})" if about["version"] else ""),
        ("PyTorch", f"{about['torch']}{cuda}" if about["torch"] else ""),
        ("Python", about["python"]),
        ("lock", about["lock"]),
        ("base", base),
        ("built", f"{built}{by}".strip()),
        ("machine", about["architecture"]),
        ("size", size + files),
        ("holds", about["contents"]),
        ("signed", signed if about["size_bytes"] is not None else ""),
    ]
    return [(name, str(text)) for name, text in lines if text]


COMMANDS = (image,)
