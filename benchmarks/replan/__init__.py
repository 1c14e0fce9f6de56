"""Plans that follow their workload, and lost workers, on real processes: ``python -m benchmarks.replan``."""
