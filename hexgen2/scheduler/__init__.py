"""From a mixed cluster to a plan: what each GPU does, and how good that is."""
