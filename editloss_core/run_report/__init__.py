"""A training run, judged by what its held-out pictures show, and its curves."""
