"""Further ranks of a replica, on a machine that is not its first."""
