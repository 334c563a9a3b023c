"""Strategies that keep a model for each of several clusters of sites."""
