"""Strategies that combine the products of LoRA's factors, where an average of the factors themselves is not exact."""
