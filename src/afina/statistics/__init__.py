"""What predictions and seeds can tell; no file of a run is read but `predictions.parquet`.

predictions   the file as arrays       scores      scores with bootstrap intervals, calibration, mistakes
intervals     a mean over seeds        paired      is one model better than another on the same rows?
"""
