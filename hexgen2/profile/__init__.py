"""What `hexgen2 profile` measures: devices, engines and links, and how that becomes a cluster.yaml."""
