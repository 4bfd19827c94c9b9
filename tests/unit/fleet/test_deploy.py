"""The deploy files are valid, their references hold, and their commands are commands of this version.

Ray's own schema checks the launcher's file. The schema of RayCluster here has the fields of KubeRay's API reference that the manifest
uses; kustomize and docker do not run here, so their rules that matter are applied by hand.
"""

import json
import re
import shlex
import tomllib
from copy import deepcopy
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.sources import ROOT
from tiered_kv.cluster.commands import cli
from tiered_kv.config import parse_size

DEPLOY = ROOT / "cluster" / "deploy"
KUSTOMIZE = DEPLOY / "kustomize"
EXAMPLE = KUSTOMIZE / "example"

NAME = {"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"}
QUANTITY = {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?(m|[KMGT]i?)?$"}
RESOURCES = {"type": "object", "additionalProperties": QUANTITY, "required": ["cpu", "memory"]}


def record(required: dict[str, Any], **optional: Any) -> dict[str, Any]:
    """Returns the schema of an object with these fields and no others."""
    return {"type": "object", "properties": required | optional, "required": list(required), "additionalProperties": False}


HOOK = record({"exec": record({"command": {"type": "array", "items": {"type": "string"}, "minItems": 1}})})
SOURCE = record({"fieldRef": record({"fieldPath": {"type": "string"}})})
CONTAINER = record(
    {
        "name": NAME,
        "image": {"type": "string", "minLength": 1},
        "resources": record({"requests": RESOURCES, "limits": RESOURCES}),
        "volumeMounts": {"type": "array", "items": record({"name": NAME, "mountPath": {"type": "string", "pattern": "^/"}})},
    },
    ports={"type": "array", "items": record({"containerPort": {"type": "integer", "minimum": 1, "maximum": 65535}, "name": NAME})},
    env={"type": "array", "items": record({"name": {"type": "string"}}, value={"type": "string"}, valueFrom=SOURCE)},
    lifecycle=record({}, postStart=HOOK, preStop=HOOK),
)
VOLUME = record({"name": NAME, "emptyDir": record({}, medium={"enum": ["", "Memory"]}, sizeLimit=QUANTITY)})
POD = record(
    {"containers": {"type": "array", "items": CONTAINER, "minItems": 1}, "volumes": {"type": "array", "items": VOLUME}},
    terminationGracePeriodSeconds={"type": "integer", "minimum": 0},
)
PARAMETERS = {"type": "object", "additionalProperties": {"type": "string"}}  # numbers must be quoted
TEMPLATE = record({"spec": POD})
WHOLE = {"type": "integer", "minimum": 0}
GROUP = record(
    {"groupName": NAME, "replicas": WHOLE, "minReplicas": WHOLE, "maxReplicas": WHOLE, "rayStartParams": PARAMETERS, "template": TEMPLATE}
)
RAY_CLUSTER = record(
    {
        "apiVersion": {"const": "ray.io/v1"},
        "kind": {"const": "RayCluster"},
        "metadata": record({"name": NAME}, namespace=NAME),
        "spec": record(
            {
                "rayVersion": {"type": "string", "pattern": r"^\d+\.\d+\.\d+$"},
                "headGroupSpec": record({"rayStartParams": PARAMETERS, "template": TEMPLATE}),
                "workerGroupSpecs": {"type": "array", "items": GROUP, "minItems": 1},
            },
            authOptions=record({"mode": {"enum": ["token", "disabled"]}}),
        ),
    }
)
KUSTOMIZATION = record(
    {
        "apiVersion": {"const": "kustomize.config.k8s.io/v1beta1"},
        "kind": {"const": "Kustomization"},
        "resources": {"type": "array", "items": {"type": "string"}, "minItems": 1},
    },
    namespace=NAME,
    images={"type": "array", "items": record({"name": {"type": "string"}}, newName={"type": "string"}, newTag={"type": "string"})},
    patches={
        "type": "array",
        "items": record(
            {"path": {"type": "string"}}, target=record({}, group={}, version={}, kind={"type": "string"}, name={"type": "string"})
        ),
    },
)
PATCH = {"type": "array", "items": record({"op": {"enum": ["replace"]}, "path": {"type": "string", "pattern": "^/"}, "value": {}})}


def loaded(path: Path, schema: dict[str, Any]) -> Any:
    document = yaml.safe_load(path.read_text())
    jsonschema.validate(document, schema)
    return document


def patched(document: Any, operations: list[dict[str, Any]]) -> Any:
    """Apply a JSON patch of replacements (RFC 6902). Asserts that each path exists, as the RFC demands."""
    document = deepcopy(document)
    for operation in operations:
        *places, last = [int(part) if part.isdigit() else part for part in operation["path"].split("/")[1:]]
        at = document
        for place in places:
            at = at[place]
        assert last in at if isinstance(at, dict) else last < len(at), operation["path"]
        at[last] = operation["value"]
    return document


def base() -> Any:
    [name] = loaded(KUSTOMIZE / "kustomization.yaml", KUSTOMIZATION)["resources"]
    return loaded(KUSTOMIZE / name, RAY_CLUSTER)


def example() -> Any:
    """Returns the RayCluster that the example overlay makes of the base."""
    overlay = loaded(EXAMPLE / "kustomization.yaml", KUSTOMIZATION)
    assert [(EXAMPLE / place).resolve() for place in overlay["resources"]] == [KUSTOMIZE]
    found = base()
    assert {image["name"] for image in overlay["images"]} == {
        container["image"] for spec in pods(found).values() for container in spec["containers"]
    }
    for patch in overlay["patches"]:
        target = patch["target"]
        assert (f"{target['group']}/{target['version']}", target["kind"], target["name"]) == (
            *(found["apiVersion"], found["kind"], found["metadata"]["name"]),
        )
        found = patched(found, loaded(EXAMPLE / patch["path"], PATCH))
    found["metadata"]["namespace"] = overlay["namespace"]
    jsonschema.validate(found, RAY_CLUSTER)
    return found


def pods(manifest: Any) -> dict[str, Any]:
    """Returns the pod specs of a RayCluster by group."""
    groups = {group["groupName"]: group["template"]["spec"] for group in manifest["spec"]["workerGroupSpecs"]}
    return {"head": manifest["spec"]["headGroupSpec"]["template"]["spec"]} | groups


def commands_in(text: str) -> list[list[str]]:
    """Returns the arguments of each `tiered-kv` command in a shell text. Variables are replaced by values that fit."""
    values = {"POD_IP": "10.0.0.7", "FQ_RAY_IP": "head.svc", "TIERED_KV_HOST": "8GiB", "TIERED_KV_DISK": "1GiB:/x", "HEAD": "10.0.0.5"}
    text = re.sub(r"\$\{?(\w+)\}?", lambda found: values.get(found[1], "value"), text.replace("\\\n", " "))
    found = []
    for line in text.splitlines():
        for command in re.findall(r"(?:^|[\s`(/])tiered-kv ((?:[^;`#&>|)\n]|\((?!\s))+)", line):
            found.append(shlex.split(command))
    return found


def check_commands(text: str, least: int) -> None:
    found = commands_in(text)
    assert len(found) >= least, found
    for arguments in found:
        try:
            options = cli.parser().parse_args(arguments)
        except SystemExit:
            pytest.fail(f"no command of this version: {arguments}")
        if options.command == "up":
            cli._config(options)


@pytest.mark.parametrize("make", [base, example])
def test_the_ray_cluster_is_valid_and_its_references_hold(make) -> None:
    manifest = make()
    for spec in pods(manifest).values():
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        for container in spec["containers"]:
            mounted = {mount["mountPath"]: volumes[mount["name"]]["emptyDir"] for mount in container["volumeMounts"]}
            assert mounted["/dev/shm"]["medium"] == "Memory"
            assert container["resources"]["requests"] == container["resources"]["limits"]
    for group in manifest["spec"]["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def hooks(manifest: Any) -> str:
    """Returns the shell commands of all lifecycle hooks."""
    containers = [container for spec in pods(manifest).values() for container in spec["containers"]]
    return "\n".join(hook["exec"]["command"][-1] for container in containers for hook in container.get("lifecycle", {}).values())


@pytest.mark.parametrize("make", [base, example])
def test_the_commands_in_the_ray_cluster_fit_it(make) -> None:
    manifest = make()
    check_commands(hooks(manifest), 2)
    [up] = [arguments for arguments in commands_in(hooks(manifest)) if arguments[0] == "up"]
    resource = cli.parser().parse_args(up).nodes_with
    [group] = manifest["spec"]["workerGroupSpecs"]
    assert json.loads(json.loads(group["rayStartParams"]["resources"].strip("'"))) == {resource: 1}
    head = manifest["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    env = {each["name"]: each["value"] for each in head["env"]}
    assert set(re.findall(r"\$(TIERED_KV_\w+)", hooks(manifest))) <= set(env)
    shm = next(volume["emptyDir"]["sizeLimit"] for volume in group["template"]["spec"]["volumes"] if volume["name"] == "shared-memory")
    needed = parse_size(env["TIERED_KV_HOST"], "host") + int(group["rayStartParams"]["object-store-memory"])
    memory = group["template"]["spec"]["containers"][0]["resources"]["limits"]["memory"]
    assert needed <= parse_size(shm + "B", "shm") < parse_size(memory + "B", "memory")
    disk, _, folder = env["TIERED_KV_DISK"].partition(":")
    [volume] = [volume["emptyDir"] for volume in group["template"]["spec"]["volumes"] if volume["name"] == "disk"]
    assert parse_size(disk, "disk") <= parse_size(volume["sizeLimit"] + "B", "disk")
    assert folder in {mount["mountPath"] for mount in group["template"]["spec"]["containers"][0]["volumeMounts"]}


def test_the_ray_version_is_the_pinned_one() -> None:
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line and line[0] != "#")
    assert base()["spec"]["rayVersion"] == pins["ray"]


def test_a_wrong_manifest_is_found() -> None:
    for path, value in {"/spec/workerGroupSpecs/0/rayStartParams/num-cpus": 4, "/spec/rayVersion": 2.6, "/kind": "RayJob"}.items():
        manifest = base()
        manifest["spec"]["workerGroupSpecs"][0]["rayStartParams"]["num-cpus"] = "1"
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(patched(manifest, [{"op": "replace", "path": path, "value": value}]), RAY_CLUSTER)


def test_the_launchers_file_is_valid_for_ray() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    text = (DEPLOY / "ray-cluster.yaml").read_text()
    config = prepare_config(yaml.safe_load(text))
    validate_config(config)
    commands = "\n".join([*config["head_start_ray_commands"], *config["worker_start_ray_commands"]])
    assert commands.count("RAY_AUTH_MODE=token") == 2
    assert "--autoscaling-config" in config["head_start_ray_commands"][-1]
    resources = re.search(r"--resources='(.*?)'", config["worker_start_ray_commands"][-1])
    assert resources is not None
    assert json.loads(resources[1]) == {"tiered_kv": 1}
    check_commands(re.sub(r"(?m)^#\s*", "", text).replace("HEAD:", "10.0.0.5:"), 1)
    with pytest.raises(jsonschema.ValidationError):
        validate_config(config | {"min_workers": "two"})


def test_the_dockerfile_copies_what_is_there_and_uses_its_arguments() -> None:
    text = re.sub(r"\\\n\s*", " ", (DEPLOY / "Dockerfile").read_text())
    lines = [line.split(None, 1) for line in text.splitlines() if line.strip() and not line.startswith("#")]
    known = {"ARG", "FROM", "RUN", "USER", "WORKDIR", "ENV", "COPY", "CMD"}
    assert {instruction for instruction, _ in lines} <= known
    arguments = {value.partition("=")[0]: value.partition("=")[2] for instruction, value in lines if instruction == "ARG"}
    assert all(f"${{{name}" in text for name in arguments), "an argument that nothing uses"
    sources = [part for instruction, value in lines if instruction == "COPY" for part in value.split()[:-1] if not part.startswith("--")]
    assert all((ROOT / source).exists() for source in sources)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(arguments["EXTRAS"].split(",")) <= set(extras)
    assert set(re.findall(r"EXTRAS=([\w,]+)", (DEPLOY / "Dockerfile").read_text())[0].split(",")) <= set(extras)
    assert [value for instruction, value in lines if instruction == "USER"] == ["ray"], "not as root"


def test_the_commands_on_the_deployment_page_are_commands_of_this_version() -> None:
    blocks = re.findall(r"```\n(.*?)```", (ROOT / "docs" / "deployment.md").read_text(), re.S)
    check_commands("\n".join(block for block in blocks if "error (" not in block), 8)
