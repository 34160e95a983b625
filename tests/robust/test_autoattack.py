from __future__ import annotations

import json
import logging
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from torch import nn

from robustcompress.errors import InputError, Interrupted
from robustcompress.interrupt import graceful
from robustcompress.robust import AutoAttackConfig, ThreatModel, evaluate
from robustcompress.robust.autoattack import attack_once, autoattack, suite_for
from robustcompress.robust.chunks import model_sha256

QUICK = AutoAttackConfig(apgd_iterations=8, fab_iterations=5, square_queries=40)
THREAT = ThreatModel("linf", 0.03)


def run(model, images, threat=THREAT, *, classes=4, **more):
    y = model(images).argmax(1)
    return autoattack(model, images, y, threat, num_classes=classes, config=QUICK, **more)


def quick(model, images, **options):
    y = model(images).argmax(1)
    options = {"autoattack_config": QUICK, "device": "cpu", **options}
    return evaluate(model, (images, y), THREAT, attacks=("autoattack",), **options)


@pytest.mark.parametrize("classes", [2, 3, 4, 10])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_any_number_of_classes_runs_and_stays_in_the_ball(mlp, images, classes, norm):
    model, threat = mlp(classes, gain=3.0), ThreatModel(norm, 0.02 if norm == "linf" else 0.2)
    y = model(images).argmax(1)
    outcome = autoattack(model, images, y, threat, num_classes=classes, config=QUICK)
    assert torch.equal(model(outcome.x_adv).argmax(1) == y, outcome.correct)
    assert (threat.size(outcome.x_adv, images) <= threat.limit).all()
    assert outcome.x_adv.min() >= 0 and outcome.x_adv.max() <= 1
    assert torch.equal(outcome.x_adv[outcome.correct], images[outcome.correct])
    assert sum(outcome.broken_by.values()) == int((~outcome.correct).sum()) > 0
    assert tuple(outcome.broken_by) == suite_for(classes).attacks


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_on_a_linear_model_it_breaks_exactly_what_can_be_broken(images, classes):
    torch.manual_seed(0)
    layer = nn.Linear(192, classes)
    model = nn.Sequential(nn.Flatten(), layer).eval()
    x = 0.2 + 0.6 * images  # away from the bounds, where the margin changes by eps * |w_y - w_k|_1
    y = model(x).argmax(1)
    logits, weight = model(x).detach(), layer.weight.detach()
    distance = torch.full((24,), torch.inf)
    for k in range(classes):
        gap = (logits[torch.arange(24), y] - logits[:, k]) / (weight[y] - weight[k]).abs().sum(1)
        distance = torch.where(y == k, distance, torch.minimum(distance, gap))
    eps = float(distance.median())
    config = AutoAttackConfig(apgd_iterations=30, fab_iterations=20, square_queries=20)
    clear = (distance / eps - 1).abs() > 0.02
    outcome = autoattack(model, x, y, ThreatModel("linf", eps), num_classes=classes, config=config)
    assert torch.equal(outcome.correct[clear], (distance > eps)[clear])


def test_suites():
    assert suite_for(10).name == suite_for(100).name == "standard"
    assert suite_for(10).attacks == ("apgd-ce", "apgd-t", "fab-t", "square")
    assert (suite_for(10).targets, suite_for(7).targets, suite_for(2).targets) == (9, 6, 1)
    assert suite_for(7).name == "standard with all 6 target classes"
    assert suite_for(3).attacks == ("apgd-ce", "apgd-dlr", "fab-t", "square")
    assert suite_for(2).attacks == ("apgd-ce", "fab-t", "square")
    assert "adapted to 2 classes" in suite_for(2).name
    assert suite_for(10, AutoAttackConfig(chunk_size=7)).name == "standard"
    assert suite_for(10, AutoAttackConfig(square_queries=7)).name == "custom (square_queries=7)"


