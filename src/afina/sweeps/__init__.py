"""Many runs of one recipe: `afina sweep` and `afina.sweep`.

grid, space   which cells, by a grid or by a search: pure      draft     what is there, what is missing
folder        the sweep directory as a type                    claim     from a draft to a directory
api           Python's `sweep` and `Sweep`                     table     what it found
"""
