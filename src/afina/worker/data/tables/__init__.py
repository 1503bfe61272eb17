"""Rows of data files as columns: a reader for each format, and tables that know where each row came from."""
