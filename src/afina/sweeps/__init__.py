"""Many runs of one recipe: which cells, where they lie, how they are claimed and submitted, what they found."""
