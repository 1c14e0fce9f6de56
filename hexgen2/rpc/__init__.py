"""The gRPC edge: servers, channels, interceptors, messages to and from the domain."""
