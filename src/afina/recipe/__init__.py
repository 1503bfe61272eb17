"""The recipe: schema, YAML, `--set`, explained errors, data formats, trackers.

Another option is a field of its section in `keys/`, a row in docs/recipe.md and a use in the worker; the rest follows from the field.
"""
