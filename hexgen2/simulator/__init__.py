"""Discrete events over the scheduler's cost model: what a plan would do under a workload, request by request. Pure."""
