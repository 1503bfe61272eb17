"""Statistics of predictions and of seeds. The only file of a run that is read is `predictions.parquet`.

predictions   the file as arrays              scores        scores with intervals, mistakes
measures      the metrics, by one rule        calibration   accuracy by confidence
limits        95 % limits of the metrics      paired        paired tests of two models on the same rows
intervals     of shares and means over seeds  weakness      reasons why a model is of no use
"""
