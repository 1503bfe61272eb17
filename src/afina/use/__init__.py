"""A finished run at work: `afina predict`, `afina export`, `afina.load`.

prediction   what is to be predicted, as a frozen value     predict   here, in a container, or as jobs
stages       worker processes, and what they say            export    as a folder of a model
load         a classifier in Python
"""
