"""Before training: what is wrong with a set of pairs."""