def test_standard_parameters_are_the_packages_own(mlp):
    """Under the defaults nothing that the adapter sets may differ from `version="standard"`."""
    from pyautoattack import AutoAttack

    from robustcompress.robust.autoattack import _adversary

    model = mlp(10)
    ours = _adversary(model, ThreatModel(), suite_for(10), AutoAttackConfig(), 0, torch.device("cpu"))
    theirs = AutoAttack(model, norm="Linf", eps=8 / 255, seed=0, version="standard")
    assert ours.attacks_to_run == theirs.attacks_to_run
    for part in ("apgd", "apgd_targeted", "fab", "square"):
        for key, value in vars(getattr(theirs, part)).items():
            if key not in ("model", "predict", "logger", "device"):
                assert getattr(getattr(ours, part), key) == value, (part, key)


def test_nothing_around_it_is_disturbed(convnet, images, capfd, caplog):
    def tracer(frame, event, arg):
        return None

    convnet.eval()
    convnet[0].weight.requires_grad_(False)
    convnet[5].weight.grad = torch.full_like(convnet[5].weight, 7.0)
    torch.manual_seed(11)
    state = torch.random.get_rng_state()
    logger = logging.getLogger("auto-attack")
    before, weights = sys.gettrace(), {k: v.clone() for k, v in convnet.state_dict().items()}
    sys.settrace(tracer)
    try:
        with caplog.at_level(logging.DEBUG):
            run(convnet, images)
        assert sys.gettrace() is tracer
    finally:
        sys.settrace(before)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not logger.disabled
    assert (capfd.readouterr().out, caplog.records) == ("", [])
    assert [p.requires_grad for p in convnet.parameters()] == [False, True, True, True, True]
    assert (convnet[5].weight.grad == 7).all()
    assert all(p.grad is None for name, p in convnet.named_parameters() if name != "5.weight")
    assert all(torch.equal(weights[k], v) for k, v in convnet.state_dict().items())


def test_what_it_disturbs_is_given_back_after_an_error_too(mlp, images):
    model = mlp(4)

    def fail(module, inputs, output):
        if torch.is_grad_enabled():
            raise KeyError("in the middle")

    model.register_forward_hook(fail)
    before = sys.gettrace()
    with torch.no_grad(), pytest.raises(KeyError):
        run(model, images)
    assert sys.gettrace() is before
    assert not logging.getLogger("auto-attack").disabled
    assert all(p.requires_grad for p in model.parameters())


def test_an_attack_that_cheats_is_not_believed(mlp, images, monkeypatch):
    from pyautoattack import AutoAttack

    def cheat(self, x, y, *, batch_size):
        far = torch.rand(x.shape, generator=torch.Generator().manual_seed(0))
        far[::2] = float("nan")
        return far, y

    monkeypatch.setattr(AutoAttack, "run_standard_evaluation", cheat)
    outcome = run(mlp(4), images, ThreatModel("linf", 1e-5))
    assert outcome.x_adv.isfinite().all()
    assert (outcome.x_adv - images).abs().max() <= 1.1e-5
    assert outcome.correct.all()


