"""What the schemas cannot see: that a pod may run, that it ends as the exit code table says, that all names fit together."""

from __future__ import annotations

import ipaddress
import json
import re
from typing import Any

import pytest

from job.config.loader import apply_overrides, validate
from job.errors import EXIT_CODES
from job.render import read_job
from tests.conftest import ROOT
from tests.k8s.conftest import SETUPS, Pods, Tree, built, documents, of_kind, pods

POLICIES = [
    tree for path in (ROOT / "k8s" / "setup").rglob("networkpolicy.yaml") for tree in documents(path.read_text())
]
KILLED = 137


def action(job: Tree, code: int, *, disrupted: bool) -> str:
    """What the Job controller does with a pod that failed so: the first rule that matches, and Count where none does."""
    for rule in job["podFailurePolicy"]["rules"]:
        codes, conditions = rule.get("onExitCodes"), rule.get("onPodConditions")
        if codes and (code in codes["values"]) == (codes["operator"] == "In"):
            return str(rule["action"])
        if conditions and disrupted and {"type": "DisruptionTarget", "status": "True"} in conditions:
            return str(rule["action"])
    return "Count"


def test_every_ending_is_treated_as_the_table_says(run: Pods):
    for row in EXIT_CODES:
        if row.code:
            assert action(run.job, row.code, disrupted=False) == row.kubernetes, row
    assert action(run.job, KILLED, disrupted=False) == "Count"
    assert action(run.job, KILLED, disrupted=True) == "Ignore"
    assert action(run.job, 78, disrupted=True) == "FailJob"
    assert action(run.job, 1, disrupted=False) == "Count"


def test_the_api_takes_the_job(run: Pods):
    """Rules of the API server's own validation of Jobs that are in no schema."""
    job, names = run.job, [container["name"] for container in run.pod["containers"]]
    assert run.pod["restartPolicy"] == "Never"  # podFailurePolicy goes with no other
    assert job["podReplacementPolicy"] == "Failed"  # nor with another of these
    rules = job["podFailurePolicy"]["rules"]
    assert len(rules) <= 20
    for rule in rules:
        assert ("onExitCodes" in rule) != ("onPodConditions" in rule)
        codes = rule.get("onExitCodes")
        if codes:
            assert codes["values"] == sorted(set(codes["values"]))
            assert 0 not in codes["values"]
            assert codes["containerName"] in names
    if job.get("completionMode") == "Indexed":
        assert job["completions"] >= job["parallelism"] >= 1
    else:
        assert "completions" not in job
    assert job["backoffLimit"] is not None


