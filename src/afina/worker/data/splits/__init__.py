"""Which rows train, eval and test take; rows that two splits share."""
