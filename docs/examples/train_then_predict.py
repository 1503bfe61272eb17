"""Train in one job and predict in a second that starts when the first has finished; this script waits for neither.

python train_then_predict.py recipe.yaml new.csv predictions.csv
"""

import shlex
import subprocess
import sys

import afina

recipe, texts, out = sys.argv[1:]
run = afina.submit(recipe)
predict = shlex.join(["afina", "predict", str(run.path), texts, "-o", out])
subprocess.run(["sbatch", f"--dependency=afterok:{run.job_id}", f"--wrap={predict}"], check=True)
print(f"{run.path} trains in job {run.job_id}; {out} is written when it has finished")
