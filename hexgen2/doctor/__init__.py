"""Whether a machine, and a fleet, has what it needs; each thing that is missing with its remedy."""
