"""What is in the image: run by %post with the image's own Python, standard library only.

    contents.py prune FOLDER…                 remove the test suites of the installed packages
    contents.py hashes REPORT… >hashes.json   which file of each package pip installed, from its --report
    contents.py sbom HASHES OUT               the bill of materials (CycloneDX 1.6, JSON): Python and Debian packages
    contents.py sizes                         one line a group, unpacked megabytes; --label for the label of the image

The same image gives the same bytes: nothing here asks for the time, except SOURCE_DATE_EPOCH. Not in the bill: what the wheels
bundle (OpenBLAS, Arrow's C++ libraries, …), which their own bills of materials name; licences of Debian packages.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import uuid
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from urllib.parse import quote

GROUPS = (
    ("CUDA libraries", r"nvidia-.*|cuda-.*|triton"),
    ("PyTorch", r"torch"),
    ("Hugging Face", r"transformers|tokenizers|datasets|accelerate|evaluate|huggingface-hub|hf-xet|safetensors"),
    ("numerics", r"numpy|scipy|scikit-learn|pandas|pyarrow|sympy|networkx|mpmath|joblib"),
    ("afina", r"afina"),
    ("other Python packages", r".*"),
)


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def prune(folders: list[str]) -> None:
    """Folders named test or tests that hold tests; nothing of the packages imports them (84 MB of them are PyTorch's)."""
    removed = 0
    for folder in folders:
        for here, names, _ in os.walk(folder):
            for name in [n for n in names if n in ("test", "tests")]:
                path = Path(here, name)
                if path.parent == Path(folder) or not (any(path.rglob("test_*")) or path.parent.name == "torch"):
                    continue
                removed += size_of(path)
                shutil.rmtree(path)
                names.remove(name)
    print(f"tests of packages: {removed / 1e6:.0f} MB removed")


def hashes(reports: list[str]) -> None:
    """`{name: sha256}`. The addresses in the reports are left out: they may be a mirror's, with a password."""
    found = {}
    for report in reports:
        for entry in json.loads(Path(report).read_text(encoding="utf-8"))["install"]:
            archive = entry["download_info"].get("archive_info", {})
            digest = archive.get("hashes", {}).get("sha256") or archive.get("hash", "").removeprefix("sha256=")
            if digest:
                found[canonical(entry["metadata"]["name"])] = digest
    json.dump(found, sys.stdout, indent=0, sort_keys=True)


def licences(about: Any) -> list[dict[str, Any]]:
    """As the package's metadata say it: an SPDX expression, else a short text, else the classifiers."""
    if expression := about.get("License-Expression"):
        return [{"expression": expression}]
    text = (about.get("License") or "").strip()
    if text and "\n" not in text and len(text) < 80 and text.upper() != "UNKNOWN":
        return [{"license": {"name": text}}]
    named = [c.rpartition(" :: ")[2] for c in about.get_all("Classifier") or [] if c.startswith("License :: ")]
    return [{"license": {"name": name}} for name in named if name != "OSI Approved"]


def python_components(known: dict[str, str]) -> Iterator[dict[str, Any]]:
    for package in importlib.metadata.distributions():
        about = package.metadata
        name, version = canonical(about["Name"]), about["Version"]
        address = f"pkg:pypi/{name}@{quote(version, safe='.-_~')}"
        component: dict[str, Any] = {
            "type": "library",
            "bom-ref": address,
            "name": name,
            "version": version,
            "purl": address,
        }
        if digest := known.get(name):
            component["hashes"] = [{"alg": "SHA-256", "content": digest}]
        if said := licences(about):
            component["licenses"] = said
        yield component


def debian_components() -> Iterator[dict[str, Any]]:
    if shutil.which("dpkg-query") is None:
        return
    listed = subprocess.run(
        ["dpkg-query", "--show", "--showformat=${Package}\\t${Version}\\t${Architecture}\\n"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    release = platform.freedesktop_os_release() if hasattr(platform, "freedesktop_os_release") else {}
    for line in listed.splitlines():
        name, version, architecture = line.split("\t")
        address = f"pkg:deb/{release.get('ID', 'debian')}/{name}@{quote(version, safe='.-_~')}?arch={architecture}"
        if "VERSION_CODENAME" in release:
            address += f"&distro={release['VERSION_CODENAME']}"
        yield {"type": "library", "bom-ref": address, "name": name, "version": version, "purl": address}


def sbom(known: str, out: str) -> None:
    components = [*python_components(json.loads(Path(known).read_text(encoding="utf-8"))), *debian_components()]
    components.sort(key=lambda component: str(component["bom-ref"]))
    version = importlib.metadata.version("afina")
    made: dict[str, Any] = {
        "component": {"type": "container", "bom-ref": "afina-image", "name": "afina", "version": version}
    }
    if epoch := os.environ.get("SOURCE_DATE_EPOCH"):
        made["timestamp"] = datetime.fromtimestamp(int(epoch), timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    serial = uuid.uuid5(uuid.NAMESPACE_URL, json.dumps([made, components], sort_keys=True))
    bill = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{serial}",
        "version": 1,
        "metadata": made,
        "components": components,
    }
    Path(out).write_text(json.dumps(bill, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def size_of(path: Path, mounts: frozenset[str] = frozenset()) -> int:
    """Bytes of the files below a path, links not followed, `mounts` left out."""
    if path.is_symlink() or not path.is_dir():
        return path.lstat().st_size
    total = 0
    for here, names, files in os.walk(path):
        names[:] = [name for name in names if str(Path(here, name)) not in mounts]
        total += sum(Path(here, file).lstat().st_size for file in files)
    return total


def sizes() -> dict[str, int]:
    """Unpacked bytes by group, the largest first."""
    site = Path(sysconfig.get_path("purelib"))
    owner: dict[str, str] = {}
    for package in importlib.metadata.distributions():
        group = next(g for g, pattern in GROUPS if re.fullmatch(pattern, canonical(package.metadata["Name"])))
        for file in package.files or ():
            owner.setdefault(file.parts[0], group)
    found = dict.fromkeys((group for group, _ in GROUPS), 0)
    for entry in site.iterdir():
        found[owner.get(entry.name, "other Python packages")] += size_of(entry)
    stdlib = Path(sysconfig.get_path("stdlib"))
    apart = frozenset(str(stdlib / name) for name in ("dist-packages", "site-packages"))
    found["Python"] = size_of(stdlib, apart)
    # The rest: Debian, and this Python's programs. A build machine's folders are mounted here too.
    mounted = frozenset(line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()) - {"/"}
    found["Debian"] = max(0, size_of(Path("/"), mounted) - sum(found.values()))
    return dict(sorted(((group, size) for group, size in found.items() if size), key=lambda pair: -pair[1]))


def main(arguments: list[str]) -> int:
    match arguments:
        case ["prune", *folders] if folders:
            prune(folders)
        case ["hashes", *reports] if reports:
            hashes(reports)
        case ["sbom", known, out]:
            sbom(known, out)
        case ["sizes"]:
            for group, size in sizes().items():
                print(f"{size / 1e6:8.0f} MB  {group}")
        case ["sizes", "--label"]:
            print(", ".join(f"{group} {size / 1e6:.0f}" for group, size in sizes().items()), "MB unpacked")
        case _:
            print(__doc__, file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
