"""A mixed cluster, planned and guessed, measured on real processes."""
