"""Before a run: `afina init`, `afina rehearse`, and what `afina submit` foresees.

look       into the data                 propose     from looks to a recipe and a site file: pure
init       finds, asks, writes           rehearse    what a run will cost, asked of a short real training
estimate   numbers to a forecast: pure   foresight   what no partition will ever run is refused
"""
