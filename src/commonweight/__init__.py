"""Fine-tune one language model across many owners' data without the data leaving its owner."""

import os
import sys

__version__ = "0.1.0"

# gRPC reads this while it is loaded, so it is set before any module of this package can load it: with it nothing below
# TLS 1.3 is spoken (identity/tls.py says why, and refuses to go on without)
if "grpc" not in sys.modules:
    os.environ["GRPC_SSL_CIPHER_SUITES"] = "ECDHE-RSA-AES256-GCM-SHA384"
