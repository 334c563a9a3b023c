"""A whole federation of processes, over TLS: the bits of a run on one machine where there are rounds, and nothing left
behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from commonweight.errors import DataError, RecipeError, RoundError
from commonweight.launch import run
from commonweight.lead.submit import with_sums_decided
from commonweight.recipe import Recipe
from commonweight.recipe.resolved import recipe_text
from commonweight.sandbox import Sandbox, partitioned, site_names
from commonweight.site.policy import load_policy
from commonweight.site.records import SiteRecords
from tests.conftest import SITES
from tests.unit.command_line import call

MakeRecipe = Callable[..., Recipe]
#: variants whose updates are summed securely: without being told to where a sum is enough, and three sites take part
SECURE = ("fedavg", "ffa-lora", "rolora", "ditto", "interpolation", "grouped-median", "small-down-sums", "small-sums")
FEDBUFF = {"rounds": 4, "strategy": {"name": "fedbuff", "buffer": 2}}
EVALUATION = {"controls": ["base"], "samples": 1, "max_new_tokens": 4}


def test_a_federation_gives_the_bits_of_one_machine(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """FedAvg; SCAFFOLD, with private state at the sites; a cohort that is a part of the sites; LoRA's halves frozen for
    good (the frozen one is never sent) or in turn; strategies that need each update by itself; clusters, which sites
    choose or are put into; parts and models that stay at the sites, of which each site has the very adapter that a run
    on one machine gives it."""
    variants: dict[str, dict[str, Any]] = {
        "fedavg": {},
        "scaffold": {"strategy": "scaffold"},
        "partial": {"cohort": 2, "strategy": "fedadam"},
        "ffa-lora": {"strategy": "ffa-lora"},
        "rolora": {"strategy": "rolora"},
        "centered-clipping": {"strategy": {"name": "centered-clipping", "f": 1, "mixing": "nearest"}},
        "flexlora": {"strategy": "flexlora"},
        "ifca": {"strategy": {"name": "ifca", "warm_up": 1, "rows": 8}},
        "similarity": {"cohort": 2, "strategy": {"name": "similarity", "warm_up": 1}},
        "fedsa-lora": {"strategy": "fedsa-lora", "cohort": 2},
        "ditto": {"strategy": "ditto"},
        "interpolation": {"strategy": "interpolation"},
    }
    recipes = {name: make_recipe(name=name, federation=f, evaluation=EVALUATION) for name, f in variants.items()}
    with sandbox(recipes["fedavg"], tmp_path) as federation:
        for name, one in recipes.items():
            same_bits(federation, name, one, tmp_path)
            if name in ("fedsa-lora", "ditto", "interpolation"):
                sites_keep_their_own(federation, name, tmp_path)


def test_other_kinds_of_updates_have_the_bits_of_one_machine(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """Updates and downloads that a codec made small, updates of sites that send a part of the adapter, and of groups
    that are summed securely each. Then what has no bits to compare: private steps, versions without rounds, a run that
    a person approves, and a site that is killed."""
    plain = make_recipe(name="fedavg", evaluation=EVALUATION)
    adapter = {"r": 4, "sites": {"south": {"r": 3, "alpha": 5, "layers": [1]}}, "budget": {"west": 0.5}}
    small = {"shorten": {"name": "top-k", "keep": 0.2}, "round": {"name": "uniform", "bits": 4}, "pack": "huffman"}
    drawn = {"shorten": {"name": "random-k", "keep": 0.3}, "round": "nf4", "error_feedback": False}
    variants: dict[str, dict[str, Any]] = {
        "small": {"compression": small, "federation": {"cohort": 2}},
        "small-scaffold": {"compression": "auto", "federation": {"strategy": "scaffold"}},
        "small-median": {"compression": drawn, "federation": {"strategy": "median"}},
        "grouped-median": {
            "privacy": {"secure_aggregation": "on", "secure_group_size": 3},
            "federation": {"strategy": "median"},
        },
        "small-down": {"compression": {"down": small}, "federation": {"cohort": 2, "strategy": "fedadam", "rounds": 4}},
        "small-down-sums": {"compression": {"down": "auto"}},
        "small-sums": {"compression": {"shorten": "random-k"}, "privacy": {"secure_aggregation": "on"}},
        "parts": {"model": {"name": plain.model.name, "adapter": adapter}, "federation": {"strategy": "hetlora"}},
    }
    with sandbox(plain, tmp_path) as federation:
        for name, sections in variants.items():
            model = same_bits(federation, name, make_recipe(name=name, evaluation=EVALUATION, **sections), tmp_path)
        private_examples(federation, make_recipe, tmp_path)
        noise_of_the_sites(federation, make_recipe, tmp_path)
        no_rounds(federation, make_recipe(name="fedbuff", federation=FEDBUFF, evaluation=EVALUATION), tmp_path)
        policy = load_policy(tmp_path / "federation" / "sites" / "north")
        assert policy.models == [model]
        assert policy.signers != ["any"]
        a_person_approves(federation, plain, model, tmp_path)

        victim = federation._sites[0].process
        victim.kill()
        victim.wait()
        with pytest.raises(RoundError, match="site-north has ended, with code -9") as error:
            federation.check()
        assert "task.done" in error.value.hint, "the end of its log"
        processes = [part.process.pid for part in (*federation._sites, *federation._coordinator)]
    assert not any(psutil.pid_exists(pid) for pid in processes)


def sandbox(recipe: Recipe, folder: Path) -> Sandbox:
    same, names, left_out = partitioned(recipe, 3)
    assert (same, list(names.values()), left_out) == (recipe, list(SITES), [])
    return Sandbox(folder / "federation", recipe, names)


def same_bits(federation: Sandbox, name: str, recipe: Recipe, folder: Path) -> str:
    """A run in the federation and one on this machine have the same results; returns the digest of their base model."""
    heard: list[str] = []
    found = federation.carry_out(recipe, folder / name, lambda event, _: heard.append(event))
    expected = run(with_sums_decided(recipe, len(SITES)), folder / f"{name}-here")
    assert found["privacy"]["secure_sums"] == (name in SECURE)
    assert found["adapter"]["digest"] == expected["adapter"]["digest"], name
    for key in ("arms", "samples", "gains", "clusters"):
        assert without_seconds(found.get(key)) == without_seconds(expected.get(key)), (name, key)
    assert heard.count("round_committed") == recipe.federation.rounds
    for way in ("bytes_up", *(["bytes_down"] if name != "parts" else [])):  # a part is cut at the site from the whole
        assert [one[way] for one in found["rounds"]] == [one[way] for one in expected["rounds"]], (name, way)
    fetched, here = (adapters(folder / place) for place in (name, f"{name}-here"))
    assert len(here) == (1 + len(expected["clusters"]["found"]) if "clusters" in expected else 1)
    assert fetched == here, name
    return str(expected["model"]["digest"])


def private_examples(federation: Sandbox, make_recipe: MakeRecipe, folder: Path) -> None:
    """Each site makes its steps private, tells no loss on its rows, and pays for what it sends."""
    privacy = {"dp": "example", "clip": 0.5, "delta": 1e-3, "noise_multiplier": 8.0}
    found = federation.carry_out(
        make_recipe(name="private", privacy=privacy, evaluation=EVALUATION), folder / "private", lambda *_: None
    )
    assert {site: told["count"] for site, told in found["privacy"]["sites"].items()} == {
        "north": 10,
        "south": 8,
        "west": 4,
    }
    assert {one["train_loss"] for one in found["rounds"]} == {None}
    for site, (examples, steps) in {"north": (20, 5), "south": (14, 4), "west": (8, 2)}.items():
        at_site = folder / "federation" / "sites" / site
        (spends,) = [spend for _, spend in SiteRecords(at_site / "state.sqlite").spends() if spend.unit == "example"]
        assert (spends.sampling, spends.count) == (4 / examples, 2 * steps)
        assert not list(at_site.glob("runs/*/noise.key"))


def noise_of_the_sites(federation: Sandbox, make_recipe: MakeRecipe, folder: Path) -> None:
    """Each site adds noise of its own, within sums that are secure without being told to, and pays for it."""
    noise = {"noise_multiplier": 0.3, "mechanism": "distributed-discrete"}
    privacy = {"dp": "site", "clip": 0.5, "delta": 1e-3, **noise}
    recipe = make_recipe(name="noisy", privacy=privacy, federation={"weighting": "uniform"}, evaluation=EVALUATION)
    found = federation.carry_out(recipe, folder / "noisy", lambda *_: None)
    told = found["privacy"]
    assert (told["mechanism"], told["secure_sums"], told["releases"]) == ("distributed-discrete", True, 2)
    assert {one["train_loss"] for one in found["rounds"]} == {None}
    for site in SITES:
        at_site = folder / "federation" / "sites" / site
        spends = [s for _, s in SiteRecords(at_site / "state.sqlite").spends() if s.mechanism == "distributed-discrete"]
        assert [(spend.noise_multiplier, spend.count) for spend in spends] == [(0.3, 2)]
        assert not list(at_site.glob("runs/*/noise.key"))


def no_rounds(federation: Sandbox, recipe: Recipe, folder: Path) -> None:
    """An asynchronous run, from end to end: each version of two sites' updates, in the order in which they came."""
    heard: list[str] = []
    found = federation.carry_out(recipe, folder / "fedbuff", lambda event, _: heard.append(event))
    assert heard.count("round_committed") == 4
    updates = [update for version in found["rounds"] for update in version["updates"]]
    assert len(updates) == len({(update["site"], update["version"]) for update in updates}) == 8
    for number, version in enumerate(found["rounds"]):
        assert sorted(u["site"] for u in version["updates"]) == sorted(version["answered"])
        assert [u["staleness"] for u in version["updates"]] == [number - u["version"] for u in version["updates"]]
    assert sum(found["arrivals"]["shares"].values()) == pytest.approx(1.0)
    assert found["arms"]["federated"]["macro_loss"] < found["arms"]["base"]["macro_loss"]
    assert "versions behind on average" in (folder / "fedbuff" / "report.html").read_text(encoding="utf-8")


