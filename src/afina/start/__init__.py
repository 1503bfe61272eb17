"""`afina init`: a recipe and a site file from labelled data and a cluster.

find_data     a file, a folder or a Hub data set     guess_columns  text, label, id; a header that is a row
examine       lengths, labels, problems of the data  find_model     parameters, positions, tokens per word
find_machine  scratch, image, runtime                recipe_text    a proposal and its recipe as YAML
site_text     the site file                          init           the steps in order, and what is written
"""
