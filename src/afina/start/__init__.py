"""`afina init`: a recipe and a site file from labelled data and a cluster.

find_data     a file, a folder or a Hub data set     examine      columns, lengths, labels, problems of the data
find_machine  scratch, image, runtime                find_model   parameters, positions, tokens per word
recipe_text   a proposal and its recipe as YAML      site_text    the site file
init          the steps in order, and what is written
"""
