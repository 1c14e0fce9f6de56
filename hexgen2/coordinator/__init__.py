"""What the coordinator decides and keeps: the fleet as reported, its plan, its epochs."""
