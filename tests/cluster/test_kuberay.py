"""The manifests: what Kubernetes and KubeRay know, and that they agree with each other and with the settings they pass on.

KubeRay's own schema is too large to keep. This one holds the fields that are used, and no others: a misspelt one fails.
"""

from __future__ import annotations

import copy
import re
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from jsonschema import Draft202012Validator

from cortex_core.errors import ConfigError, DataError
from pipelines.config import SIDECARS_FOLDER, RunConfig, load_config
from pipelines.sweep_plan import plan

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "cluster" / "kuberay"
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
PINS = dict(re.findall(r"^(\S+)==(\S+)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE))
Document = dict[str, Any]
Files = dict[str, list[Document]]


def of(*required: str, **fields: Any) -> Document:
    """A mapping with these fields and no others; without `required`, all of them may be left out."""
    return {"type": "object", "properties": fields, "required": list(required), "additionalProperties": False}


def each(item: Document) -> Document:
    return {"type": "array", "items": item, "minItems": 1}


TEXT, COUNT = {"type": "string", "minLength": 1}, {"type": "integer", "minimum": 0}
TEXTS = {"type": "object", "additionalProperties": TEXT}
NAME = {"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"}
PORT = {"anyOf": [{"type": "integer", "minimum": 1, "maximum": 65535}, {"type": "string", "pattern": "[a-z]"}]}
QUANTITY = {"anyOf": [{"type": "string", "pattern": r"^\d+(\.\d+)?(m|[KMGT]i?)?$"}, COUNT]}
RESOURCES = {"type": "object", "additionalProperties": QUANTITY, "required": ["cpu", "memory"]}
SECRET_KEY = of("name", "key", name=NAME, key=TEXT, optional={"type": "boolean"})
VARIABLE = of("name", name=TEXT, value=TEXT, valueFrom=of("secretKeyRef", secretKeyRef=SECRET_KEY))
PROBE = of(
    "httpGet", httpGet=of("path", "port", path={"type": "string", "pattern": "^/"}, port=PORT),
    initialDelaySeconds=COUNT, periodSeconds=COUNT, timeoutSeconds=COUNT, failureThreshold=COUNT,
)  # fmt: skip
CONTAINER = of(
    "name", "image", "resources", "readinessProbe", "livenessProbe", name=NAME, image=TEXT, command=each(TEXT),
    args=each(TEXT), env=each(VARIABLE), ports=each(of("containerPort", name=NAME, containerPort=PORT)),
    startupProbe=PROBE, readinessProbe=PROBE, livenessProbe=PROBE,
    resources=of("requests", "limits", requests=RESOURCES, limits=RESOURCES),
    volumeMounts=each(of("name", "mountPath", name=NAME, mountPath={"type": "string", "pattern": "^/"})),
)  # fmt: skip
VOLUME = of(
    "name", name=NAME, persistentVolumeClaim=of("claimName", claimName=NAME),
    emptyDir=of(medium={"const": "Memory"}, sizeLimit=QUANTITY),
)  # fmt: skip
POD = of(
    "spec", metadata=of(labels=TEXTS),
    spec=of(
        "containers", "securityContext", containers=each(CONTAINER), volumes=each(VOLUME),
        securityContext=of(
            "runAsNonRoot", runAsNonRoot={"const": True}, fsGroup=COUNT, fsGroupChangePolicy={"const": "OnRootMismatch"}
        ),
        tolerations=each(of("key", key=TEXT, operator={"const": "Exists"}, effect={"const": "NoSchedule"})),
    ),
)  # fmt: skip
CLAIM = of(
    "accessModes", "resources", storageClassName=NAME, accessModes=each({"enum": ["ReadWriteOnce", "ReadWriteMany"]}),
    resources=of("requests", requests=of("storage", storage=QUANTITY)),
)  # fmt: skip
SERVICE = of("selector", "ports", selector=TEXTS, ports=each(of("port", name=NAME, port=PORT, targetPort=PORT)))
DEPLOYMENT = of(
    "selector", "template", replicas=COUNT, strategy=of("type", type={"enum": ["Recreate", "RollingUpdate"]}),
    selector=of("matchLabels", matchLabels=TEXTS), template=POD,
)  # fmt: skip
CLUSTER = of(
    "headGroupSpec", "workerGroupSpecs", "rayVersion", "authOptions", "enableInTreeAutoscaling",
    rayVersion={"type": "string", "pattern": r"^\d+\.\d+\.\d+$"}, enableInTreeAutoscaling={"const": True},
    authOptions=of("mode", "secretName", mode={"const": "token"}, secretName=NAME),
    autoscalerOptions=of(idleTimeoutSeconds=COUNT),
    headGroupSpec=of("rayStartParams", "template", rayStartParams=TEXTS, template=POD),
    workerGroupSpecs=each(of(
        "groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template", groupName=NAME,
        replicas=COUNT, minReplicas=COUNT, maxReplicas=COUNT, rayStartParams=TEXTS, template=POD,
    )),
)  # fmt: skip
JOB = of(
    "clusterSelector", "entrypoint", clusterSelector=of("ray.io/cluster", **{"ray.io/cluster": NAME}), entrypoint=TEXT
)
KINDS = {
    ("v1", "PersistentVolumeClaim"): CLAIM,
    ("v1", "Service"): SERVICE,
    ("apps/v1", "Deployment"): DEPLOYMENT,
    ("ray.io/v1", "RayCluster"): CLUSTER,
    ("ray.io/v1", "RayJob"): JOB,
}


def load() -> Files:
    return {path.name: list(yaml.safe_load_all(path.read_text())) for path in sorted(FOLDER.glob("*.yaml"))}


def problems(files: Files) -> list[str]:
    """A line for everything that is wrong with the manifests, alone or together."""
    documents = [document for file in files.values() for document in file]
    unknown = [line for document in documents for line in against_schema(document)]
    return unknown or [*about_pods(documents), *about_secrets(documents), *about_jobs(documents)]


def against_schema(document: Document) -> Iterator[str]:
    spec = KINDS.get((document.get("apiVersion", ""), document.get("kind", "")))
    if spec is None:
        yield f"{document.get('apiVersion')} {document.get('kind')}: not a kind that is used here"
        return
    whole = of(
        "apiVersion", "kind", "metadata", "spec", apiVersion=TEXT, kind=TEXT, metadata=of("name", name=NAME), spec=spec
    )
    for error in Draft202012Validator(whole).iter_errors(document):
        yield f"{document['kind']} {'.'.join(map(str, error.absolute_path))}: {error.message}"


def named(documents: list[Document], kind: str) -> dict[str, Document]:
    return {document["metadata"]["name"]: document["spec"] for document in documents if document["kind"] == kind}


def pods(documents: list[Document]) -> Iterator[Document]:
    for spec in named(documents, "Deployment").values():
        yield spec["template"]["spec"]
    for spec in named(documents, "RayCluster").values():
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            yield group["template"]["spec"]


def about_pods(documents: list[Document]) -> Iterator[str]:
    claims = named(documents, "PersistentVolumeClaim")
    for pod in pods(documents):
        volumes = {volume["name"]: volume for volume in pod.get("volumes", [])}
        for container in pod["containers"]:
            if container["image"].rpartition("/")[2] != f"cortex:{VERSION}":
                yield f"image {container['image']}: is not of version {VERSION}"
            for mount in container.get("volumeMounts", []):
                if mount["name"] not in volumes:
                    yield f"volumeMount {mount['name']}: no such volume"
        for name in filter(None, (v.get("persistentVolumeClaim", {}).get("claimName") for v in volumes.values())):
            if name not in claims:
                yield f"claim {name}: no such PersistentVolumeClaim"
    for spec in named(documents, "RayCluster").values():
        if spec["rayVersion"] != PINS["ray"]:
            yield f"rayVersion {spec['rayVersion']}: constraints.txt has {PINS['ray']}"
        if spec["headGroupSpec"]["rayStartParams"].get("num-cpus") != "0":
            yield "head: workers may be placed on it"
        for group in spec["workerGroupSpecs"]:
            if not group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]:
                yield f"group {group['groupName']}: replicas are not between minReplicas and maxReplicas"


def about_secrets(documents: list[Document]) -> Iterator[str]:
    for pod in pods(documents):
        for variable in (variable for container in pod["containers"] for variable in container.get("env", [])):
            if re.search("TOKEN|SECRET|PASSWORD|KEY", variable["name"]) and "value" in variable:
                yield f"variable {variable['name']}: a secret stands in the file"


def about_jobs(documents: list[Document]) -> Iterator[str]:
    clusters = named(documents, "RayCluster")
    for name, job in named(documents, "RayJob").items():
        cluster = clusters.get(job["clusterSelector"]["ray.io/cluster"])
        if cluster is None:
            yield f"{name}: selects no RayCluster that is here"
            continue
        try:
            config = settings(job["entrypoint"])
        except (ConfigError, DataError, ValueError) as error:
            yield f"{name}: {error}"
            continue
        yield from (
            f"{name}: {line}" for line in (*about_room(config, cluster), *about_places(config, cluster, documents))
        )


def settings(entrypoint: str) -> RunConfig:
    """What `python -m pipelines.COMMAND RECIPE-STUDY-OR-RUN KEY=VALUE ...` runs with."""
    python, module_option, module, what, *overrides = entrypoint.split()
    if (python, module_option) != ("python", "-m") or module not in (
        "pipelines.train",
        "pipelines.tune",
        "pipelines.sleep",
    ):
        raise ValueError(f"{entrypoint[:40]}: not a command of this project")
    if module == "pipelines.sleep":
        return load_config(None, [f"sidecars={what}/{SIDECARS_FOLDER}", *overrides])
    return plan(what, overrides).config if module == "pipelines.tune" else load_config(what, overrides)


def about_room(config: RunConfig, cluster: Document) -> Iterator[str]:
    """The workers that the settings ask for fit into the worker groups."""
    needed, room, at_once = config.cluster, 0, 0
    for group in cluster["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        fit = int(number(limits["cpu"]) / needed.cpus_per_worker)
        if needed.use_gpu:
            fit = min(fit, int(limits.get("nvidia.com/gpu", 0)))
        room, at_once = room + fit * group["maxReplicas"], at_once + fit * group["minReplicas"]
    if room < needed.num_workers:
        yield f"cluster.num_workers = {needed.num_workers}: the worker groups have room for {room}"
    if at_once < needed.num_workers and not needed.autoscaling:
        yield "cluster.autoscaling = false: the workers' nodes are not there beforehand"


def number(cpu: str | int) -> float:
    text = str(cpu)
    return float(text[:-1]) / 1000 if text.endswith("m") else float(text)


def about_places(config: RunConfig, cluster: Document, documents: list[Document]) -> Iterator[str]:
    """Runs go to the volume that head and workers share, metrics to a service that is there."""
    claims = {
        claim for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]) for claim in holds(group, config)
    }
    spec = named(documents, "PersistentVolumeClaim").get(next(iter(claims)) or "", {}) if len(claims) == 1 else {}
    if "ReadWriteMany" not in spec.get("accessModes", ()):
        yield f"out_dir = {config.out_dir}: is not on one volume that head and workers share"
    address = urlsplit(config.tracking.uri or "")
    service = named(documents, "Service").get(address.hostname or "", {"ports": [], "selector": {}})
    (port,) = [p for p in service["ports"] if p["port"] == address.port] or [None]
    if port is None:
        yield f"tracking.uri = {config.tracking.uri}: no such service"
        return
    for server in named(documents, "Deployment").values():
        (container,) = server["template"]["spec"]["containers"]
        labels = server["template"]["metadata"]["labels"]
        if labels != server["selector"]["matchLabels"] or not service["selector"].items() <= labels.items():
            yield f"service {address.hostname}: selects no pod"
        if port["targetPort"] not in {p["name"] for p in container["ports"]}:
            yield f"service {address.hostname}: its target port does not exist"
        (hosts,) = (a.partition("=")[2].split(",") for a in container["args"] if a.startswith("--allowed-hosts="))
        if address.netloc not in hosts:
            yield f"tracking.uri = {config.tracking.uri}: MLflow does not answer to {address.netloc}"


