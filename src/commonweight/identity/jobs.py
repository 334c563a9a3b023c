"""Whose job it is that came from a coordinator: the lead's signature, and that of nobody in between."""

from __future__ import annotations

from ..errors import AccessError
from ..wire.messages import parse_job
from ..wire.protocol_pb2 import Job, SignedJob
from .certificates import Holder, verify_certificate
from .keys import JOB, verify
from .roles import SIGNING_ROLES


def verify_job(signed: SignedJob, run: str, authority: bytes) -> tuple[Job, Holder]:
    """A run's job, and who signed it.

    Args:
        authority: whom to trust, PEM.

    Raises:
        AccessError: its signature, its signer's certificate or role is not good, or it is another run's.
        Refused: the job cannot be read.
    """
    job = parse_job(signed)
    # a run outlives certificates: the signer's must have been good when the job was submitted
    holder = verify_certificate(signed.certificate, authority, at=job.submitted_at)
    if holder.role not in SIGNING_ROLES:
        raise AccessError(f"the job is signed by a {holder.role} ({holder.name}), not by a lead or an admin")
    if not verify(holder.signing_key, JOB, signed.job, signed.signature):
        raise AccessError(f"the job's signature is not that of {holder.role} {holder.name}")
    if job.id != run:
        raise AccessError(f"the job that came for run {run} is that of run {job.id[:128]!r}")
    return job, holder
