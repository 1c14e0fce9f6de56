"""The evaluation of the HexGen-2 paper, made again with this project's planner, cost model and simulator."""
