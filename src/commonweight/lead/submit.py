"""From a recipe to a signed job: what sites must have alike, and the tensors that everyone starts from."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from uuid import uuid4

from ..data.names import require_sites
from ..engines.bench import Bench, build_bench, without_data
from ..engines.handshake import handshake
from ..errors import RecipeError
from ..federation.secure_rounds import check_sums
from ..identity.folder import IdentityFolder
from ..identity.keys import JOB
from ..model.tensors import NamedTensors
from ..recipe.compatibility import secure_sums
from ..recipe.load import check_methods
from ..recipe.resolved import recipe_text
from ..recipe.schema import Recipe
from ..wire.frames import CHUNK_BYTES, Channel, Frame, frame_of, plan_for
from ..wire.protocol_pb2 import Job, SignedJob


@dataclass(frozen=True)
class Prepared:
    """A job that is ready to be submitted.

    Args:
        tensors: the initial global tensors, channel `theta`.
        model: digest of the base weights, as sites' policies name it.
    """

    signed: SignedJob
    tensors: Mapping[str, NamedTensors]
    frame: Frame
    model: str


def networked(recipe: Recipe) -> tuple[Recipe, list[str]]:
    """The recipe as it can be carried out over a network, and a sentence for each thing that is left out."""
    if recipe.federation.clock.runs:
        raise RecipeError(
            "federation.clock is a simulation's: over a network sites are as fast as they are",
            hint="leave federation.clock out, or carry the recipe out by `commonweight run`",
        )
    controls = recipe.evaluation.controls
    if "centralised" not in controls:
        return recipe, []
    evaluation = recipe.evaluation.model_copy(update={"controls": [c for c in controls if c != "centralised"]})
    said = "evaluation.controls: centralised is left out: over a network no one has all the data to pool"
    return recipe.model_copy(update={"evaluation": evaluation}), [said]


def model_bench(recipe: Recipe) -> Bench:
    """The recipe's base model with its adapter, and no data: a lead needs none.

    Raises:
        ModelError, RecipeError: as `build_bench`.
    """
    return build_bench(recipe, gather=without_data)


def prepare(
    recipe: Recipe,
    identity: IdentityFolder,
    *,
    sites: Sequence[str] = (),
    purpose: str = "",
    chunk_bytes: int = CHUNK_BYTES,
    enrolled: int | None = None,
) -> Prepared:
    """Make and sign a job. Whether its updates are summed securely is then no question any more: the job says so.

    Args:
        sites: who may be asked, in the order of folding; none: every site that is enrolled, now or later.
        purpose: what the data are used for; sites' policies list the purposes that they allow.
        enrolled: how many sites are enrolled now, if `sites` names none.

    Raises:
        ModelError, RecipeError: the recipe cannot be carried out.
    """
    check_methods(recipe, network=True)
    if len(set(sites)) != len(sites):
        raise RecipeError("a site is named twice")
    if sites:  # of a run that is open to every site nobody knows the names yet
        require_sites(recipe.training.budget, sites, "training.budget")
        require_sites(recipe.model.adapter.sites, sites, "model.adapter.sites")
        require_sites(recipe.model.adapter.budget, sites, "model.adapter.budget")
        require_sites(recipe.federation.relay_of, sites, "federation.relays")
    recipe = with_sums_decided(recipe, len(sites) or enrolled)
    bench = model_bench(recipe)
    if sites:
        check_sums(recipe, len(sites), bench.theta.layout)
    tensors = {"theta": bench.theta}
    frame = frame_of(tensors, plan_for(bench.theta.layout, (Channel("theta"),), chunk_bytes))
    job = Job(
        id=uuid4().hex,
        name=recipe.name,
        recipe=recipe_text(recipe),
        kind="train",
        purpose=purpose,
        sites=sites,
        must_match={**handshake(bench), **bench.must_match_too},
        initial=frame.header,
        submitted_at=time.time(),
    )
    return Prepared(sign(job, identity), tensors, frame, bench.base_digest)


def with_sums_decided(recipe: Recipe, num_sites: int | None) -> Recipe:
    """The recipe with `privacy.secure_aggregation` on or off, where it is auto.

    Args:
        num_sites: that the run is for; None: nobody knows.

    Raises:
        RecipeError: there would be none, and the recipe's noise counts on them.
    """
    on, why = secure_sums(recipe, num_sites)
    if recipe.privacy.mechanism.at_sites and not on:
        raise RecipeError(
            f"privacy.mechanism {recipe.privacy.mechanism.name} needs secure sums, and there are none: {why}",
            hint="change that, or use mechanism: gaussian, whose noise the coordinator adds",
        )
    decided = {"secure_aggregation": "on" if on else "off"}
    return recipe.model_copy(update={"privacy": recipe.privacy.model_copy(update=decided)})


def sign(job: Job, identity: IdentityFolder) -> SignedJob:
    """A job with its lead's signature."""
    content = job.SerializeToString(deterministic=True)
    return SignedJob(job=content, signature=identity.signing_key.sign(JOB, content), certificate=identity.certificate)
