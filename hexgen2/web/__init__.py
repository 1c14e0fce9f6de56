"""HTTP in the event loop of a process: a server whose clients can take no more than their share of it."""
