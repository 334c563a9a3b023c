"""A store that speaks S3, in this process on a free loopback port.

A test module that wants one imports the fixtures: `from tests.s3 import s3, s3_server  # noqa: F401`.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest

KEY, SECRET = "AKIDFORTESTSONLY", "s3cret-of-the-tests-only"


@dataclass(frozen=True)
class Bucket:
    """A bucket of its own: its name, and the options with which Blobs reaches it."""

    name: str
    endpoint_url: str
    options: dict[str, Any] = field(repr=False)

    @property
    def url(self) -> str:
        return f"s3://{self.name}/store"

    def client(self) -> Any:
        """boto3's client of it, for looking behind the store's back."""
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint_url,
            aws_access_key_id=KEY,
            aws_secret_access_key=SECRET,
            region_name="us-east-1",
        )


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The address of an empty S3 that lasts as long as the tests."""
    from moto.server import ThreadedMotoServer

    with mock.patch.dict(os.environ, {"AWS_CONFIG_FILE": os.devnull, "AWS_EC2_METADATA_DISABLED": "true"}):
        for name in [
            name for name in os.environ if name.startswith("AWS_") and not name.endswith(("_FILE", "_DISABLED"))
        ]:
            del os.environ[name]  # this machine's own settings; patch.dict puts them back
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        yield f"http://{host}:{port}"
        server.stop()


@pytest.fixture
def s3(s3_server: str) -> Bucket:
    """A new bucket."""
    options = {
        "endpoint_url": s3_server,
        "key": KEY,
        "secret": SECRET,
        "client_kwargs": {"region_name": "us-east-1"},
    }
    bucket = Bucket(f"bucket-{uuid.uuid4().hex}", s3_server, options)
    bucket.client().create_bucket(Bucket=bucket.name)
    return bucket
