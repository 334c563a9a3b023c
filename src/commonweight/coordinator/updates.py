"""Accepted uploads as updates: what their sites said of them, and where their tensors are."""

from __future__ import annotations

from dataclasses import replace

from ..wire.manifest import parse_manifest
from ..wire.protocol_pb2 import SignedManifest
from .blobs import Blobs
from .plans import RunPlan
from .receive import weight_of
from .stored_updates import StoredPartial, StoredUpdate
from .uploads import Upload
from .vault import Vault


def key_of(upload: Upload, vault: Vault) -> bytes:
    """The key of an upload's file."""
    assert upload.data_key is not None
    return vault.unwrap(upload.data_key, f"{upload.run}/{upload.round}/{upload.site}")


def stored_update(
    upload: Upload, plan: RunPlan, blobs: Blobs, vault: Vault, partial: StoredPartial | None = None
) -> StoredUpdate:
    """An accepted upload as an update whose tensors stay where they are.

    Args:
        partial: the region's sum in which it came; it has no tensors of its own then.
    """
    manifest = parse_manifest(SignedManifest(manifest=upload.manifest, signature=upload.signature))
    update = StoredUpdate(
        manifest.site,
        manifest.round,
        {},
        weight=weight_of(manifest, plan),
        num_examples=manifest.num_examples,
        num_label_tokens=manifest.num_label_tokens,
        num_steps=manifest.num_steps,
        cluster=manifest.cluster,
        metrics=manifest.metrics,
        frame=manifest.frame,
        path=blobs.open_local(upload.blob) if partial is None else None,
        key=key_of(upload, vault) if partial is None else b"",
        base=manifest.base,
        partial=partial,
        num_bytes=manifest.frame.plan.num_bytes if plan.coder is not None else 0,
        coder=plan.coder,
        coded_channels=plan.update_channels if plan.coder is not None else (),
    )
    return update if plan.coder is None or partial is not None else replace(update, codec=update.read_codec())
