"""Rows to sites: readers → partition → hold-out → templates → tokens. Start reading in `sites.py`."""
