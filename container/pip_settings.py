"""Hands this machine's pip configuration to a place that cannot see it: an image being built, or uv.

A cluster's machine often reaches packages only through an index, a proxy or a certificate authority of its own, named
in pip's configuration files and ``PIP_*`` variables. ``%post`` of an image build sees neither, and uv reads neither.

    pip_settings.py stage DIR     write DIR/pip.conf, DIR/env, DIR/apt.conf and DIR/ca.pem as the image will see them
                                  (DIR bound at /mnt) and print one `SOURCE:DESTINATION:ro` bind per local folder
    pip_settings.py uv            print `NAME=value` for uv, each ended by NUL
    pip_settings.py variables     print `PIP_NAME=value`, each ended by NUL, for another user of this machine

Standard library only: it runs with whatever Python 3 the build machine has; without pip there, only the environment
is read. Not handed on: `constraint` (the locked requirements decide the versions), client certificates, keyrings.
"""

from __future__ import annotations

import ast
import configparser
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

MOUNT = "/mnt"
# pip's own names, with the spelling that its environment variables also allow.
LOCATIONS = ("index-url", "extra-index-url", "find-links")
PLAIN = ("no-index", "trusted-host", "proxy", "timeout", "retries")
ALIASES = {"default-timeout": "timeout", "pypi-url": "index-url"}
CERTIFICATE_VARIABLES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
PROXY_VARIABLES = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")


def pip_settings() -> dict[str, str]:
    """What pip would use for an installation here: ``{"index-url": ..., ...}``, the environment winning over files."""
    found: dict[str, dict[str, str]] = {"global": {}, "install": {}, ":env:": {}}
    listing = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False
    ).stdout
    for line in listing.splitlines():
        key, separator, value = line.partition("=")
        section, _, name = key.rpartition(".")
        if separator and section in found:
            found[section][ALIASES.get(name, name)] = str(ast.literal_eval(value))
    # Read again from the environment: there may be no pip, and `pip config list` leaves out what is set and empty.
    for variable, value in os.environ.items():
        if variable.startswith("PIP_"):
            name = variable[4:].lower().replace("_", "-")
            found[":env:"][ALIASES.get(name, name)] = value
    merged = {**found["global"], **found["install"], **found[":env:"]}
    return {name: value for name, value in merged.items() if value.strip()}


def certificate(settings: dict[str, str]) -> Path | None:
    """The bundle of certificate authorities that this machine trusts, if it names one."""
    for candidate in (settings.get("cert"), *(os.environ.get(name) for name in CERTIFICATE_VARIABLES)):
        if candidate and Path(candidate).is_file():
            return Path(candidate)
    return None


def local_folder(location: str) -> Path | None:
    """The folder behind a path or a ``file:`` address; None for an address on the network."""
    parts = urlsplit(location)
    if parts.scheme not in ("", "file"):
        return None
    return Path(unquote(parts.path) if parts.scheme else location).expanduser()


def into_image(name: str, value: str, binds: dict[Path, str]) -> str:
    """The value as the image must read it: each local folder is bound under ``MOUNT`` and named there."""
    moved = []
    for location in value.split():
        folder = local_folder(location)
        if folder is None:
            moved.append(location)
            continue
        if not folder.is_dir():
            continue
        # The pages of a local index link to files beside it (../../files): bind what holds both.
        bound = folder.parent if name != "find-links" and folder.parent != Path("/") else folder
        destination = binds.setdefault(bound, f"{MOUNT}/folder{len(binds)}")
        inside = f"{destination}/{folder.relative_to(bound)}".removesuffix("/.")
        moved.append(inside if name == "find-links" else f"file://{inside}")
    return "\n".join(moved)


def stage(directory: Path) -> list[str]:
    """Writes the files for an image build into ``directory``; gives the binds for the folders they name."""
    settings = pip_settings()
    binds: dict[Path, str] = {}
    chosen = {name: settings[name] for name in PLAIN if name in settings}
    for name in LOCATIONS:
        moved = into_image(name, settings.get(name, ""), binds)
        if moved:
            chosen[name] = moved
    exports = {name: os.environ[name] for name in PROXY_VARIABLES if os.environ.get(name)}
    apt = []
    bundle = certificate(settings)
    if bundle is not None:
        shutil.copyfile(bundle, directory / "ca.pem")
        chosen["cert"] = f"{MOUNT}/ca.pem"
        exports["SSL_CERT_FILE"] = f"{MOUNT}/ca.pem"
        apt.append(f'Acquire::https::CAInfo "{MOUNT}/ca.pem";')
    config = configparser.RawConfigParser()
    config["global"] = chosen
    # Addresses may carry a password: the folder is private to the caller, and build.sh removes it.
    with (directory / "pip.conf").open("w", encoding="utf-8") as file:
        config.write(file)
    (directory / "env").write_text(
        "".join(f"export {name}={shlex.quote(value)}\n" for name, value in exports.items()), encoding="utf-8"
    )
    (directory / "apt.conf").write_text("".join(f"{line}\n" for line in apt), encoding="utf-8")
    for destination in binds.values():
        (directory / Path(destination).name).mkdir(exist_ok=True)
    return [f"{source}:{destination}:ro" for source, destination in binds.items()]


def uv_environment() -> dict[str, str]:
    """pip's main index, proxy and certificates under uv's names.

    Extra indexes and folders of wheels are left out on purpose: one that holds some files of a version would shorten
    the locked list of hashes to those files.
    """
    settings = pip_settings()
    exports = {}
    if "index-url" in settings:
        exports["UV_DEFAULT_INDEX"] = settings["index-url"]
    if "proxy" in settings:
        exports["ALL_PROXY"] = settings["proxy"]
    bundle = certificate(settings)
    if bundle is not None:
        exports["SSL_CERT_FILE"] = str(bundle)
    return exports


def pip_environment() -> dict[str, str]:
    """The same settings as ``PIP_*`` variables, so that they hold where this user's files cannot be read."""
    known = (*LOCATIONS, *PLAIN, "cert")
    return {f"PIP_{name.upper().replace('-', '_')}": value for name, value in pip_settings().items() if name in known}


def main(arguments: list[str]) -> int:
    if len(arguments) == 2 and arguments[0] == "stage":
        print("\n".join(stage(Path(arguments[1]))))
        return 0
    if arguments in (["uv"], ["variables"]):
        exports = uv_environment() if arguments == ["uv"] else pip_environment()
        sys.stdout.write("".join(f"{name}={value}\0" for name, value in exports.items()))
        return 0
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
