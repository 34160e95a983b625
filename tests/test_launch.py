"""The launch files are valid, and every command in them is one that we have."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from robustcompress.cli import build_parser
from robustcompress.recipe import RunRecipe
from robustcompress.recipe.plain import merged, read_yaml

ROOT = Path(__file__).parents[1]
SLURM = ROOT / "recipes" / "launch" / "slurm.sh"
KUBERNETES = ROOT / "recipes" / "launch" / "kubernetes.yaml"

# Field names of kubeflow.org/v1, and of the parts of core/v1 in use.
KNOWN: dict[str, set[str]] = {
    "": {"apiVersion", "kind", "metadata", "spec"},
    "spec": {"runPolicy", "elasticPolicy", "pytorchReplicaSpecs", "nprocPerNode"},
    "elasticPolicy": {
        *("minReplicas", "maxReplicas", "rdzvBackend", "rdzvPort", "rdzvHost", "rdzvId", "rdzvConf", "standalone"),
        *("maxRestarts", "metrics"),
    },
    "runPolicy": {
        *("cleanPodPolicy", "ttlSecondsAfterFinished", "activeDeadlineSeconds", "backoffLimit", "schedulingPolicy"),
        *("suspend", "managedBy"),
    },
    "Worker": {"replicas", "template", "restartPolicy"},
    "container": {"name", "image", "command", "args", "env", "resources", "volumeMounts", "workingDir"},
    "volume": {"name", "persistentVolumeClaim", "configMap", "emptyDir"},
    "mount": {"name", "mountPath", "readOnly", "subPath"},
}


def check_command(words: list[str]) -> dict[str, Any]:
    """Have torchrun's parser and ours read a command, and the recipe be one with these settings."""
    from torch.distributed.run import get_args_parser

    ours = words.index("robustcompress") + 1
    started = get_args_parser().parse_args(words[1:])
    assert words[0] == "torchrun" and started.module and started.training_script == "robustcompress"
    arguments = build_parser().parse_args(words[ours:])
    value: Mapping[str, Any] = read_yaml(ROOT / "recipes" / arguments.recipe.name)
    for path, setting in arguments.settings:
        for key in reversed(path):
            setting = {key: setting}
        value = merged(value, setting)
    recipe = RunRecipe.from_mapping(value)
    assert arguments.checkpoint is not None and arguments.checkpoint != arguments.out
    return {"torchrun": started, "recipe": recipe, "arguments": arguments}


