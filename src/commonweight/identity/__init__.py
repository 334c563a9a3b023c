"""Who is who: keys, certificates, one-time tokens, roles, and TLS for both ends."""
