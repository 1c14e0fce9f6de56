"""Who is who and who may do what: certificates, TLS, roles, API keys."""