def holds(group: Document, config: RunConfig) -> Iterator[str | None]:
    """The claim that `out_dir` lies on, in the pods of this group."""
    pod = group["template"]["spec"]
    claims = {v["name"]: v.get("persistentVolumeClaim", {}).get("claimName") for v in pod.get("volumes", [])}
    mounts = {m["mountPath"]: claims.get(m["name"]) for m in pod["containers"][0].get("volumeMounts", [])}
    yield next((claim for path, claim in mounts.items() if Path(config.out_dir).is_relative_to(path)), None)


def test_the_manifests_are_right_alone_and_together() -> None:
    files = load()
    assert {"storage.yaml", "mlflow.yaml", RAY, TRAIN, TUNE, SLEEP} == set(files)
    assert problems(files) == []
    train, sleep = (settings(files[name][0]["spec"]["entrypoint"]) for name in (TRAIN, SLEEP))
    assert sleep.sidecars == str(train.run_dir / SIDECARS_FOLDER) and sleep.run_dir != train.run_dir


def at(document: Document, path: str) -> tuple[Any, str | int]:
    *parts, last = [int(part) if part.isdecimal() else part for part in path.split("/")]
    for part in parts:
        document = document[part]
    return document, last


def put(file: str, index: int, path: str, value: object) -> Callable[[Files], None]:
    def change(files: Files) -> None:
        inside, key = at(files[file][index], path)
        inside[key] = value

    return change


