"""What keeps a site's rows from being read off what it sends: accounting, noise, secure aggregation."""
