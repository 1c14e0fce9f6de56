"""The coordinator: who is in the fleet, and the plan. Not on the path of any request."""
