"""What predictions and seeds can tell: scores, intervals, paired tests."""
