"""Is the image the one that was signed? `AFINA_IMAGE_KEY` names who must have signed it; without it any image will do.

`apptainer verify` does the work: it hashes the whole file (0.4 s for 550 MB that are in memory) and refuses an object
that no signature covers as well as one that was altered. Checked here before anything is queued, by submitit's batch
script (`python -m afina.image RUN`), and by `slurm/finetune.sbatch` in bash. Not covered: an image that is exchanged after
the check, and, with a PGP key, a keyring that somebody else can write to.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

from afina.errors import AfinaError, SiteError
from afina.rundir import RunDir
from afina.site import Site, environment, in_container

__all__ = ["check_image", "main"]


def check_image(site: Site) -> None:
    """Nothing, where the site asks for no signature or runs no image, and in the container, whose host has looked.

    Raises:
        SiteError: the image is not signed, not by this key, or was altered since; or it cannot be told.
    """
    if site.image_key is None or site.image is None or site.runtime == "none" or in_container():
        return
    pem = Path(site.image_key).is_absolute()
    how = ["--key", site.image_key] if pem else ["--local", "--json"]
    argv = [site.runtime, "verify", *how, str(site.image)]
    try:
        done = subprocess.run(
            argv,
            env={**os.environ, **environment(site)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
    except OSError as error:
        raise SiteError(
            f"AFINA_IMAGE_KEY is set, and {site.runtime} cannot be run to check the image: {error.strerror}",
            "load its module in site.env, or submit from a node that has it",
        ) from None
    if done.returncode:
        raise _refused(site, _why(done.stderr) or f"{site.runtime} verify ended with {done.returncode}", argv)
    if not pem and (others := _signers(done.stdout) - {site.image_key}) != set():
        raise _refused(site, f"signed by {', '.join(sorted(others))}", argv)


def _signers(said: str) -> set[str]:
    """The fingerprints of all signatures that `verify --json` lists; a signer without one is an empty name."""
    try:
        listed = json.loads(said)["SignerKeys"]
        return {str(entry["Signer"]["Fingerprint"]).lower() or "an unknown key" for entry in listed} or {"nobody"}
    except (ValueError, KeyError, TypeError):
        return {"an unknown key"}


def _why(said: str) -> str:
    """The last line of what Apptainer said, without its label."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return lines[-1].removeprefix("FATAL:").strip() if lines else ""


def _refused(site: Site, why: str, argv: list[str]) -> SiteError:
    return SiteError(
        f"AFINA_IMAGE={site.image} is not the image that AFINA_IMAGE_KEY={site.image_key} signed: {why}",
        "fetch the image again from whoever signed it, or sign your own (`apptainer sign --key PRIVATE.pem IMAGE`) and name "
        f"its public key in AFINA_IMAGE_KEY; see also: {shlex.join(argv)}",
    )


def main(argv: list[str]) -> int:
    """Check the image of a run inside its job; a refusal is printed and recorded as the attempt's outcome."""
    run = RunDir(Path(argv[0]))
    try:
        check_image(run.plan().site)
    except AfinaError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        attempt = f"{os.environ.get('SLURM_JOB_ID', 'local')}.{os.environ.get('SLURM_RESTART_COUNT', '0')}"
        run.begin_attempt(attempt)
        run.record_failure(attempt, error, exit_code=error.exit_code)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
