"""What prefill and decode workers do with a request; services translate it to and from gRPC."""
