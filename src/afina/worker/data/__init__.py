"""From data files to prepared data: readers, labels, splits, tokenising, and the prepared store."""
