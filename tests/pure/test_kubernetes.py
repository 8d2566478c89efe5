"""The Kubernetes manifests: each fits the published schemas, strictly, and what it names is there.

Without a server nothing checks the values that the schemas leave open: enumerations, quantities, the syntax of labels.
"""

from __future__ import annotations

import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import typer
import yaml

from fleet import config
from fleet.cli.app import app
from tests.pages.pages import ROOT, blocks_for

FOLDER = Path(__file__).resolve().parents[2] / "deploy" / "kubernetes"
FILES = sorted({*FOLDER.glob("*.yaml")} - {FOLDER / "kustomization.yaml"})  # kustomize's own file has no schema there
ALL = {(d["kind"], d["metadata"]["name"]): d for file in FILES for d in yaml.safe_load_all(file.read_text())}
OLDEST = "1.27"  # has all the fields that are used

WORKER, ORCHESTRATOR = ALL["StatefulSet", "worker"]["spec"], ALL["Deployment", "orchestrator"]["spec"]
PODS = {"worker": WORKER["template"], "orchestrator": ORCHESTRATOR["template"], "client": ALL["Pod", "client"]}
CONTAINERS = {name: pod["spec"]["containers"][0] for name, pod in PODS.items()}
PORTS = {n: {p["name"]: p["containerPort"] for p in c.get("ports", [])} for n, c in CONTAINERS.items()}


def selected(selector: Any) -> list[str]:
    labels = selector.get("matchLabels", selector)
    return [name for name, pod in PODS.items() if labels.items() <= pod["metadata"]["labels"].items()]


def lets_through(policy: str, way: str, peer: str, port: int) -> bool:
    return any(
        any(peer in selected(other["podSelector"]) for other in rule.get(way, []) if "podSelector" in other)
        and any(opened["port"] <= port <= opened.get("endPort", opened["port"]) for opened in rule["ports"])
        for rule in ALL["NetworkPolicy", policy]["spec"].get({"from": "ingress", "to": "egress"}[way], [])
    )


def set_environment(pod: str, patch: pytest.MonkeyPatch) -> None:
    for name in ("ORCHESTRATOR_ADDR", "WORKER_PORT", "FLEET_SHM_DIR", "FLEET_SHARED_MEMORY", "FLEET_DRAIN_S"):
        patch.delenv(name, raising=False)
    for entry in CONTAINERS[pod]["env"]:
        patch.setenv(entry["name"], entry.get("value", "set by the cluster"))


def test_kustomize_takes_every_file_but_the_examples() -> None:
    kustomization = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
    assert {file.name for file in FILES} == {*kustomization["resources"], "autoscale.yaml", "client.yaml"}
    assert {i["name"] for i in kustomization["images"]} == {c["image"].split(":")[0] for c in CONTAINERS.values()}


@pytest.mark.parametrize("version", [OLDEST, kubernetes_validate.latest_version()])
@pytest.mark.parametrize("name", ALL, ids="-".join)
def test_a_manifest_fits_the_schema(name: tuple[str, str], version: str) -> None:
    kubernetes_validate.validate(ALL[name], version, strict=True)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda spec: spec.update(podManagmentPolicy="Parallel"), "podManagmentPolicy"),
        (lambda spec: spec["template"]["spec"]["containers"][0].update(readinesProbe={}), "readinesProbe"),
        (lambda spec: spec.update(replicas="three"), "'three' is not of type"),
        (lambda spec: spec.pop("selector"), "'selector' is a required property"),
    ],
)
def test_a_mistake_is_refused(change: Any, complaint: str) -> None:
    wrong = deepcopy(ALL["StatefulSet", "worker"])
    change(wrong["spec"])
    with pytest.raises(kubernetes_validate.ValidationError, match=complaint):
        kubernetes_validate.validate(wrong, OLDEST, strict=True)


def test_what_is_selected_has_the_name_of_what_selects() -> None:
    selectors = {key: d["spec"].get("selector", d["spec"].get("podSelector")) for key, d in ALL.items() if "spec" in d}
    assert {key: selected(found) for key, found in selectors.items() if found} == {
        (kind, name): [name]
        for (kind, name) in ALL
        if kind not in ("Namespace", "Pod", "PersistentVolumeClaim", "HorizontalPodAutoscaler")
    }
    assert ALL["Service", WORKER["serviceName"]]["spec"]["clusterIP"] == "None"
    assert (WORKER["podManagementPolicy"], ORCHESTRATOR["strategy"]["type"]) == ("Parallel", "Recreate")
    target = ALL["HorizontalPodAutoscaler", "worker"]["spec"]["scaleTargetRef"]
    assert ALL[target["kind"], target["name"]]["apiVersion"] == target["apiVersion"]


