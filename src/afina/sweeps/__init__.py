"""Many runs of one recipe: `afina sweep` and `afina.sweep`.

grid, space   the cells, by a grid or by a search: pure        draft     what a call would do
sweep_dir     the sweep directory as a type                    claim     from a draft to a directory
out_of_fold   the table of all rows of a cross-validation
sweep         Python's `sweep` and `Sweep`                     table     the results
"""
