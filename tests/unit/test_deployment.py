"""The guides and the manifests say what the program takes: commands, options, ports, paths, settings, policies."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from commonweight.cli.main import app
from commonweight.coordinator.folder import hosts_of, init
from commonweight.coordinator.server import serve_http
from commonweight.coordinator.settings import CoordinatorSettings, checked_settings, load_settings, port_of
from commonweight.coordinator.vault import Vault
from commonweight.identity.authority import Authority
from commonweight.identity.keys import SigningKey
from commonweight.site.policy import load_policy
from commonweight.site.settings import load_settings as load_site_settings
from commonweight.site.settings import starter_policy
from tests.unit.command_line import call

ROOT = Path(__file__).parents[2]
MANIFESTS = ROOT / "deploy" / "kubernetes"
PAGES = [ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in ("cli", "coordinator", "site", "deployment"))]

Document = dict[str, Any]


# --- commands in the guides


def commands() -> Iterator[tuple[str, str]]:
    """Every line of the guides that is a command of ours, as (page, command)."""
    for page in PAGES:
        for line in page.read_text(encoding="utf-8").replace("\\\n", " ").split("\n"):
            if line.startswith("    commonweight ") or " -- commonweight " in line:
                text = re.sub(r"\s+#.*| > \S+$", "", line.rpartition(" -- ")[2].strip())
                yield page.name, re.sub(r" > \S+$", "", text.strip())


@pytest.mark.parametrize(("page", "command"), sorted(set(commands())))
def test_a_command_in_a_guide_can_be_typed(page: str, command: str) -> None:
    arguments = shlex.split(command)[1:]
    if "COMMAND" in arguments:
        return  # `commonweight COMMAND [OPTIONS]`, the page's own heading
    assert parsed(arguments)


def parsed(arguments: list[str]) -> str:
    """The command that these arguments are for; fails if it, an option or an argument is not there."""
    command: Any = typer.main.get_command(app)
    name, rest = "commonweight", arguments
    while hasattr(command, "commands"):
        assert rest, name
        assert rest[0] in command.commands, f"{name} {rest[0]}"
        command, name, rest = command.commands[rest[0]], f"{name} {rest[0]}", rest[1:]
    command.make_context(name, list(rest)).close()  # parses, and runs nothing
    return name


def test_the_guides_have_commands() -> None:
    found = {command.split()[1] for _, command in commands()}
    assert {"coordinator", "site", "join", "submit", "watch", "fetch", "sandbox", "audit-log"} <= found


# --- manifests


def documents(name: str) -> list[Document]:
    return list(yaml.safe_load_all((MANIFESTS / name).read_text(encoding="utf-8")))


def one(name: str, kind: str) -> Document:
    (found,) = [d for d in documents(name) if d["kind"] == kind]
    return found


KINDS = {
    "coordinator.yaml": ["ConfigMap", "Deployment", "PodDisruptionBudget", "Service", "Service"],
    "site.yaml": ["ConfigMap", "StatefulSet", "Service", "NetworkPolicy"],
}
VERSIONS = {
    "ConfigMap": "v1",
    "Service": "v1",
    "Deployment": "apps/v1",
    "StatefulSet": "apps/v1",
    "PodDisruptionBudget": "policy/v1",
    "NetworkPolicy": "networking.k8s.io/v1",
}


def workload(name: str) -> Document:
    return one(name, "Deployment" if name == "coordinator.yaml" else "StatefulSet")


@pytest.mark.parametrize("name", KINDS)
def test_a_manifest_has_what_kubernetes_asks_for(name: str) -> None:
    found = documents(name)
    assert sorted(d["kind"] for d in found) == sorted(KINDS[name])
    for document in found:
        assert document["apiVersion"] == VERSIONS[document["kind"]]
        assert re.fullmatch(r"[a-z0-9-]{1,63}", document["metadata"]["name"])
    spec = workload(name)["spec"]
    labels = spec["template"]["metadata"]["labels"]
    assert spec["selector"]["matchLabels"] == labels
    for document in found:
        if document["kind"] in ("Service", "PodDisruptionBudget", "NetworkPolicy"):
            selector = document["spec"].get("selector") or document["spec"]["podSelector"]
            assert selector.get("matchLabels", selector) == labels
    pod = spec["template"]["spec"]
    claims = [claim["metadata"]["name"] for claim in spec.get("volumeClaimTemplates", [])]
    volumes = {volume["name"] for volume in pod["volumes"]} | set(claims)
    assert pod["securityContext"]["runAsNonRoot"]
    for container in (*pod["initContainers"], *pod["containers"]):
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
        assert container["securityContext"]["readOnlyRootFilesystem"]
        assert ":" in container["image"], "an image without a version"
    assert set(KINDS[name]) >= {d["kind"] for d in found}


@pytest.mark.parametrize("name", KINDS)
def test_a_manifests_commands_can_be_typed(name: str) -> None:
    pod = workload(name)["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert (
        parsed(container["args"])
        == {
            "coordinator.yaml": "commonweight coordinator serve",
            "site.yaml": "commonweight site run",
        }[name]
    )
    folder = Path(container["args"][-1])
    mounts = [Path(m["mountPath"]) for m in container["volumeMounts"] if not m.get("readOnly")]
    assert any(folder.is_relative_to(mount) for mount in mounts)
    for script in (i["args"][0] for i in pod["initContainers"]):
        for line in re.findall(r"commonweight (.+)", script):
            assert parsed(shlex.split(line))


def coordinators_settings() -> CoordinatorSettings:
    text = one("coordinator.yaml", "ConfigMap")["data"]["coordinator.yaml"]
    return checked_settings(yaml.safe_load(text), "the ConfigMap")


def test_the_coordinators_ports_agree() -> None:
    settings = coordinators_settings()
    wanted = {
        "services": port_of(settings.listen),
        "enrolment": port_of(settings.listen_enrolment),
        "http": port_of(settings.listen_http),
    }
    spec = workload("coordinator.yaml")["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    assert {port["name"]: port["containerPort"] for port in container["ports"]} == wanted
    services = [d for d in documents("coordinator.yaml") if d["kind"] == "Service"]
    exposed = {port["name"]: (port["port"], port["targetPort"]) for s in services for port in s["spec"]["ports"]}
    assert exposed == {name: (port, name) for name, port in wanted.items()}
    outside = [p["name"] for s in services if s["spec"]["type"] != "ClusterIP" for p in s["spec"]["ports"]]
    assert sorted(outside) == ["enrolment", "services"], "figures stay inside"
    assert (port_of(settings.address), port_of(settings.address_enrolment)) == (wanted["services"], wanted["enrolment"])
    notes = spec["template"]["metadata"]["annotations"]
    assert (notes["prometheus.io/port"], notes["prometheus.io/path"]) == (str(wanted["http"]), "/metrics")
    for probe in ("startupProbe", "readinessProbe"):
        assert container[probe]["httpGet"] == {"path": "/healthz", "port": "http"}
    assert container["livenessProbe"]["tcpSocket"] == {"port": "services"}
    assert (spec["replicas"], one("coordinator.yaml", "PodDisruptionBudget")["spec"]["minAvailable"]) == (2, 1)
    source = (ROOT / "src" / "commonweight" / "coordinator" / "server.py").read_text(encoding="utf-8")
    assert serve_http.__doc__ is not None
    assert '"/healthz"' in source
    assert '"/metrics"' in source


def test_two_replicas_share_their_state() -> None:
    settings = coordinators_settings()
    assert settings.database.startswith("postgresql://")
    assert "://" in settings.blobs
    assert ":" not in settings.database.partition("://")[2].partition("@")[0], "a password in a ConfigMap"
    assert one("coordinator.yaml", "Deployment")["spec"]["template"]["spec"]["containers"][0]["envFrom"]


def script_of(name: str, places: dict[str, Path]) -> str:
    """What a pod's first container does, with folders of the test in place of the pod's."""
    script = str(workload(name)["spec"]["template"]["spec"]["initContainers"][0]["args"][0])
    for mounted, path in places.items():
        script = script.replace(mounted, str(path))
    return script


def test_a_coordinators_pod_puts_its_folder_together(tmp_path: Path) -> None:
    """From the secret that the guide makes, and the ConfigMap."""
    made, secret, config, folder = (tmp_path / name for name in ("fed", "secret", "config", "folder"))
    init(made, CoordinatorSettings(), ["fed.example.org"])
    for place in (secret, config, folder):
        place.mkdir()
    guide = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
    given = re.findall(r"--from-file=fed/(\S+)", guide)
    for name in given:
        (secret / Path(name).name).write_bytes((made / name).read_bytes())
    config_map = one("coordinator.yaml", "ConfigMap")["data"]
    for name, text in config_map.items():
        (config / name).write_text(text)
    script = script_of("coordinator.yaml", {"/var/lib/commonweight": folder, "/secret": secret, "/config": config})
    subprocess.run(["sh", "-euc", script], check=True, timeout=20)
    assert load_settings(folder) == coordinators_settings()
    Vault.open(folder / "master.key")
    made_by = Authority.load(made / "authority").certificate_pem
    assert Authority.load(folder / "authority").certificate_pem == made_by
    assert SigningKey.load(folder / "server" / "signing.key").public
    assert hosts_of(folder) == ["fed.example.org"]
    text = (folder / "coordinator.yaml").read_text()
    (folder / "coordinator.yaml").write_text(re.sub("database: .*", "database: sqlite", text))
    answer = call("coordinator", "enroll", "north", "-d", folder, "--json")
    assert answer.json["address"] == "fed.example.org:8443", answer.err


def test_a_sites_pod_joins_once(tmp_path: Path) -> None:
    config, volume, programs = (tmp_path / name for name in ("config", "volume", "bin"))
    for place in (config, volume, programs):
        place.mkdir()
    for name, text in one("site.yaml", "ConfigMap")["data"].items():
        (config / name).write_text(text)
    stand_in = programs / "commonweight"
    stand_in.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/typed\nmkdir -p "$4/identity"; : > "$4/identity/tls.pem"\n'
    )
    stand_in.chmod(0o755)
    script = script_of("site.yaml", {"/var/lib/commonweight": volume, "/config": config})
    for _ in range(2):
        subprocess.run(["sh", "-euc", script], check=True, timeout=20, env={"PATH": f"{programs}:/usr/bin:/bin"})
    assert (tmp_path / "typed").read_text() == f"site join @/token/token {volume}/site\n"
    settings = load_site_settings(volume / "site")
    assert settings.address == coordinators_settings().address
    rows = list(workload("site.yaml")["spec"]["template"]["spec"]["containers"][0]["volumeMounts"])
    (mounted,) = [mount for mount in rows if mount["name"] == "rows"]
    assert mounted["readOnly"]
    assert Path(settings.data_path()).is_relative_to(mounted["mountPath"])


def test_a_sites_manifest_denies_everything_at_first(tmp_path: Path) -> None:
    (tmp_path / "policy.yaml").write_text(one("site.yaml", "ConfigMap")["data"]["policy.yaml"])
    policy = load_policy(tmp_path)
    (tmp_path / "policy.yaml").write_text(starter_policy())
    assert policy == load_policy(tmp_path)
    assert (policy.models, policy.signers, policy.purposes) == ([], [], [])


def test_a_site_lets_nothing_in_and_two_ports_out() -> None:
    settings = coordinators_settings()
    spec = one("site.yaml", "NetworkPolicy")["spec"]
    assert spec["policyTypes"] == ["Ingress", "Egress"]
    assert spec["ingress"] == []
    out = {port["port"] for rule in spec["egress"] for port in rule["ports"]}
    assert out == {port_of(settings.address), port_of(settings.address_enrolment), 53}
    assert "ports" not in workload("site.yaml")["spec"]["template"]["spec"]["containers"][0]


def test_the_guides_tables_of_metrics_settings_and_policies_are_whole() -> None:
    """They are generated (scripts/write_docs.py); this says that they are not empty."""
    guide = (ROOT / "docs" / "coordinator.md").read_text(encoding="utf-8")
    for name in CoordinatorSettings.model_fields:
        assert f"| `{name}` |" in guide
    assert "| `commonweight_round_seconds` | histogram |" in guide
    site = (ROOT / "docs" / "site.md").read_text(encoding="utf-8")
    assert starter_policy().strip() in site
    for name in ("models", "min_cohort", "privacy.max_epsilon", "share.samples", "data.path", "keep.runs"):
        assert f"| `{name}` |" in site
