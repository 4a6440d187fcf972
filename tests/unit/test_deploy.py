"""deploy/ and serve_config.yaml: what Serve, Ray and Kubernetes would take, and what the code expects of them.

Ray's own schemas let misspelt keys through, and KubeRay's definitions are not part of this repository, so the fields
that its API reference (kuberay docs/reference/api.md, ray.io/v1, read in November 2026) names are written down here.
"""

import json
import shlex
from pathlib import Path

import jsonschema
import pytest
import ray.autoscaler
import yaml
from pydantic import BaseModel
from ray.serve.schema import ServeDeploySchema

from raysys.cli import build_parser
from raysys.serve import deployments, models
from raysys.serve.app import AppArgs
from raysys.serve.keys import FILE_VARIABLE
from raysys.serve.settings import FAST_SETTINGS

ROOT = Path(__file__).parents[2]
NAMES = ("Ingress", "Retrieval", "Ranking", "Ingestion")


def read(name: str) -> dict:
    return yaml.safe_load((ROOT / name).read_text())


def of_kuberay() -> dict:
    return yaml.safe_load(read("deploy/kuberay/rayservice.yaml")["spec"]["serveConfigV2"])


CONFIGS = {
    "serve_config.yaml": lambda: read("serve_config.yaml"),
    "serve_config.gpu.yaml": lambda: read("deploy/serve_config.gpu.yaml"),
    "rayservice.yaml": of_kuberay,
}


def unknown_keys(given: dict, parsed, where: str = "") -> list[str]:
    """Keys of a config that Serve's models do not have: they pass its check and do nothing."""
    fields, found = type(parsed).model_fields, []
    for name, value in given.items():
        if name not in fields:
            found.append(f"{where}{name}")
            continue
        below = getattr(parsed, name)
        if isinstance(value, dict) and isinstance(below, BaseModel):
            found += unknown_keys(value, below, f"{where}{name}.")
        elif isinstance(value, list) and below and isinstance(below[0], BaseModel):
            found += [key for one, model in zip(value, below, strict=True) for key in unknown_keys(one, model, f"{where}{name}.")]
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_serve_takes_the_config(name):
    config = CONFIGS[name]()
    parsed = ServeDeploySchema.model_validate(config)
    assert unknown_keys(config, parsed) == []
    (application,) = config["applications"]
    assert application["import_path"] == "raysys.serve.app:build"
    args = AppArgs(**(application["args"] or {}))
    wanted = [name for name in NAMES if args.placement == "apart" or name not in ("Retrieval", "Ranking")]
    assert [deployment["name"] for deployment in application["deployments"]] == wanted
    assert all(hasattr(deployments, deployment["name"]) for deployment in application["deployments"])


def test_a_misspelt_key_would_be_found():
    """The check above can fail, where Serve's own does not."""
    config = read("serve_config.yaml")
    config["applications"][0]["deployments"][1]["autoscaling_confg"] = {}
    config["http_options"]["prot"] = 8000
    found = unknown_keys(config, ServeDeploySchema.model_validate(config))
    assert found == ["http_options.prot", "applications.deployments.autoscaling_confg"]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_deployment_scales_within_bounds_and_queues_are_bounded(name):
    for deployment in CONFIGS[name]()["applications"][0]["deployments"]:
        scaling = deployment["autoscaling_config"]
        assert 1 <= scaling["min_replicas"] <= scaling["max_replicas"] <= 64
        assert 0 < scaling["target_ongoing_requests"] < deployment["max_ongoing_requests"]


def test_gpu_config_puts_the_models_on_gpus_and_nothing_else():
    for name in ("serve_config.gpu.yaml", "rayservice.yaml"):
        (application,) = CONFIGS[name]()["applications"]
        gpus = {one["name"]: one.get("ray_actor_options", {}).get("num_gpus", 0) for one in application["deployments"]}
        assert {name for name, share in gpus.items() if share} == {"Retrieval", "Ranking"}
        assert gpus["Retrieval"] + gpus["Ranking"] == 1, "a pair shares a GPU"
        assert application["args"]["device"] == "auto"


