"""What clients call: gRPC and OpenAI-compatible HTTP, both thin over ``hexgen2.gateway``."""
