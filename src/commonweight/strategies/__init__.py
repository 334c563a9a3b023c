"""The server's algebra, one short file a method: state + a stream of updates → new state."""
