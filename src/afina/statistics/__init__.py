"""Statistics of predictions and of seeds. The only file of a run that is read is `predictions.parquet`.

predictions   the file as arrays        scores   scores with bootstrap intervals, calibration, mistakes
intervals     means over seeds          paired   paired tests of two models on the same rows
"""
