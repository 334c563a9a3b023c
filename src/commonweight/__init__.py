"""Fine-tune one language model across many owners' data without the data leaving its owner."""

__version__ = "0.1.0"
