"""Statistics of predictions and of seeds. The only file of a run that is read is `predictions.parquet`.

predictions   the file as arrays              scores   scores with intervals, calibration, mistakes
measures      the metrics, by one rule        paired   paired tests of two models on the same rows
intervals     of shares and means over seeds
"""
