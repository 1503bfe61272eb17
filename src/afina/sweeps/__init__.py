"""Many runs of one recipe: `afina sweep` and `afina.sweep`.

grid, space   the cells, by a grid or by a search: pure        draft     what a call would do
sweep_dir     the sweep directory as a type                    claim     from a draft to a directory
sweep         Python's `sweep` and `Sweep`                     table     the results
"""
