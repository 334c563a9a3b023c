"""What to run: one typed schema, YAML in, JSON Schema out, checked before anything starts."""

from .schema import Recipe

__all__ = ["Recipe"]