def test_seed_decides(mlp, images):
    model = mlp(4, gain=3.0)
    first, second, third = (run(model, images, seed=seed).x_adv for seed in (0, 0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


def test_only_images_still_right_are_attacked(mlp, images, count):
    model = mlp(4)
    wrong = (model(images).argmax(1) + 1) % 4
    counter = count(model)
    outcome = autoattack(model, images, wrong, THREAT, num_classes=4, config=QUICK)
    assert not outcome.correct.any()
    assert counter.calls == 1


SIXES = AutoAttackConfig(apgd_iterations=8, fab_iterations=5, square_queries=40, chunk_size=6)


def oracle(model, x, y, size):
    """Each attack over what all before it left standing, in chunks: flags, how many each broke, sizes of chunks."""
    standing, broken, chunks = model(x).argmax(1) == y, {}, []
    for name in suite_for(4).attacks:
        left = standing.nonzero().flatten()
        for which in left.split(size) if len(left) else ():
            found = attack_once(model, x[which], y[which], THREAT, name, num_classes=4, config=SIXES)
            standing[which] = model(found).argmax(1) == y[which]
            chunks.append(len(which))
        broken[name] = len(left) - int(standing.sum())
    return standing, broken, chunks


def test_each_attack_takes_what_is_left_in_full_chunks(mlp, images):
    model = mlp(4, gain=3.0)
    report = quick(model, images, autoattack_config=SIXES)
    x = images[report.indices]
    flags, broken, chunks = oracle(model, x, model(x).argmax(1), 6)
    found = report.result("autoattack")
    assert torch.equal(found.correct, flags) and found.broken_by == broken
    assert sum(count > 0 for count in broken.values()) >= 2, "the second attack has fewer images than the first"
    assert 4 < len(chunks) < 16, "fewer chunks than if survivors stayed in theirs"
    assert 0 < found.max_perturbation <= THREAT.limit


def test_one_chunk_is_what_the_adapter_gives(mlp, images):
    model = mlp(4, gain=3.0)
    report = quick(model, images)
    x = images[report.indices]
    outcome = autoattack(model, x, model(x).argmax(1), THREAT, num_classes=4, config=QUICK)
    found = report.result("autoattack")
    assert torch.equal(found.correct, outcome.correct) and found.broken_by == outcome.broken_by


def test_under_a_time_limit_each_chunk_goes_through_the_whole_cascade(mlp, images):
    model = mlp(4, gain=3.0)
    report = quick(model, images, autoattack_config=SIXES, time_limit_s=1000)
    x = images[report.indices]
    y = model(x).argmax(1)
    outcomes = [
        autoattack(model, x[at : at + 6], y[at : at + 6], THREAT, num_classes=4, config=SIXES) for at in range(0, 24, 6)
    ]
    found = report.result("autoattack")
    assert torch.equal(found.correct, torch.cat([outcome.correct for outcome in outcomes]))
    assert found.broken_by == {name: sum(o.broken_by[name] for o in outcomes) for name in suite_for(4).attacks}


@pytest.mark.parametrize("limit", [None, 1000.0])
def test_a_stopped_evaluation_goes_on(mlp, images, count, tmp_path, limit):
    model = mlp(4, gain=3.0)
    options = {"autoattack_config": SIXES, "time_limit_s": limit}
    whole = quick(model, images, **options)
    reports = []

    def stop(progress):
        reports.append(progress)
        if [p.attack for p in reports].count("autoattack") == 3:
            raise KeyboardInterrupt

    folder = tmp_path / "new" / "folder"
    with pytest.raises(KeyboardInterrupt):
        quick(model, images, **options, resume_dir=folder, progress=stop)
    # Without a limit the first report comes before the first attack, then one after each chunk of an attack.
    kept = len(list(folder.glob("autoattack-*.json")))
    assert kept == 2 if limit is None else kept > 2

    counter = count(model)
    rest = quick(model, images, **options, resume_dir=folder)
    second_half = counter.calls
    counter.calls = 0
    again = quick(model, images, **options, resume_dir=folder)
    nothing = counter.calls
    assert nothing < 10 < second_half  # the clean pass and the checks are all that is left
    for report in (rest, again):
        found, expected = report.result("autoattack"), whole.result("autoattack")
        assert torch.equal(found.correct, expected.correct) and found.broken_by == expected.broken_by
        assert found.max_perturbation == expected.max_perturbation
    assert not list(folder.glob(".*.tmp"))


def test_more_images_reuse_the_full_chunks_of_fewer(mlp, images, tmp_path):
    model = mlp(4)
    config = AutoAttackConfig(apgd_iterations=4, fab_iterations=2, square_queries=5, chunk_size=6)
    y, weak = model(images).argmax(1), ThreatModel("linf", 1e-5)
    options = {"attacks": ("autoattack",), "autoattack_config": config, "device": "cpu", "resume_dir": tmp_path}
    fewer = evaluate(model, (images, y), weak, **options, autoattack_images=12)
    assert fewer.result("autoattack").correct.all()
    kept = {path: path.read_text() for path in tmp_path.iterdir()}
    report = evaluate(model, (images, y), weak, **options)
    assert report.result("autoattack").n == 24
    assert len(kept) == 2 * 4 and len(list(tmp_path.iterdir())) == 4 * 4
    assert all(path.read_text() == text for path, text in kept.items())


@pytest.mark.parametrize("change", ["weights", "images", "seed", "config"])
def test_kept_chunks_are_of_this_very_evaluation(mlp, images, tmp_path, change):
    model = mlp(4)
    quick(model, images, resume_dir=tmp_path)
    before = set(tmp_path.iterdir())
    options = {"resume_dir": tmp_path}
    if change == "weights":
        with torch.no_grad():
            model[1].weight[0, 0] += 1e-4
    elif change == "images":
        images = images.clone()
        images[3, 0, 0, 0] = 0.123
    elif change == "seed":
        options["seed"] = 1
    else:
        options["autoattack_config"] = AutoAttackConfig(apgd_iterations=8, fab_iterations=5, square_queries=41)
    quick(model, images, **options)
    made = set(tmp_path.iterdir()) - before
    assert "apgd-ce" in {json.loads(path.read_text())["name"] for path in made}


@pytest.mark.parametrize("damage", ["", "{}", "[1]", "not json", "flags"])
def test_a_damaged_chunk_is_made_again(mlp, images, tmp_path, damage):
    model = mlp(4)
    first = quick(model, images, resume_dir=tmp_path)
    path = next(path for path in sorted(tmp_path.iterdir()) if json.loads(path.read_text())["name"] == "fab-t")
    data = json.loads(path.read_text())
    data["correct"] = data["correct"].translate({48: 49, 49: 48})
    whole = path.read_text()
    path.write_text(json.dumps(data) if damage == "flags" else damage)
    second = quick(model, images, resume_dir=tmp_path)
    assert json.loads(path.read_text()) | {"seconds": 0} == json.loads(whole) | {"seconds": 0}
    assert torch.equal(first.result("autoattack").correct, second.result("autoattack").correct)


def test_a_time_limit_stops_between_chunks_and_says_so(mlp, images, monkeypatch):
    from robustcompress.robust import chunks

    model = mlp(4)
    clock = iter(range(0, 100000, 10))  # every look at the clock takes ten seconds
    monkeypatch.setattr(chunks.time, "perf_counter", lambda: float(next(clock)))
    config = AutoAttackConfig(apgd_iterations=4, fab_iterations=2, square_queries=5, chunk_size=6)
    report = quick(model, images, autoattack_config=config, time_limit_s=75.0)
    assert report.result("autoattack").n in (6, 12, 18)
    assert report.n == 24
    assert f"AutoAttack judged {report.result('autoattack').n} of 24 images" in str(report)
    assert report.worst_case.n == report.result("autoattack").n


def test_one_chunk_is_judged_however_short_the_time(mlp, images):
    report = quick(mlp(4), images, time_limit_s=1e-9)
    assert report.result("autoattack").n == 16  # a chunk under a time limit


def test_progress_after_each_chunk(mlp, images):
    seen = []
    config = AutoAttackConfig(apgd_iterations=4, fab_iterations=2, square_queries=5, chunk_size=10)
    for limit, model in ((None, mlp(4, gain=3.0)), (1000, mlp(4))):
        seen.clear()
        report = quick(model, images, autoattack_config=config, progress=seen.append, time_limit_s=limit)
        steps = [step for step in seen if step.attack == "autoattack"]
        done = [step.done for step in steps]
        assert done == sorted(done) and done[-1] == 24 and {step.total for step in steps} == {24}
        if limit is not None:
            assert done == [10, 20, 24]
        else:
            accuracies = [step.accuracy for step in steps]
            assert done[0] == 0 and accuracies[0] == 1, "it begins with what is right without an attack"
            assert accuracies == sorted(accuracies, reverse=True)
            assert len(set(done)) > 4, "the bar moves"
        assert steps[-1].accuracy == pytest.approx(report.robust_accuracy)


def test_nothing_to_attack(mlp, images):
    model, seen = mlp(4), []
    wrong = (model(images).argmax(1) + 1) % 4
    report = evaluate(model, (images, wrong), THREAT, attacks=("autoattack",), device="cpu", progress=seen.append)
    assert report.robust_accuracy == 0 and not any(report.result("autoattack").broken_by.values())
    assert (seen[-1].attack, seen[-1].done) == ("autoattack", 24)


def test_what_was_kept_is_taken_however_short_the_time(mlp, images, tmp_path):
    model = mlp(4)
    options = {"autoattack_config": SIXES, "resume_dir": tmp_path}
    whole = quick(model, images, **options, time_limit_s=1000)
    again = quick(model, images, **options, time_limit_s=1e-9)
    assert again.result("autoattack") == whole.result("autoattack") and whole.result("autoattack").n == 24


def test_one_process_under_a_limit_says_how_far_it_came(mlp, images):
    def ask(progress):
        if (progress.attack, progress.done) == ("autoattack", 12):
            signal.raise_signal(signal.SIGTERM)

    with graceful(), pytest.raises(Interrupted, match="stopped after 12 of 24 images of AutoAttack"):
        quick(mlp(4), images, autoattack_config=SIXES, time_limit_s=1000, progress=ask)


def test_where_nothing_can_be_kept_it_is_said_once_in_the_report(mlp, images, tmp_path):
    def remove(progress):
        shutil.rmtree(tmp_path / "gone", ignore_errors=True)

    report = quick(mlp(4), images, autoattack_config=SIXES, resume_dir=tmp_path / "gone", progress=remove)
    assert [line for line in report.warnings if "could not be kept" in line] == [
        f"what is finished could not be kept in {tmp_path / 'gone'} (No such file or directory)"
    ]


def test_resume_dir_that_is_a_file(mlp, images, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be made"):
        quick(mlp(4), images, resume_dir=tmp_path / "file")


def test_model_hash_sees_structure_weights_and_hidden_buffers():
    def make(**changes):
        torch.manual_seed(0)
        layer = nn.Linear(2, 2)
        layer.register_buffer("mean", torch.full((1,), changes.get("mean", 0.0)), persistent=False)
        return nn.Sequential(layer, changes.get("act", nn.ReLU()))

    assert model_sha256(make()) == model_sha256(make())
    assert len({model_sha256(m) for m in (make(), make(mean=1.0), make(act=nn.GELU()))}) == 3


@pytest.mark.parametrize("key", ["apgd_iterations", "fab_iterations", "square_queries", "chunk_size"])
def test_bad_config(key):
    with pytest.raises(InputError, match=f"{key}=0"):
        AutoAttackConfig(**{key: 0})


def test_images_too_small_for_square(mlp):
    with pytest.raises(InputError, match="5x5"):
        autoattack(mlp(4), torch.rand(2, 3, 4, 4), torch.tensor([0, 1]), ThreatModel("l2", 0.5), num_classes=4)


def test_the_package_is_loaded_only_when_it_attacks():
    code = "import sys, robustcompress.robust; print('pyautoattack' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


@pytest.mark.slow
def test_the_standard_suite_itself(mlp, images):
    report = quick(mlp(10, gain=3.0), images, autoattack_config=AutoAttackConfig())
    assert report.result("autoattack").suite == "standard"
    assert report.warnings == ()
