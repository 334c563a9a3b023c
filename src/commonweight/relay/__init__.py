"""A relay: adds up the updates of a region's sites and passes on the sum."""