def test_cuda_without_a_gpu_is_an_error_that_says_what_to_do():
    import torch

    from raysys.errors import ConfigError

    if torch.cuda.is_available():
        assert models.device_of("auto") == models.device_of("cuda") == "cuda"
        return
    assert models.device_of("auto") == models.device_of("cpu") == "cpu"
    with pytest.raises(ConfigError, match="num_gpus"):
        models.device_of("cuda")


def test_launcher_config_against_the_schema_that_ray_installs():
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    cluster = read("cluster.yaml")
    jsonschema.validate(cluster, schema)
    assert set(cluster) <= set(schema["properties"]), "a key that no version of the launcher knows"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**cluster, "max_workers": "many"}, schema)


def closed(required: list[str] | None = None, **fields: dict) -> dict:
    return {"type": "object", "additionalProperties": False, "properties": fields, "required": required or []}


TEXT, WHOLE, FLAG = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
TEXTS = {"type": "object", "additionalProperties": TEXT}  # rayStartParams are texts, numbers too
REFERENCE = closed(["secretKeyRef"], secretKeyRef=closed(["name", "key"], name=TEXT, key=TEXT))
CONTAINER = closed(
    ["name", "image", "resources"],
    name=TEXT,
    image=TEXT,
    env={"type": "array", "items": closed(["name"], name=TEXT, value=TEXT, valueFrom=REFERENCE)},
    volumeMounts={"type": "array", "items": closed(["name", "mountPath"], name=TEXT, mountPath=TEXT, readOnly=FLAG)},
    ports={"type": "array", "items": closed(["containerPort"], name={"type": "string", "maxLength": 15}, containerPort=WHOLE)},
    resources=closed(["requests", "limits"], requests=TEXTS, limits=TEXTS),
)
POD = closed(
    ["spec"],
    spec=closed(
        ["containers"],
        containers={"type": "array", "minItems": 1, "items": CONTAINER},
        volumes={"type": "array", "items": closed(["name"], name=TEXT, secret=closed(["secretName"], secretName=TEXT))},
        tolerations={"type": "array", "items": closed(key=TEXT, operator={"enum": ["Exists", "Equal"]}, effect={"enum": ["NoSchedule"]})},
    ),
)
CLUSTER = closed(
    ["headGroupSpec", "rayVersion"],
    rayVersion=TEXT,
    enableInTreeAutoscaling=FLAG,
    autoscalerOptions=closed(
        version={"enum": ["v1", "v2"]}, idleTimeoutSeconds=WHOLE, upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]}
    ),
    headGroupSpec=closed(["rayStartParams", "template"], rayStartParams=TEXTS, template=POD),
    workerGroupSpecs={
        "type": "array",
        "items": closed(
            ["groupName", "template", "minReplicas", "maxReplicas"],
            groupName=TEXT,
            replicas=WHOLE,
            minReplicas=WHOLE,
            maxReplicas=WHOLE,
            rayStartParams=TEXTS,
            template=POD,
        ),
    },
)