def drop(file: str, index: int, path: str) -> Callable[[Files], None]:
    def change(files: Files) -> None:
        inside, key = at(files[file][index], path)
        del inside[key]

    return change


def say(file: str, old: str, new: str) -> Callable[[Files], None]:
    def change(files: Files) -> None:
        spec = files[file][0]["spec"]
        assert old in spec["entrypoint"]
        spec["entrypoint"] = spec["entrypoint"].replace(old, new)

    return change


HEAD, GPU = "spec/headGroupSpec/template/spec", "spec/workerGroupSpecs/0/template/spec"
RAY, TRAIN, TUNE, SLEEP = "raycluster.yaml", "rayjob-train.yaml", "rayjob-tune.yaml", "rayjob-sleep.yaml"


@pytest.mark.parametrize(
    ("broken", "line"),
    [
        (put("storage.yaml", 0, "apiVersion", "v2"), "v2 PersistentVolumeClaim: not a kind"),
        (put("storage.yaml", 0, "spec/acessModes", ["ReadWriteMany"]), "'acessModes' was unexpected"),
        (put("storage.yaml", 0, "metadata/name", "Cortex_Shared"), "metadata.name: 'Cortex_Shared' does not match"),
        (put("storage.yaml", 0, "metadata/name", "other"), "claim cortex-shared: no such PersistentVolumeClaim"),
        (put("storage.yaml", 0, "spec/accessModes", ["ReadWriteOnce"]), "cortex-train: out_dir = /shared/runs: is not on one"),
        (drop("storage.yaml", 0, "spec/resources"), "'resources' is a required property"),
        (put("mlflow.yaml", 1, "metadata/name", "tracking"), "tracking.uri = http://mlflow:5000: no such service"),
        (put("mlflow.yaml", 1, "spec/ports/0/port", 80), "tracking.uri = http://mlflow:5000: no such service"),
        (put("mlflow.yaml", 1, "spec/ports/0/targetPort", "web"), "service mlflow: its target port does not exist"),
        (put("mlflow.yaml", 1, "spec/selector/app", "flow"), "service mlflow: selects no pod"),
        (put("mlflow.yaml", 2, "spec/template/spec/containers/0/args", ["--allowed-hosts=localhost:*"]),
         "MLflow does not answer to mlflow:5000"),
        (drop("mlflow.yaml", 2, "spec/template/spec/containers/0/livenessProbe"), "'livenessProbe' is a required property"),
        (put(RAY, 0, "spec/rayVersion", "2.59.0"), "rayVersion 2.59.0: constraints.txt has"),
        (put(RAY, 0, "spec/rayversion", "2.60.0"), "'rayversion' was unexpected"),
        (put(RAY, 0, "spec/authOptions/mode", "disabled"), "'token' was expected"),
        (drop(RAY, 0, "spec/authOptions"), "'authOptions' is a required property"),
        (drop(RAY, 0, "spec/workerGroupSpecs/0/minReplicas"), "'minReplicas' is a required property"),
        (put(RAY, 0, "spec/workerGroupSpecs/0/minReplicas", "0"), "'0' is not of type 'integer'"),
        (put(RAY, 0, "spec/workerGroupSpecs/0/replica", 1), "'replica' was unexpected"),
        (put(RAY, 0, "spec/workerGroupSpecs/0/replicas", 9), "group gpu: replicas are not between"),
        (put(RAY, 0, "spec/workerGroupSpecs/0/maxReplicas", 1), "cortex-train: cluster.num_workers = 2: the worker groups have room for 1"),
        (put(RAY, 0, f"{GPU}/containers/0/image", "cortex:latest"), "image cortex:latest: is not of version"),
        (put(RAY, 0, f"{GPU}/containers/0/resources/limits", {"cpu": "8", "memory": "32Gi"}), "num_workers = 2: the worker groups have room for 0"),
        (put(RAY, 0, f"{GPU}/containers/0/resources/limits/cpu", "500m"), "cortex-tune: cluster.num_workers = 1: the worker groups have room for 0"),
        (put(RAY, 0, f"{GPU}/volumes/0/name", "runs"), "volumeMount shared: no such volume"),
        (put(RAY, 0, f"{GPU}/volumes/0/persistentVolumeClaim/claimName", "mlflow"), "out_dir = /shared/runs: is not on one volume"),
        (put(RAY, 0, f"{GPU}/containers/0/volumeMounts/0/mountPath", "/data"), "out_dir = /shared/runs: is not on one volume"),
        (put(RAY, 0, f"{HEAD}/containers/0/env/1", {"name": "HF_TOKEN", "value": "hf_x"}), "variable HF_TOKEN: a secret stands"),
        (put(RAY, 0, f"{HEAD}/securityContext/runAsNonRoot", False), "True was expected"),
        (put(RAY, 0, "spec/headGroupSpec/rayStartParams", {}), "head: workers may be placed on it"),
        (put(RAY, 0, "metadata/name", "other"), "cortex-train: selects no RayCluster"),
        (put(TRAIN, 0, "spec/backoffLimit", 2), "'backoffLimit' was unexpected"),
        (say(TRAIN, " demo ", " dmeo "), "cortex-train: dmeo: no such recipe"),
        (say(TRAIN, "num_workers=2", "num_wokers=2"), "cluster.num_wokers: unknown key"),
        (say(TRAIN, "num_workers=2", "num_workers=3"), "cortex-train: training.batch_size = 16"),
        (say(TRAIN, "/shared/runs", "/tmp/runs"), "out_dir = /tmp/runs: is not on one volume"),
        (say(TRAIN, "cluster.autoscaling=true", ""), "cluster.autoscaling = false"),
        (say(TRAIN, "pipelines.train", "pipelines.trian"), "not a command of this project"),
        (say(TUNE, " fast_weights ", " fastweights "), "cortex-tune: fastweights: no such study"),
        (say(TUNE, "mlflow:5000", "mlflow:5001"), "tracking.uri = http://mlflow:5001: no such service"),
    ],
)  # fmt: skip
def test_a_broken_copy_is_noticed(broken: Callable[[Files], None], line: str) -> None:
    files = copy.deepcopy(load())
    broken(files)
    assert [problem for problem in problems(files) if line in problem], problems(files)