def test_the_network_lets_through_what_fleet_needs() -> None:
    bus, data = config.ORCHESTRATOR_PORT, config.WORKER_PORT
    assert all(lets_through("orchestrator", "from", peer, bus) for peer in ("worker", "client"))
    assert lets_through("worker", "to", "orchestrator", bus)
    scripts = (int(port) for port in PODS["worker"]["spec"]["securityContext"]["sysctls"][0]["value"].split())
    assert all(lets_through("worker", way, "worker", port) for way in ("from", "to") for port in (data, *scripts))
    assert not lets_through("worker", "from", "client", data)
    assert not lets_through("orchestrator", "to", "worker", data)


@pytest.mark.parametrize("pod", ["worker", "orchestrator"])
def test_ports_and_commands_are_fleets(pod: str, monkeypatch: pytest.MonkeyPatch) -> None:
    set_environment(pod, monkeypatch)
    assert [p["port"] for p in ALL["Service", pod]["spec"]["ports"]] == list(PORTS[pod].values())
    assert all(p["targetPort"] == p["name"] and p["name"] in PORTS[pod] for p in ALL["Service", pod]["spec"]["ports"])
    assert all(CONTAINERS[pod][f"{probe}Probe"]["httpGet"]["port"] in PORTS[pod] for probe in ("startup", "liveness"))
    assert str(PORTS[pod]["http"]) == PODS[pod]["metadata"]["annotations"]["prometheus.io/port"]
    assert PORTS[pod]["http"] == config.metrics_port()
    assert CONTAINERS[pod]["readinessProbe"]["exec"]["command"] == ["fleet-healthy"]  # which test_health.py tries
    for name, *arguments in (CONTAINERS[pod]["args"],):
        typer.main.get_command(app).commands[name].make_context(name, arguments)  # raises on what it does not know


def test_a_worker_reads_what_the_manifest_means(monkeypatch: pytest.MonkeyPatch) -> None:
    set_environment("worker", monkeypatch)
    assert (
        config.orchestrator_address() == config.DEFAULT_ORCHESTRATOR == f"orchestrator:{PORTS['orchestrator']['bus']}"
    )
    assert config.worker_port() == config.WORKER_PORT == PORTS["worker"]["data"]
    assert config.drain_s() + 10 <= PODS["worker"]["spec"]["terminationGracePeriodSeconds"]
    assert {"name": "shm", "mountPath": str(config.shared_memory())} in CONTAINERS["worker"]["volumeMounts"]
    assert {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "1Gi"}} in PODS["worker"]["spec"]["volumes"]


@pytest.mark.parametrize("pod", PODS)
def test_volumes_are_there_and_a_pod_has_no_right_that_it_does_not_need(pod: str) -> None:
    """Rights: what the Pod Security Standard `restricted` asks for, which the namespace enforces."""
    spec, container = PODS[pod]["spec"], CONTAINERS[pod]
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert set(mounts.values()) == set(volumes)
    assert "/tmp" in mounts  # the root file system is read-only
    (file,) = [Path(entry["value"]) for entry in container["env"] if entry["name"] == "FLEET_SECRET_FILE"]
    assert volumes[mounts[str(file.parent)]]["secret"]["defaultMode"] & 0o222 == 0
    assert spec["securityContext"].items() >= {"runAsNonRoot": True, "runAsUser": 10001, "fsGroup": 10001}.items()
    assert spec["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault"
    rights = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
    assert container["securityContext"] == rights


def test_the_commands_of_the_page_name_what_is_there() -> None:
    """They are not typed: the only cluster that a test could reach would be somebody's own."""
    commands = [command for block in blocks_for("kubernetes") for command in block.commands]
    assert len(commands) > 8
    kinds = {"statefulset": "StatefulSet", "deployment": "Deployment", "pod": "Pod"}
    for command in commands:
        for path in re.findall(r"deploy/kubernetes\S*", command):
            assert (ROOT / path).exists(), command
        named = re.findall(r"\b(statefulset|deployment|pod)[/ ](\w+)", command)
        assert all((kinds[kind], name) in ALL for kind, name in named), command
        assert "-n fleet" in command or " apply " in command, command
    (made,) = [command for command in commands if "create secret" in command]
    assert "generic fleet --from-file=secret=" in made
    volumes = [volume for pod in PODS.values() for volume in pod["spec"]["volumes"] if "secret" in volume]
    assert {volume["secret"]["secretName"] for volume in volumes} == {"fleet"}
    assert {volume["secret"]["defaultMode"] for volume in volumes} == {0o440}  # fleet refuses one that others may read
