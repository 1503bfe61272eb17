"""A small study: unlike recipes in one job array, each shown when it has ended; then the best one predicts.

Cells begin with `# %%`, as Jupyter and editors read them; `python study.py recipe.yaml new.csv` runs all.
"""

# %% The recipes: two learning rates, and one with longer texts
import sys

import afina

changes = [["train.learning_rate=1e-3"], ["train.learning_rate=1e-4"], ["tokens.max_length=64"]]
runs = afina.submit([afina.load_recipe(sys.argv[1], overrides=change) for change in changes])

# %% Each when it has ended
for run in afina.as_completed(runs):
    print(run.path.name, run.exception() or run.outcome.metrics)

# %% The best by the metric that chooses the checkpoint
finished = [summary for summary in runs.summaries() if summary.best_value is not None]
best = afina.Run(max(finished, key=lambda summary: summary.best_value).run)
print(best.path.name, best.warnings)

# %% What it says about new texts
print(afina.predict(best, sys.argv[2], "predictions.csv")["predictions"])
