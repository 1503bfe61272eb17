"""Data files, read strictly and row by row: one set of readers for training, prediction and `afina init`.

read_options  the options of reading, formats by suffix    text_files  compression, encodings, what a wrong byte means
delimited     CSV and TSV                                  json_rows   JSON Lines, and other shapes of JSON
columnar      Parquet and Arrow                            rows        the rows of any format as dictionaries
notes         what is odd in a file and no error           columns     names of columns, nested and partition columns too
"""
