"""A site's part in secure sums: what it says in each step, and its update as a masked row.

The coordinator carries the messages and is not trusted with them. A site goes on only with keys that are signed by
sites whose certificates this federation's authority issued, and whose signing keys are those that were seen first. All
that decides how much of the sum is one site's own (the job, the tensors that the round starts from, the learning rate,
the bounds of weights) is bound into every signature, so that sites which were told different things go no further. What
a step has decided is in the site's records before it is said.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..codec.common import common_numbers
from ..engines.noise_secret import NoiseSecret
from ..errors import AccessError, PolicyError, RecipeError, SiteError
from ..federation.groups import Groups
from ..federation.messages import SumTask, TrainTask
from ..federation.secure_rounds import config_of, noise_key
from ..identity.certificates import verify_certificate
from ..identity.folder import IdentityFolder
from ..identity.keys import SUM, verify
from ..model.tensors import NamedTensors
from ..privacy.secure_aggregation.masks import Ring
from ..privacy.secure_aggregation.messages import Advert, SecureAggregationError, Session
from ..privacy.secure_aggregation.party import Party
from ..privacy.secure_aggregation.rows import MASKED, Most, RowCode, row_layout
from ..train.start import FROM_THETA
from ..wire import protocol_pb2 as pb
from .gate import KnownJob
from .policy import Policy
from .records import SiteRecords
from .run_files import RunFiles
from .workshop import Work


class SiteSums:
    """One site's part in the secure sums of its runs. It blocks: it reads and writes the records.

    Args:
        folder: the site's.
        identity, policy: of the moment.
    """

    def __init__(
        self, folder: Path, identity: Callable[[], IdentityFolder], policy: Callable[[], Policy], records: SiteRecords
    ) -> None:
        self.folder, self._identity, self._policy, self.records = folder, identity, policy, records

    def answer(self, known: KnownJob, task: pb.Task, body: SumTask) -> dict[str, Any]:
        """What this site says in one step.

        Raises:
            SiteError: the step makes no sense, or somebody does not keep to the protocol.
            AccessError: keys are not those of the sites that they are said to be of, or this site must not go on.
            PolicyError: the sum would be of too few sites.
        """
        if (body.step, body.round, body.site) != (task.kind, task.round, self._identity().holder.name):
            raise SiteError(f"the task {task.id} is not about this site's step {task.kind!r} of round {task.round}")
        with _explained():
            if body.step == "keys":
                self.records.enter_sum(task.run, task.round, body.attempt)
            party = self._party(known, task, body.attempt, body.sites, body.terms)
            match body.step:
                case "keys":
                    return self._keys(party)
                case "shares":
                    adverts = [self._checked(site, said) for site, said in body.said.items()]
                    return {"boxes": {peer: box.hex() for peer, box in party.share(adverts).items()}}
                case "consent":
                    survivors = body.said["survivors"]
                    self._enough(len(survivors))
                    return {"signature": party.consent(survivors).hex()}
            return self._reveal(party, body)

    def _keys(self, party: Party) -> dict[str, Any]:
        advert, certificate = party.advertise(), self._identity().certificate.decode()
        parts = {name: getattr(advert, name).hex() for name in ("channel", "pair", "commitment", "signature")}
        return {**parts, "certificate": certificate}

    def _checked(self, site: str, said: Mapping[str, str]) -> Advert:
        """Keys of a site, whose own signing key is pinned if it is seen for the first time."""
        holder = verify_certificate(said["certificate"].encode(), self._identity().authority, at=time.time())
        if (holder.role, holder.name) != ("site", site):
            raise AccessError(f"the keys of site {site!r} come with the certificate of {holder.role} {holder.name!r}")
        self.records.pin_peer(site, holder.signing_key)
        parts = ("channel", "pair", "commitment", "signature")
        return Advert(site, *(bytes.fromhex(said[part]) for part in parts))

    def _reveal(self, party: Party, body: SumTask) -> dict[str, Any]:
        reveal = party.reveal({site: bytes.fromhex(signature) for site, signature in body.said.items()})
        self.records.open_sum(party.session.run, party.session.round, party.session.attempt)
        kinds = {"own": reveal.own, "pair": reveal.pair}
        return {kind: {peer: share.hex() for peer, share in shares.items()} for kind, shares in kinds.items()}

    def mask(self, known: KnownJob, task: pb.Task, body: TrainTask, work: Work) -> Work:
        """An update as a masked row, without anything that the sum holds.

        Raises:
            SiteError, AccessError, PolicyError: as `answer`; or the task is another than the sum's terms say.
        """
        secure = body.secure
        assert secure is not None
        with _explained():
            terms, sites = secure["terms"], tuple(secure["sites"])
            if (body.lr, dict(body.correction)) != (terms["lr"], terms["correction"]) or body.start != FROM_THETA:
                raise SiteError("the training task is another than what the sites of the secure sum were told")
            party = self._party(known, task, secure["attempt"], sites, terms)
            most = Most(int(terms["most"]["examples"]), int(terms["most"]["label_tokens"]))
            delta = work.channels["delta"]
            numbers = common_numbers(known.recipe, delta.layout, task.round)
            code = RowCode.of(known.recipe, delta.layout, len(sites), most, numbers)
            row: Ring = np.empty(code.length, dtype=np.uint32)
            clipped = code.encode(
                delta,
                examples=work.num_examples,
                label_tokens=work.num_label_tokens,
                loss=work.metrics.get("loss", 0.0),  # private steps tell none
                out=row,
                key=noise_key(code, partial(self._noise_key, task.run), party.site, task.round, delta),
            )
            party.mask({peer: bytes.fromhex(box) for peer, box in secure["boxes"].items()}, row)
        masked = NamedTensors(row_layout(delta.layout, numbers), {torch.int32: torch.from_numpy(row.view(np.int32))})
        metrics = {"seconds": work.metrics["seconds"], **({"clipped": float(clipped)} if clipped else {})}
        return replace(work, channels={MASKED: masked}, num_examples=1, num_label_tokens=0, metrics=metrics)

    def _noise_key(self, run: str, purpose: str) -> bytes:
        secret = NoiseSecret(RunFiles(self.folder, run).folder)
        secret.make()
        return secret.key(purpose)

    def _party(
        self, known: KnownJob, task: pb.Task, attempt: int, sites: tuple[str, ...], terms: Mapping[str, Any]
    ) -> Party:
        """This site in one attempt, as its records know it."""
        session = self._session(known, task, attempt, sites, terms)
        where = (task.run, task.round, attempt)
        state, name = self.records.sum_state(*where), self._identity().holder.name

        def keep(state: bytes) -> None:
            self.records.keep_sum(*where, state)

        if state is not None:
            return Party.restored(state, session, sign=self._sign, verify=self._verify, keep=keep)
        if task.kind != "keys":
            raise SiteError(f"this site has no keys for attempt {attempt} at the sum of round {task.round}")
        return Party(session, name, sign=self._sign, verify=self._verify, keep=keep)

    def _session(
        self, known: KnownJob, task: pb.Task, attempt: int, sites: tuple[str, ...], terms: Mapping[str, Any]
    ) -> Session:
        if not known.secure:
            raise SiteError("the signed job has no secure sums")
        cohort = tuple(terms.get("cohort", sites))
        strangers = {*sites, *cohort} - set(known.job.sites) if known.job.sites else set[str]()
        if strangers:
            raise SiteError(f"the secure sum is of {min(strangers)!r} too, whom the signed job does not name")
        if sites not in Groups.of(known.recipe, cohort, task.round).members:
            raise SiteError("the secure sum is not of the sites that the recipe's seed puts together")
        self._enough(len(sites))
        return Session(task.run, task.round, attempt, sites, config_of(known.digest, task.base, terms))

    def _enough(self, num_sites: int) -> None:
        least = self._policy().min_cohort
        if num_sites < least:
            raise PolicyError(f"min_cohort is {least}; the secure sum would be of {num_sites} sites")

    def _sign(self, message: bytes) -> bytes:
        return self._identity().signing_key.sign(SUM, message)

    def _verify(self, site: str, message: bytes, signature: bytes) -> bool:
        key = self.records.peers().get(site)
        return key is not None and verify(key, SUM, message, signature)


@contextmanager
def _explained() -> Iterator[None]:
    """Whatever is wrong with a message is the coordinator's error, or another site's."""
    try:
        yield
    except RecipeError as error:
        raise SecureAggregationError(error.message) from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SecureAggregationError(f"a message of the secure sum is malformed: {type(error).__name__}") from error