def adapters(run: Path) -> dict[str, bytes]:
    """A result's adapters, by their places."""
    files = [*run.glob("adapter/*.safetensors"), *run.glob("clusters/*/*.safetensors")]
    return {str(file.relative_to(run)): file.read_bytes() for file in files}


def test_relays_give_the_bits_of_one_machine(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """Two regions; then a relay is killed, and its sites send to the coordinator."""
    federation = {"relays": {"lowland": ["west"], "upland": ["north", "south"]}, "strategy": "fednova"}
    recipe = make_recipe(federation=federation, evaluation={**EVALUATION, "samples": 0})
    recipe, names, _ = partitioned(recipe, 3)
    with Sandbox(tmp_path / "federation", recipe, names) as at_work:
        found = at_work.carry_out(recipe, tmp_path / "there")
        expected = run(recipe, tmp_path / "here")
        assert found["adapter"]["digest"] == expected["adapter"]["digest"]
        assert found["bytes"] == expected["bytes"]
        site = at_work.folder / "sites" / "north"
        went = [row["to"] for row in call("site", "audit", site, "--json").json["rows"] if row["what"] == "update"]
        assert [to.startswith("relay upland (") for to in went] == [True, False] * 2  # and a manifest, which asks

        upland = next(part for part in at_work._relays if part.name == "relay-upland")
        at_work._relays.remove(upland)
        upland.process.kill()
        upland.process.wait()
        shorter = recipe.model_copy(update={"federation": recipe.federation.model_copy(update={"patience_s": 1.0})})
        without = at_work.carry_out(shorter, tmp_path / "without")
        flat = make_recipe(federation={**federation, "relays": {"lowland": ["west"]}}, evaluation={"samples": 0})
        assert without["adapter"]["digest"] == run(flat, tmp_path / "flat")["adapter"]["digest"]


def sites_keep_their_own(federation: Sandbox, run: str, folder: Path) -> None:
    own = set()
    for site in SITES:
        there, here = folder / f"{run}-{site}", folder / f"{run}-{site}-here"
        kept = call("site", "export", federation.folder / "sites" / site, run, there, "--json")
        assert kept.code == 0, kept.err
        assert call("export", folder / f"{run}-here", here, "--site", site).code == 0
        tensors = [(path / "adapter_model.safetensors").read_bytes() for path in (there, here)]
        assert tensors[0] == tensors[1], (run, site)
        own.add(tensors[0])
    assert len(own) > 1
    elsewhere = call("export", folder / run, folder / "x", "--site", "north")
    assert (elsewhere.code, "it is not here" in elsewhere.err) == (6, True)


def a_person_approves(federation: Sandbox, recipe: Recipe, model: str, folder: Path) -> None:
    """What the guides tell a lead and a site's engineer to type, in the federation at work."""
    me, north = ("--identity", federation.lead), federation.folder / "sites" / "north"
    policy = north / "policy.yaml"
    policy.write_text(policy.read_text().replace("approval: none", "approval: every-run"))
    (folder / "recipe.yaml").write_text(recipe_text(recipe))
    options = ("--purpose", "sandbox", "--site", "west", "--site", "north", "--set", "federation.rounds=1")
    submitted = call("submit", folder / "recipe.yaml", *options, *me)
    assert submitted.code == 0, submitted.err
    assert f"base model, for sites' policies: {model}\n" in submitted.out
    run = re.findall(r"commonweight watch (\w+)$", submitted.out, re.M)[0]
    while not (asked := call("site", "pending", north, "--json").json["pending"]):
        time.sleep(0.2)
    assert asked[0]["run"].startswith(run)
    assert call("site", "status", north, "--json").json["running"]
    again = call("site", "run", north)
    assert (again.code, "another process runs the site in" in again.err) == (6, True)
    assert call("site", "approve", north, run).code == 0
    watched = call("watch", run, *me)
    assert watched.code == 0, watched.err
    assert "site north has joined\n" in watched.out
    fetched = call("fetch", run, "-o", folder / "fetched", *me)
    assert "Together (federated)" in fetched.out, fetched.err
    assert call("chat", folder / "fetched", "-p", "what helps", "--max-new-tokens", 2).code == 0
    assert call("export", folder / "fetched", folder / "exported").code == 0
    what = [row["what"] for row in call("site", "audit", north, "--run", run, "--all", "--json").json["rows"]]
    assert what.index("approved") < what.index("facts") < what.index("update")
    refused = call("submit", folder / "recipe.yaml", "--purpose", "fun", "--site", "north", "--watch", *me)
    assert (refused.code, "the job's purpose is 'fun'" in refused.err) == (5, True)


def without_seconds(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_seconds(item) for key, item in value.items() if key != "seconds"}
    return [without_seconds(item) for item in value] if isinstance(value, list) else value


def test_the_command(make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = make_recipe(
        data={"sites": {"by": "site", "only": ["west"]}},
        federation={"rounds": 1},
        evaluation={"controls": ["base", "centralised"], "samples": 0},
    )
    (tmp_path / "recipe.yaml").write_text(recipe_text(recipe))
    answer = call("sandbox", "recipe.yaml", "--sites", 1, "--keep")
    assert answer.code == 0, answer.err
    assert answer.err == (
        "evaluation.controls: centralised is left out: over a network no one has all the data to pool\n"
    )
    assert re.search(r"^sites taking part: 1; [\d,]+ trainable parameters$", answer.out, re.M)
    assert "adapter  runs/small/adapter\n" in answer.out
    assert answer.out.endswith("kept     runs/small/.sandbox\n")
    assert call("runs", "--json").json["runs"][0]["round"] == 1
    site = tmp_path / "runs" / "small" / ".sandbox" / "sites" / "west"
    audit = call("site", "audit", site, "--verify", "--json").json
    assert [row["what"] for row in audit["rows"] if row["what"] == "facts"] == ["facts"]
    assert audit["verified"]
    assert call("site", "status", site, "--json").json["runs"][0]["state"] in ("joined", "ended")
    assert not call("site", "status", site, "--json").json["running"]


def test_ctrl_c_stops_everything(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe(data={"sites": {"by": "site", "only": ["north"]}}, federation={"rounds": 1000})
    (tmp_path / "recipe.yaml").write_text(recipe_text(recipe))
    command = [sys.executable, "-m", "commonweight", "sandbox", "recipe.yaml"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("round 1: held-out loss"):
            break
    parts = psutil.Process(process.pid).children(recursive=True)
    assert len(parts) == 2, "the coordinator and one site"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    found = re.fullmatch(r"interrupted\n  everything was stopped; the logs are in (\S+)\n", err)
    assert found, err
    assert sorted(path.name for path in Path(found[1]).iterdir()) == ["coordinator.log", "site-north.log"]
    ends = time.monotonic() + 10
    while any(part.is_running() for part in parts) and time.monotonic() < ends:
        time.sleep(0.1)
    assert not any(part.is_running() for part in parts)


# --- before anything starts


def test_the_number_of_sites(make_recipe: MakeRecipe) -> None:
    assert list(partitioned(make_recipe())[1].values()) == list(SITES)
    with pytest.raises(RecipeError, match=r"--sites 5, but the recipe's data fall to 3 sites: north, south, west"):
        partitioned(make_recipe(), 5)
    counted = make_recipe(data={"sites": {"scheme": "iid", "count": 2}})
    recipe, names, _ = partitioned(counted, 4)
    assert recipe.data.sites.count == 4
    assert len(names) == 4
    with pytest.raises(DataError):
        partitioned(counted, 400)


def test_what_a_recipe_says_of_a_site_is_said_of_it_under_the_name_by_which_it_enrols(
    make_recipe: MakeRecipe, small_data: Path, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(small_data.read_text().replace('"site": "north"', '"site": "St. Mary\'s, North"'))
    adapter = {"r": 4, "sites": {"St. Mary's, North": {"r": 2}, "elsewhere": {"r": 1}}, "budget": {"south": 0.5}}
    recipe = make_recipe(
        data={"path": str(rows)},
        model={"name": make_recipe().model.name, "adapter": adapter},
        training={"budget": {"St. Mary's, North": 0.5, "west": 0.25}},
        federation={"strategy": "flexlora"},
    )
    recipe, names, _ = partitioned(recipe)
    assert names == {"south": "south", "st.-marys-north": "St. Mary's, North", "west": "west"}
    assert recipe.model.adapter.shaped == ("st.-marys-north", "elsewhere", "south")
    assert recipe.training.budget == {"st.-marys-north": 0.5, "west": 0.25}


def test_a_hubs_rows_are_no_sites_rows(make_recipe: MakeRecipe) -> None:
    with pytest.raises(RecipeError, match="there is no somebody/some-rows"):
        partitioned(make_recipe(data={"path": "somebody/some-rows"}))


def test_names_of_sites() -> None:
    parts = ["St. Mary's Hospital", "north", "North", "NORTH", "…", "Łódź 7", "x" * 80, "x" * 79]
    names = site_names(parts)
    assert names == [
        *("st.-marys-hospital", "north", "north-2", "north-3", "site", "d-7", "x" * 56, "x" * 56 + "-2"),
    ]
