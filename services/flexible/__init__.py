"""The worker that does either phase, as the plan has it."""