def resource(kind: str, spec: dict) -> dict:
    return closed(
        ["apiVersion", "kind", "metadata", "spec"],
        apiVersion={"const": "ray.io/v1"},
        kind={"const": kind},
        metadata=closed(["name"], name={"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 50}),
        spec=spec,
    )


RESOURCES = {
    "rayservice.yaml": resource(
        "RayService",
        closed(
            ["serveConfigV2", "rayClusterConfig"],
            serveConfigV2=TEXT,
            rayClusterConfig=CLUSTER,
            upgradeStrategy=closed(["type"], type={"enum": ["NewCluster", "None"]}),
        ),
    ),
    "rayjob.yaml": resource(
        "RayJob",
        closed(
            ["entrypoint", "rayClusterSpec"],
            entrypoint=TEXT,
            rayClusterSpec=CLUSTER,
            shutdownAfterJobFinishes=FLAG,
            ttlSecondsAfterFinished=WHOLE,
            backoffLimit=WHOLE,
        ),
    ),
}


@pytest.mark.parametrize("name", RESOURCES)
def test_kuberay_knows_every_field(name):
    given = read(f"deploy/kuberay/{name}")
    jsonschema.validate(given, RESOURCES[name])
    cluster = given["spec"].get("rayClusterConfig") or given["spec"]["rayClusterSpec"]
    assert cluster["rayVersion"] == ray.__version__
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        volumes = {volume["name"] for volume in pod.get("volumes", [])}
        assert {mount["name"] for container in pod["containers"] for mount in container.get("volumeMounts", [])} <= volumes
    misspelt = json.loads(json.dumps(given))
    misspelt["spec"]["rayClusterConfig" if name == "rayservice.yaml" else "rayClusterSpec"]["headGroupSpecs"] = {}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(misspelt, RESOURCES[name])


def test_pods_of_the_service_have_the_fast_settings_the_secrets_and_one_store():
    cluster = read("deploy/kuberay/rayservice.yaml")["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        env = {one["name"]: one.get("value") for one in container["env"]}
        assert FAST_SETTINGS.items() <= env.items()
        assert env["RAYSYS_EVENTS"].startswith("redis://") and env["RAYSYS_STATE"].startswith("redis://"), "a folder of one pod is no store"
        assert env[FILE_VARIABLE].startswith(container["volumeMounts"][0]["mountPath"]) and env["RAYSYS_USER_KEY"] is None
        metrics = next(port["containerPort"] for port in container["ports"] if port["name"] == "metrics")
        assert group["rayStartParams"]["metrics-export-port"] == str(metrics)


def test_some_pod_has_room_for_every_replica():
    cluster = read("deploy/kuberay/rayservice.yaml")["spec"]["rayClusterConfig"]
    limits = [group["template"]["spec"]["containers"][0]["resources"]["limits"] for group in cluster["workerGroupSpecs"]]
    for deployment in of_kuberay()["applications"][0]["deployments"]:
        needs = deployment["ray_actor_options"]
        assert any(
            float(limit["cpu"]) >= needs["num_cpus"] and float(limit.get("nvidia.com/gpu", 0)) >= needs.get("num_gpus", 0)
            for limit in limits
        )


def test_the_job_is_a_command_that_exists():
    words = shlex.split(read("deploy/kuberay/rayjob.yaml")["spec"]["entrypoint"])
    assert words[0] == "python" and words[1].endswith("jobs/pipeline.py")
    parsed = build_parser().parse_args(["pipeline", *words[2:]])
    assert parsed.registry == "s3://CHANGE-ME/raysys/registry"


def test_prometheus_reads_the_rules_and_the_list_that_ray_writes():
    config = read("deploy/prometheus/prometheus.yaml")
    assert [(ROOT / "deploy/prometheus" / name).is_file() for name in config["rule_files"]] == [True]
    jobs = {job["job_name"]: job for job in config["scrape_configs"]}
    from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE

    assert jobs["ray"]["file_sd_configs"] == [{"files": [f"/tmp/ray/{PROMETHEUS_SERVICE_DISCOVERY_FILE}"]}]


def test_the_road_of_another_device_gives_the_same_answer(planted_bundle):
    """`cpu:0` is the same processor by another name, so the tensors move as they would to a GPU."""
    import numpy as np

    from raysys.bundle import Bundle
    from raysys.pipeline import Pipeline
    from raysys.queries import Queries

    queries = Queries.from_lists([[3, 24, 61, 62], [], [100]])
    here = Pipeline(Bundle.open(planted_bundle)).recommend(queries, 10)
    there = Pipeline(Bundle.open(planted_bundle)).to("cpu:0")
    assert there.sources["interest"]._items is not None
    items, scores, probabilities = there.recommend(queries, 10)
    assert (items == here[0]).all()
    np.testing.assert_allclose(scores, here[1], atol=1e-4)
    np.testing.assert_allclose(probabilities, here[2], atol=1e-4)