def test_the_kubernetes_job_has_the_fields_of_its_kind() -> None:
    job = yaml.safe_load(KUBERNETES.read_text())
    spec = job["spec"]
    (worker,) = spec["pytorchReplicaSpecs"].values()
    pod = worker["template"]["spec"]
    (container,) = pod["containers"]
    parts = [("", job), ("spec", spec), ("elasticPolicy", spec["elasticPolicy"]), ("runPolicy", spec["runPolicy"])]
    parts += [("Worker", worker), ("container", container)]
    parts += [("volume", volume) for volume in pod["volumes"]]
    parts += [("mount", mount) for mount in container["volumeMounts"]]
    for name, part in parts:
        assert part.keys() <= KNOWN[name], (name, part.keys() - KNOWN[name])
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert container["name"] == "pytorch", "the operator looks for this name"
    elastic = spec["elasticPolicy"]
    assert elastic["minReplicas"] <= worker["replicas"] <= elastic["maxReplicas"] and elastic["rdzvBackend"] == "c10d"
    assert spec["nprocPerNode"] == str(container["resources"]["limits"]["nvidia.com/gpu"])
    assert spec["runPolicy"]["cleanPodPolicy"] in ("All", "Running", "None")
    assert worker["restartPolicy"] in ("Always", "OnFailure", "Never", "ExitCode")
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    environment = {item["name"]: item["value"] for item in container["env"]}
    assert int(environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < pod["terminationGracePeriodSeconds"]
    found = check_command(container["command"])
    most = elastic["maxReplicas"] * int(spec["nprocPerNode"])
    training = found["recipe"].training
    assert training.accumulate % most == 0 and training.batch_size % training.accumulate == 0


def test_the_slurm_script_is_clean() -> None:
    subprocess.run(["bash", "-n", SLURM], check=True)
    checker = Path(sys.executable).with_name("shellcheck")
    if not checker.exists():
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([checker, SLURM], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """An environment in which Slurm's commands write down how they were called, and srun runs what it is given."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, body in {
        "scontrol": 'echo "scontrol $*" >> log; [[ $1 == show ]] && printf "node-a\\nnode-b\\n"; exit 0',
        "srun": 'shift; exec "$@"',
        # Where the test says so, it works until it is told to stop, and needs a moment for it.
        "torchrun": (
            'printf "%s\\n" "$@" > words\n[[ -e long ]] || exit "$(< code)"\n'
            "trap 'echo TERM >> log; sleep 0.3; exit 1' TERM\necho begun >> log\nwhile true; do sleep 0.05; done"
        ),
    }.items():
        (programs / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (programs / name).chmod(0o755)
    (tmp_path / "code").write_text("0")
    slurm = {"SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "7"}
    environment = {name: value for name, value in os.environ.items() if name not in ("RECIPE", "OUT", "GPUS")}
    return {**environment, **slurm, "PATH": f"{programs}:{os.environ['PATH']}"}


def test_the_slurm_script_starts_what_we_have(cluster: dict[str, str], tmp_path: Path) -> None:
    subprocess.run(["bash", SLURM], cwd=tmp_path, env=cluster, check=True, timeout=30)
    found = check_command(["torchrun", *(tmp_path / "words").read_text().splitlines()])
    started = found["torchrun"]
    assert (started.nnodes, started.nproc_per_node, started.rdzv_backend) == ("2", "8", "c10d")
    assert started.rdzv_endpoint == "node-a:29500" and started.rdzv_id == "7-0"
    assert found["arguments"].recipe.name == "imagenet-resnet50.yaml"
    other = cluster | {"RECIPE": "recipes/cifar10-resnet18.yaml", "OUT": "runs/x"}
    subprocess.run(["bash", SLURM], cwd=tmp_path, env=other, check=True, timeout=30)
    arguments = check_command(["torchrun", *(tmp_path / "words").read_text().splitlines()])["arguments"]
    assert str(arguments.out) == "runs/x" and str(arguments.checkpoint) == "runs/x.checkpoint"
    (tmp_path / "code").write_text("3")
    assert subprocess.run(["bash", SLURM], cwd=tmp_path, env=cluster, check=False, timeout=30).returncode == 3
    assert "requeue" not in (tmp_path / "log").read_text(), "a run that fails by itself would fail again"


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_the_slurm_script_passes_one_warning_on_and_queues_again(cluster: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "long").touch()
    (tmp_path / "log").touch()

    def until(word: str) -> None:
        deadline = time.monotonic() + 20
        while word not in (tmp_path / "log").read_text():
            assert time.monotonic() < deadline, word
            time.sleep(0.02)

    with subprocess.Popen(["bash", SLURM], cwd=tmp_path, env=cluster) as job:
        try:
            until("begun")
            job.send_signal(signal.SIGTERM)
            until("TERM")
            job.send_signal(signal.SIGTERM)  # as Slurm may at the end of the grace time
            assert job.wait(timeout=20) == 1
        finally:
            job.kill()
    log = (tmp_path / "log").read_text().splitlines()
    assert log.count("TERM") == 1 and log[-1] == "scontrol requeue 7"


TINY = """\
model: {name: resnet8, stem_stride: 4}
data: {source: digits, train_limit: 300, test_limit: 40}
strategy: magnitude
objective: {name: pgd-at, steps: 5}
epochs: 12
training: {batch_size: 64, optimizer: lamb, lr: 0.02, warmup: 0.1, val_images: 0}
evaluate: {attacks: [clean]}
"""


@pytest.mark.slow
def test_a_job_that_is_preempted_ends_with_the_same_bits(cluster: dict[str, str], tmp_path: Path) -> None:
    """The script, torchrun and two real processes: warned while they train, queued again, and done."""
    from safetensors.torch import load_file

    programs = tmp_path / "bin"
    (programs / "torchrun").write_text(f'#!/usr/bin/env bash\nexec {sys.executable} -m torch.distributed.run "$@"\n')
    (programs / "scontrol").write_text(
        '#!/usr/bin/env bash\necho "scontrol $*" >> log\n[[ $1 != show ]] || echo localhost\n'
    )
    (tmp_path / "tiny.yaml").write_text(TINY)
    cluster |= {"SLURM_JOB_NUM_NODES": "1", "GPUS": "2", "RECIPE": "tiny.yaml", "PYTHONPATH": str(ROOT)}
    cluster |= {"CUDA_VISIBLE_DEVICES": "", "OUT": "whole"}
    subprocess.run(["bash", SLURM], cwd=tmp_path, env=cluster, check=True, timeout=300)
    cluster["OUT"] = "stopped"
    checkpoint = tmp_path / "stopped.checkpoint" / "checkpoint.json"
    with subprocess.Popen(["bash", SLURM], cwd=tmp_path, env=cluster) as job:
        deadline = time.monotonic() + 120
        while not checkpoint.exists():  # the end of the first phase: the second one is to be stopped in the middle
            assert time.monotonic() < deadline and job.poll() is None
            time.sleep(0.05)
        time.sleep(0.5)
        job.send_signal(signal.SIGTERM)
        assert job.wait(timeout=120) != 0
    assert (tmp_path / "log").read_text().splitlines()[-1] == "scontrol requeue 7" and checkpoint.exists()
    subprocess.run(["bash", SLURM], cwd=tmp_path, env=cluster, check=True, timeout=300)
    whole, stopped = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "stopped"))
    assert whole.keys() == stopped.keys() and all((whole[key] == stopped[key]).all() for key in whole)
