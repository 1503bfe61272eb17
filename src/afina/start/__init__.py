"""Before a run: the first look, the proposed recipe, what a run will take."""
