"""The `afina` command: parse, call, print, exit. One module for each group of commands:

    start_commands     init, doctor, rehearse
    run_commands       prefetch, train, resume, submit, demo
    sweep_commands     sweep
    watch_commands     status, list, logs, cancel
    report_commands    report, compare, rerun
    model_commands     predict, export
    image_commands     image info, image verify

Everything heavy is imported inside the commands: `afina --help` starts in a blink.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence

import click

from afina.cli import (
    image_commands,
    model_commands,
    report_commands,
    run_commands,
    start_commands,
    sweep_commands,
    watch_commands,
)
from afina.errors import EXIT_ENVIRONMENT, AfinaError
from afina.version import __version__

__all__ = ["cli", "main"]


def main(argv: Sequence[str] | None = None) -> None:
    """The `afina` command. Exit codes: 0 finished, 2 your input, 3 the environment, 4 training failed, 75 stopped and resumable."""
    if argv is None and sys.getfilesystemencoding().lower() not in ("utf-8", "utf8") and not sys.flags.utf8_mode:
        # A locale like de_DE.ISO-8859-1: a name in a recipe would be another one on the disk. Begin again in UTF-8 mode.
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, "PYTHONUTF8": "1"})
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # paths and labels may hold what the terminal's encoding lacks
            stream.reconfigure(errors="backslashreplace")
    try:
        cli.main(args=None if argv is None else list(argv), standalone_mode=False)
    except AfinaError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        print("afina: interrupted; nothing incomplete is left behind", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)
    except OSError as error:
        # The machine refused (permission, quota, a name too long). Without a file it is a defect: keep the traceback.
        if error.filename is None:
            raise
        print(
            f"error: {error.filename}: {error.strerror}\n  remedy: check the path, its permissions and your quota",
            file=sys.stderr,
        )
        sys.exit(EXIT_ENVIRONMENT)


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Exit codes: 0 finished · 2 your input · 3 the environment · 4 the training failed · 75 stopped, resumable.",
)
@click.version_option(__version__, prog_name="afina")
def cli() -> None:
    """Fine-tune a pretrained Hugging Face model on labelled text as a Slurm batch job that survives the cluster.

    \b
    Examples:
      afina train recipe.yaml                       train here
      afina submit recipe.yaml --nodes 2            as a Slurm job
      afina prefetch recipe.yaml                    fetch and prepare, on a node with internet
      afina status                                  all runs, or `afina status RUN`
      afina logs RUN -f                             follow its log
      afina predict RUN new.csv                     use the model
    """


for _group in (
    start_commands,
    run_commands,
    sweep_commands,
    watch_commands,
    report_commands,
    model_commands,
    image_commands,
):
    for _command in _group.COMMANDS:
        cli.add_command(_command)
