"""What the gateway decides and does: requests checked, routed, followed to their end, and answered."""
