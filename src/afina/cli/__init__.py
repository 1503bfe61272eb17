"""The `afina` command: parse, call, print, exit. One module for each group of commands:

    start_commands     init
    check_commands     doctor, rehearse, recipe keys
    run_commands       prefetch, train, resume, submit, demo
    sweep_commands     sweep
    watch_commands     status, list, logs, cancel, prune
    report_commands    report, compare, rerun
    model_commands     predict, export
    image_commands     image info, image verify
    completion         completion

Everything heavy is imported inside the commands: `afina --help` starts in a blink.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from collections.abc import Sequence

import click

from afina.cli import (
    check_commands,
    completion,
    image_commands,
    model_commands,
    report_commands,
    run_commands,
    start_commands,
    sweep_commands,
    watch_commands,
)
from afina.cli.options import usage_remedy
from afina.errors import EXIT_ENVIRONMENT, EXIT_INPUT, AfinaError, nearest
from afina.version import __version__

__all__ = ["cli", "main"]


def main(argv: Sequence[str] | None = None) -> None:
    """The `afina` command. Exit codes: 0 finished, 2 your input, 3 the environment, 4 training failed, 75 stopped and resumable."""
    if argv is None and sys.getfilesystemencoding().lower() not in ("utf-8", "utf8") and not sys.flags.utf8_mode:
        # A locale like de_DE.ISO-8859-1: a name in a recipe would be another one on the disk. Begin again in UTF-8 mode.
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, "PYTHONUTF8": "1"})
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who started this (`>&-`): its number would be the next file's
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115, PTH123 — open to the end
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # paths and labels may hold what the terminal's encoding lacks
            stream.reconfigure(errors="backslashreplace")
    code: object = 0
    try:
        _run(argv)
    except SystemExit as ended:
        code = ended.code
    if code := _flushed(code):
        sys.exit(code)  # type: ignore[arg-type]


def _flushed(code: object) -> object:
    """Print what is still buffered; the exit code then. A reader that has gone (`| head`) is no failure, a full disk is one."""
    if type(sys.stdout).__name__.endswith("PacifyFlushWrapper"):
        return 0  # click's wrapper, where it has met a closed pipe; its code is 1
    try:
        sys.stdout.flush()
    except OSError as error:
        _drop_output(error)
        return code if isinstance(error, BrokenPipeError) else code or EXIT_ENVIRONMENT
    return code


def _drop_output(error: OSError) -> None:
    """Say why the output is not whole; what is still buffered is dropped, which Python would try to print at its end."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if not isinstance(error, BrokenPipeError):
        message = f"error: {error.strerror}: the output cannot be written whole\n  remedy: free space where it goes"
        print(message, file=sys.stderr)


def _run(argv: Sequence[str] | None) -> None:
    """Carry out a command; a failure is one message with a remedy."""
    try:
        cli.main(args=None if argv is None else list(argv), prog_name="afina", standalone_mode=False)
    except AfinaError as error:
        from afina.site.package import with_pages

        print(with_pages(f"error: {error}"), file=sys.stderr)
        sys.exit(error.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message(), file=sys.stderr)
        sys.exit(EXIT_INPUT)
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        usage = f"{context.get_usage()}\n" if context is not None else ""
        print(f"{usage}error: {error.format_message()}\n  remedy: {usage_remedy(error, argv)}", file=sys.stderr)
        sys.exit(EXIT_INPUT)
    except (click.Abort, KeyboardInterrupt):
        print("afina: interrupted; nothing incomplete is left behind", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        if error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT):
            _drop_output(error)
            sys.exit(EXIT_ENVIRONMENT)
        # The machine refused (permission, quota, a name too long). Without a file it is a defect: keep the traceback.
        if error.filename is None:
            raise
        print(
            f"error: {error.filename}: {error.strerror}\n  remedy: check the path, its permissions and your quota",
            file=sys.stderr,
        )
        sys.exit(EXIT_ENVIRONMENT)


#: The commands in the order of their use, each in a line of 80 columns.
SECTIONS = {
    "Start": {
        "init": "write a recipe and a site file for your data and cluster",
        "doctor": "check all that a job depends on",
        "recipe": "the keys of a recipe",
        "image": "what the image holds, and whether it is whole and fits",
        "demo": "train a small model on generated reviews",
        "completion": "complete commands, runs and keys in bash, zsh or fish",
    },
    "Run": {
        "prefetch": "fetch, check and prepare the model and the data",
        "rehearse": "run a few steps here and forecast the run",
        "train": "train on this machine",
        "submit": "train as a Slurm job",
        "sweep": "train over a grid of values and seeds",
        "resume": "continue a run on this machine",
        "rerun": "repeat a run as a new one",
    },
    "Watch": {
        "status": "how far runs are, how fast, and why they wait",
        "list": "one line a run: state, best metric, age",
        "logs": "print or follow the log of a run",
        "cancel": "end the jobs of runs",
        "prune": "remove the checkpoints of finished runs",
    },
    "Results": {
        "report": "a page about a run or a sweep",
        "compare": "recipes and scores side by side, with tests",
        "predict": "use the model of a run",
        "ensemble": "average several runs, and score the average",
        "export": "a model folder to give away, with its card",
    },
}


class _SectionedGroup(click.Group):
    """A group whose help lists its commands by section, and that names the nearest command of a mistyped one."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, commands in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(f"{name:<10}", text) for name, text in commands.items()])

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from afina.site.package import docs_folder

        super().format_epilog(ctx, formatter)
        formatter.write(f"  Documentation: {docs_folder()}\n")

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        known = self.list_commands(ctx)
        if args[0] not in known and not args[0].startswith("-"):
            raise click.UsageError(f"{args[0]}: no such command. {nearest(args[0], known)}".rstrip(), ctx)
        return super().resolve_command(ctx, args)


@click.group(
    cls=_SectionedGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Exit codes: 0 finished · 2 your input · 3 the environment · 4 the training failed · 75 stopped, resumable.",
)
@click.version_option(__version__, prog_name="afina")
def cli() -> None:
    """Fine-tune a pretrained Hugging Face model on labelled text as a Slurm batch job that survives the cluster.

    \b
    Examples:
      afina init                           write a recipe for the data here
      afina train recipe.yaml              train here
      afina submit recipe.yaml --nodes 2   as a Slurm job
      afina status                         all runs, or `afina status RUN`
      afina predict RUN new.csv            use the model
    """


for _group in (
    start_commands,
    check_commands,
    run_commands,
    sweep_commands,
    watch_commands,
    report_commands,
    model_commands,
    image_commands,
    completion,
):
    for _command in _group.COMMANDS:
        cli.add_command(_command)