def test_the_restricted_standard_lets_the_pod_in(run: Pods):
    """Pod Security Standards, profile restricted: every control that applies to Linux pods."""
    (namespace,) = documents((ROOT / "k8s" / "setup" / "namespace.yaml").read_text())
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    pod = run.pod
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault"
    allowed = {"configMap", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
    assert all(set(volume) - {"name"} <= allowed for volume in pod["volumes"])
    for container in [*pod["containers"], *pod.get("initContainers", [])]:
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert context["readOnlyRootFilesystem"] is True  # ours, beyond the standard
        assert not {"privileged", "procMount", "runAsUser"} & set(context)
        assert not any("hostPort" in port for port in container.get("ports", []))
    assert pod["automountServiceAccountToken"] is False


def test_the_restricted_standard_lets_the_demo_s_store_in():
    (store,) = of_kind("overlays/dev", "Deployment")
    (run,) = pods("overlays/dev")
    test_the_restricted_standard_lets_the_pod_in(run._replace(job=store["spec"]))


KIND = 950
"""Thousandths of a core that kind's own pods request on a single node: coredns twice 100, API server 250, controller manager 200,
scheduler 100, etcd 100, kindnet 100."""


def test_the_demo_fits_a_node_of_two_cores():
    (store,), (run,) = of_kind("overlays/dev", "Deployment"), pods("overlays/dev")
    ours = [container["resources"]["requests"]["cpu"] for container in run.pod["containers"]]
    theirs = [
        container["resources"]["requests"]["cpu"] for container in store["spec"]["template"]["spec"]["containers"]
    ]
    first = max(cores(each["resources"]["requests"]["cpu"]) for each in run.pod["initContainers"])
    assert max(first, sum(map(cores, ours))) + sum(map(cores, theirs)) + KIND <= 2000


def cores(quantity: str) -> int:
    """Thousandths of a core."""
    return int(quantity.removesuffix("m")) if quantity.endswith("m") else 1000 * int(quantity)


def test_a_frozen_container_is_not_waited_for(run: Pods):
    """It would not hear the notice."""
    assert run.container["livenessProbe"]["terminationGracePeriodSeconds"] < run.pod["terminationGracePeriodSeconds"]


def test_every_pod_says_what_it_takes(run: Pods):
    for container in [*run.pod["containers"], *run.pod.get("initContainers", [])]:
        requests, limits = container["resources"]["requests"], container["resources"]["limits"]
        assert "cpu" in requests
        for name in ("memory", "ephemeral-storage"):
            assert requests[name] == limits[name]  # never evicted for what it was promised
        assert requests.get("nvidia.com/gpu") == limits.get("nvidia.com/gpu")
    assert all(size(volume["emptyDir"]["sizeLimit"]) for volume in run.pod["volumes"] if "emptyDir" in volume)
    on_disk = [volume["emptyDir"] for volume in run.pod["volumes"] if "emptyDir" in volume]
    total = sum(size(place["sizeLimit"]) for place in on_disk if place.get("medium") != "Memory")
    assert total <= size(run.container["resources"]["limits"]["ephemeral-storage"])


def size(quantity: str) -> int:
    number, unit = re.fullmatch(r"(\d+)(Gi|Mi|G)", quantity).groups()  # type: ignore[union-attr]
    return int(number) * {"Gi": 2**30, "Mi": 2**20, "G": 10**9}[unit]


def told_and_set(container: Tree, volumes: list[Tree]) -> tuple[float | None, float | None]:
    """Bytes of scratch: `JOB_SCRATCH_GB` and the emptyDir's `sizeLimit`; None for one that is not set."""
    told = [entry["value"] for entry in container["env"] if entry["name"] == "JOB_SCRATCH_GB"]
    (scratch,) = [volume for volume in volumes if volume["name"] == "scratch"]
    limit = scratch.get("emptyDir", {}).get("sizeLimit")
    return (float(told[0]) * 1e9 if told else None), (size(limit) if limit else None)


def test_the_job_is_told_how_large_scratch_may_grow(run: Pods):
    told, allowed = told_and_set(run.container, run.pod["volumes"])
    assert told == allowed is not None


@pytest.mark.parametrize("components", [("scratch-volume",), ("spot", "hub", "scratch-volume", "monitoring")])
def test_a_volume_of_its_own_says_itself_how_large_it_is(components: tuple[str, ...]):
    pod = read_job(components)["spec"]["template"]["spec"]
    assert told_and_set(pod["containers"][0], pod["volumes"]) == (None, None)


def test_images_are_pinned(run: Pods):
    for container in [*run.pod["containers"], *run.pod.get("initContainers", [])]:
        assert re.search(r"(@sha256:[0-9a-f]{64}|:[\w][\w.-]*)$", container["image"].rpartition("/")[2]), container[
            "image"
        ]
        assert not container["image"].endswith(":latest")
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert f"vision-lora-job:{version[1]}" in run.container["image"]  # type: ignore[index]


def test_there_is_time_to_save(run: Pods):
    """The job hears of the whole grace but some seconds, and a save at the slowest that was measured fits into it.

    A checkpoint of the 11B model at rank 16 is 67 million parameters and Adam's two moments of each, in 32 bits.
    """
    grace, told = run.pod["terminationGracePeriodSeconds"], float(environment(run)["JOB_GRACE_SECONDS"])
    assert 5 <= grace - told <= 10
    measured = [json.loads(line) for line in (ROOT / "benchmarks" / "results.jsonl").read_text().splitlines()]
    stalls = [row["value"] for row in measured if row["bench"] == "checkpoint_stall" and row["unit"] == "s"]
    speeds = [row["value"] * 2**20 for row in measured if row["case"].endswith("2 GiB up, ours")]
    assert told > max(stalls) + 67_174_400 * 12 / min(speeds)


def environment(run: Pods) -> dict[str, str | None]:
    return {entry["name"]: entry.get("value") for entry in run.container["env"]}


STORE_VARIABLES = {"AWS_ENDPOINT_URL_S3", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"}  # boto3's


def test_every_variable_is_read_by_something(run: Pods):
    sources = "".join(path.read_text() for path in (ROOT / "job").rglob("*.py"))
    ours = set(re.findall(r'"(JOB_[A-Z_]*[A-Z])"', sources))
    others = {"HOME", "HF_HUB_OFFLINE", "HF_TOKEN", "OMP_NUM_THREADS"}
    in_command = set(re.findall(r"\$\(?([A-Z_]+)", " ".join(run.container["command"])))
    given = environment(run)
    assert len({entry["name"] for entry in run.container["env"]}) == len(run.container["env"])
    overrides = {name: value or "" for name, value in given.items() if name.startswith("JOB__")}
    assert set(given) - set(overrides) <= ours | others | in_command | STORE_VARIABLES
    assert in_command - {"JOB_COMPLETION_INDEX"} <= set(given)
    tree: dict[str, Any] = {"model": {"name_or_path": "m"}, "dataset": {"path": "d"}, "output": {"url": "o"}}
    assert not list(apply_overrides(tree, overrides))
    validate(tree)
    assert "JOB_SPEC" in given or run.build == "overlays/trainjob"


def test_all_that_is_written_is_on_a_volume(run: Pods):
    mounts = {mount["mountPath"]: mount["name"] for mount in run.container["volumeMounts"]}
    assert {"/scratch", "/tmp", "/dev/shm"} <= set(mounts)
    assert environment(run)["JOB_SCRATCH"] == environment(run)["HOME"] == "/scratch"
    before = [mount["name"] for one in run.pod.get("initContainers", []) for mount in one.get("volumeMounts", [])]
    assert {*mounts.values(), *before} == {volume["name"] for volume in run.pod["volumes"]}
    assert run.container["terminationMessagePath"] == "/dev/termination-log"
    assert run.container["terminationMessagePolicy"] == "File"  # the other copies the log's end to whoever sees the pod


def test_every_name_is_there(run: Pods):
    """What a pod refers to is in the same build, or in what a namespace is given once."""
    there = {(tree["kind"], tree["metadata"]["name"]) for name in [run.build, *SETUPS] for tree in built(name)}
    named = {("ServiceAccount", run.pod["serviceAccountName"])}
    named |= {
        ("PersistentVolumeClaim", claim["claimName"])
        for volume in run.pod["volumes"]
        if (claim := volume.get("persistentVolumeClaim"))
    }
    for entry in run.container["env"]:
        if reference := entry.get("valueFrom", {}).get("configMapKeyRef"):
            named.add(("ConfigMap", reference["name"]))
            (config,) = [
                tree for tree in of_kind(run.build, "ConfigMap") if tree["metadata"]["name"] == reference["name"]
            ]
            assert reference["key"] in config["data"]
            assert config["immutable"] is True
    if "subdomain" in run.pod:
        named.add(("Service", run.pod["subdomain"]))
    for job in of_kind(run.build, "Job"):
        if queue := job["metadata"]["labels"].get("kueue.x-k8s.io/queue-name"):
            named.add(("LocalQueue", queue))
    assert named <= there


def test_secrets_are_never_required(run: Pods):
    """A ServiceAccount with a role needs none."""
    sources = [entry["secretRef"] for entry in run.container.get("envFrom", [])]
    sources += [
        entry["valueFrom"]["secretKeyRef"]
        for entry in run.container["env"]
        if "secretKeyRef" in entry.get("valueFrom", {})
    ]
    assert bool(sources) == ("airgapped" not in run.build)  # there, nothing has a credential to give
    assert all(source["optional"] is True for source in sources)


def test_the_specs_are_valid():
    from job.config.parsing import parse

    found = [
        tree["data"]["spec.yaml"] for name in ("base", "overlays/airgapped") for tree in of_kind(name, "ConfigMap")
    ]
    found += [
        entry["value"] for tree in of_kind("overlays/trainjob", "TrainJob") for entry in tree["spec"]["trainer"]["env"]
    ]
    assert len(found) == 3
    for text in found:
        assert validate(parse(text)).dataset.group_column == "patient_id"


def test_the_pods_of_a_trainjob_are_those_of_the_base():
    (ours,), (theirs,) = pods("base"), pods("overlays/trainjob")
    text = json.dumps(ours.job["podFailurePolicy"]).replace('"containerName": "job"', '"containerName": "node"')
    assert theirs.job["podFailurePolicy"] == json.loads(text)
    container = theirs.container | {"name": "job", "command": ours.container["command"]}
    container["env"] = [ours.container["env"][0], *theirs.container["env"]]
    assert theirs.pod | {"containers": [container]} == ours.pod
    labels = ours.template["metadata"]["labels"] | {"vision-lora-job/peers": "true"}
    assert theirs.template["metadata"] == ours.template["metadata"] | {"labels": labels}


def test_prometheus_finds_the_port():
    (run,) = pods("overlays/monitoring")
    (monitor,) = of_kind("setup/monitoring", "PodMonitor")
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    (port,) = run.container["ports"]
    assert endpoint["port"] == port["name"]
    assert environment(run)["JOB_METRICS_PORT"] == str(port["containerPort"])
    assert selects(monitor["spec"]["selector"], run.template["metadata"]["labels"])
    labels = run.template["metadata"]["labels"]
    (rule,) = [
        rule
        for policy in POLICIES
        if selects(policy["spec"]["podSelector"], labels)
        for rule in policy["spec"].get("ingress", [])
    ]
    assert rule["ports"] == [{"protocol": "TCP", "port": port["containerPort"]}]


def selects(selector: Tree, labels: dict[str, str]) -> bool:
    expressions = all(labels.get(rule["key"]) in rule["values"] for rule in selector.get("matchExpressions", []))
    return expressions and selector.get("matchLabels", {}).items() <= labels.items()


def lets_out(labels: dict[str, str], address: str, port: int, protocol: str = "TCP") -> bool:
    """Whether a pod with these labels may open a connection, by NetworkPolicy's own rules."""
    policies = [policy["spec"] for policy in POLICIES if selects(policy["spec"]["podSelector"], labels)]
    rules = [rule for policy in policies if "Egress" in policy["policyTypes"] for rule in policy.get("egress", [])]
    if not any("Egress" in policy["policyTypes"] for policy in policies):
        return True
    return any(
        goes_to(rule, address) and {"protocol": protocol, "port": port} in rule.get("ports", []) for rule in rules
    )


def goes_to(rule: Tree, address: str) -> bool:
    target = ipaddress.ip_address(address)
    blocks = [peer["ipBlock"] for peer in rule.get("to", []) if "ipBlock" in peer]
    inside = any(
        target in ipaddress.ip_network(block["cidr"])
        and not any(target in ipaddress.ip_network(hole) for hole in block.get("except", []))
        for block in blocks
    )
    return inside or "to" not in rule


STORE, IN_HOUSE, METADATA, POD_IDENTITY, NAMES = (
    "52.216.1.1",
    "10.2.3.4",
    "169.254.169.254",
    "169.254.170.23",
    "10.96.0.10",
)


@pytest.mark.parametrize(
    ("build", "address", "port", "expected"),
    [
        ("base", STORE, 443, True),
        ("base", IN_HOUSE, 9000, True),
        ("base", POD_IDENTITY, 80, True),
        ("base", STORE, 80, False),
        ("base", STORE, 22, False),
        ("base", METADATA, 80, False),
        ("base", METADATA, 443, False),
        ("base", "fd00:ec2::254", 443, False),
        ("overlays/airgapped", STORE, 443, False),
        ("overlays/airgapped", NAMES, 53, False),
        ("overlays/multi-node", NAMES, 53, True),
    ],
)
def test_the_network_is_open_to_the_store_and_to_nothing_else(build: str, address: str, port: int, expected: bool):
    (run,) = pods(build)
    assert lets_out(run.template["metadata"]["labels"], address, port) is expected


def test_the_hub_stays_open_where_the_store_is_narrowed(monkeypatch: pytest.MonkeyPatch):
    labels = {"app.kubernetes.io/name": "vision-lora-job", "vision-lora-job/egress": "hub"}
    narrowed = [policy for policy in POLICIES if policy["metadata"]["name"] != "vision-lora-store"]
    monkeypatch.setattr("tests.k8s.test_policy.POLICIES", narrowed)
    assert lets_out(labels, STORE, 443)
    assert not lets_out(labels | {"vision-lora-job/egress": "store"}, STORE, 443)
    assert not lets_out({"app.kubernetes.io/name": "vision-lora-job"}, STORE, 443)


def test_kueue_has_quota_for_all_that_a_pod_asks_for():
    """A resource that no quota covers is never admitted."""
    (run,) = pods("overlays/kueue")
    queue = documents((ROOT / "k8s" / "setup" / "kueue" / "clusterqueue.yaml").read_text())[1]
    (local,) = of_kind("setup/kueue", "LocalQueue")
    assert local["spec"]["clusterQueue"] == queue["metadata"]["name"]
    covered = {name for group in queue["spec"]["resourceGroups"] for name in group["coveredResources"]}
    assert set(run.container["resources"]["requests"]) <= covered
    assert of_kind("overlays/kueue", "Job")[0]["spec"]["suspend"] is True
