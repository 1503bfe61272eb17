"""Commands about the image: `afina image build`, `pull`, `push`, `info`, `verify`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import click

__all__ = ["COMMANDS"]

_SIGNS = {"ok": "ok     ", "warning": "WARNING", "failed": "FAILED ", "unknown": "-      "}


@click.group()
def image() -> None:
    """The image: its contents, whether it is whole, and whether it fits.

    \b
    Examples:
      afina image build --output afina.sif
      afina image pull oras://registry.example.org/group/afina:1
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
    """Print what IMAGE holds, without starting it; by default the site's AFINA_IMAGE.

    \b
    Examples:
      afina image info afina.sif
      afina image info --json
    """
    from afina.site.gpus import driver_version
    from afina.site.image import select_image, summary
    from afina.site.verify_image import check_fit

    read = select_image(image, site)[0]
    about, findings = summary(read), list(check_fit(read, driver_version()))
    if as_json:
        print(json.dumps({**about, "fit": [finding.to_json() for finding in findings]}, indent=2, ensure_ascii=False))
        return
    print(about["image"])
    for name, value in _lines(about):
        print(f"  {name:<11}{value}")
    for finding in findings:
        _print_finding(finding)


@image.command()
@_options
def pull(image: str | None, site: str | None, as_json: bool) -> None:
    """Pull IMAGE, oras://… or docker://…, to scratch, and print its path there; by default the site's AFINA_IMAGE.

    A submission does it too. The address is resolved to a digest; an image that is there already is not transferred again.

    \b
    Examples:
      afina image pull
      afina image pull oras://registry.example.org/group/afina:1
    """
    from afina.site.image import pull_image

    pulled = pull_image(image, site)
    if as_json:
        print(json.dumps({"image": str(pulled.path), "address": pulled.address, "digest": pulled.digest}))
    else:
        print(pulled.path)


@image.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("options", nargs=-1, type=click.UNPROCESSED, metavar="[OPTIONS]...")
def build(options: tuple[str, ...]) -> None:
    """Build the image as container/build.sh does, with its options; --help lists them. Works from a wheel too.

    \b
    Examples:
      afina image build --output afina.sif
      afina image build --cpu --torch-index URL --push oras://registry.example.org/group/afina:1
    """
    import subprocess

    from afina.site.package import build_folder

    # For --push, which needs this Python's packages.
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}"}
    with build_folder() as folder:
        sys.exit(
            subprocess.run(["bash", str(folder / "container/build.sh"), *options], env=env, check=False).returncode
        )


@image.command()
@click.argument("image", metavar="IMAGE")
@click.argument("address", metavar="ADDRESS")
def push(image: str, address: str) -> None:
    """Push IMAGE to ADDRESS and print the address with its digest, for AFINA_IMAGE.

    oras://… stores the image as it is. docker://… stores an OCI image of the same files, for Docker, Podman, pyxis, Charliecloud and Kubernetes.

    \b
    Examples:
      afina image push afina.sif oras://registry.example.org/group/afina:1
      afina image push afina.sif docker://registry.example.org/group/afina:1
    """
    from afina.site.image import push_image

    print(push_image(image, address))


@image.command()
@_options
@click.option("--key", metavar="KEY", help="The key that must have signed it: a PEM public key or a PGP fingerprint.")
def verify(image: str | None, site: str | None, key: str | None, as_json: bool) -> None:
    """Check that IMAGE is whole, signed by AFINA_IMAGE_KEY, starts and fits. Exit code 3 if not.

    \b
    Examples:
      afina image verify
      afina image verify afina.sif --key public.pem
    """
    from afina.errors import EXIT_ENVIRONMENT, InputError
    from afina.site.image import select_image
    from afina.site.settings import in_container
    from afina.site.variables import image_key
    from afina.site.verify_image import verify as verified

    if in_container():
        raise InputError("an image cannot be checked from inside it", "run this on the host")
    read, wanted, runtime, env = select_image(image, site)
    findings = []
    for finding in verified(read, image_key(key) if key else wanted, runtime, env):
        findings.append(finding)
        if not as_json:
            _print_finding(finding)
    if as_json:
        answer = {"image": str(read.path), "findings": [finding.to_json() for finding in findings]}
        print(json.dumps(answer, indent=2, ensure_ascii=False))
    if any(finding.level == "failed" for finding in findings):
        sys.exit(EXIT_ENVIRONMENT)


def _print_finding(finding: Any) -> None:
    from afina.site.package import with_pages

    print(f"  {_SIGNS[finding.level]} {finding.check}: {finding.message}", flush=True)
    if finding.remedy and finding.level in ("failed", "warning"):
        print(f"          remedy: {with_pages(finding.remedy)}", flush=True)


def _lines(about: dict[str, Any]) -> list[tuple[str, str]]:
    """Name and text of each known property, the most important first."""
    from afina.text import size_in_words

    cuda = f", CUDA {about['cuda']}, driver {about['minimum_driver'] or '?'} or newer" if about["cuda"] else ""
    signed = "yes; `afina image verify` checks by whom" if about["signatures"] else "no"
    size = "" if about["size_bytes"] is None else size_in_words(about["size_bytes"])
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
        ("size", size),
        ("signed", signed if about["size_bytes"] is not None else ""),
    ]
    return [(name, str(text)) for name, text in lines if text]


COMMANDS = (image,)
