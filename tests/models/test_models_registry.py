import json
from pathlib import Path

import pytest
import torch
from torch import nn

from robustcompress.errors import InputError
from robustcompress.models import (
    ModelSpec,
    build_model,
    identify,
    list_models,
    list_torchvision_models,
    resnet20,
)


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in model.state_dict().items()}


@pytest.mark.parametrize("name", ["resnet20", "robustcompress:densenet121", "torchvision:squeezenet1_1"])
def test_spec_survives_json_and_builds_the_same(name: str) -> None:
    kwargs = {} if name.startswith("torchvision") else {"width": 0.25, "mean": (0, 0, 0)}
    model, spec = build_model(name, num_classes=7, **kwargs)
    again = ModelSpec.from_json(json.loads(json.dumps(spec.to_json())))
    assert again == spec
    assert not again.imports_code
    twin = again.build()
    assert shapes(twin) == shapes(model)
    assert repr(twin) == repr(model)


def test_bare_names_prefer_the_built_in() -> None:
    for name in set(list_models()) & set(list_torchvision_models()):
        assert build_model(name, width=0.125)[1].name == f"robustcompress:{name}"
    assert set(list_models()) & set(list_torchvision_models()) == {
        "resnet18",
        "densenet121",
        "mobilenet_v2",
        "vgg16_bn",
    }
    model, spec = build_model("squeezenet1_1", num_classes=5)
    assert spec == ModelSpec("torchvision:squeezenet1_1", {"num_classes": 5})
    assert type(model).__module__ == "torchvision.models.squeezenet"


def test_torchvision_keeps_its_own_default_of_classes() -> None:
    assert build_model("torchvision:resnet18")[0].fc.out_features == 1000


def test_own_factory_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_nets_a.py").write_text(
        "from torch import nn\n"
        "def tiny(num_classes=3, hidden=4):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(12, hidden), nn.Linear(hidden, num_classes))\n"
        "def fixed():\n    return nn.Linear(3, 2)\n"
        "def wrong():\n    return 3\n"
        "def needs(size):\n    return nn.Linear(size, size)\n"
    )
    (tmp_path / "my_nets_b.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.chdir(tmp_path)
    model, spec = build_model("my_nets_a:tiny", num_classes=6, hidden=8)
    assert model[2].out_features == 6
    assert spec == ModelSpec("my_nets_a:tiny", {"num_classes": 6, "hidden": 8})
    assert spec.imports_code
    assert shapes(spec.build()) == shapes(model)
    assert build_model("my_nets_a:fixed", num_classes=6)[1].kwargs == {}  # takes no number of classes
    for name, expected in {
        "my_nets_a:tyni": "did you mean 'tiny'",
        "my_nets_a:wrong": "returned int",
        "my_nets_a:needs": "it takes: size",
        "my_nets_b:net": "a_package_that_is_not_there",
        "my_nets_c:net": "no module 'my_nets_c'",
        "my_nets_a.py:tiny": "'my_nets_a:tiny'",
    }.items():
        with pytest.raises(InputError, match=expected):
            build_model(name)


@pytest.mark.parametrize(
    ("name", "kwargs", "expected"),
    [
        ("preact-resnet18", {}, "did you mean 'preact_resnet18'"),
        ("mobilenetv2", {}, "did you mean 'mobilenet_v2'"),
        ("robustcompress:resnet34", {}, "built-in model 'resnet34' does not exist"),
        ("torchvision:resnet20", {}, "did you mean"),
        ("resnet20", {"widht": 2}, "did you mean 'width'"),
        ("torchvision:resnet18", {"widht": 2}, "widht"),
        ("torchvision:resnet18", {"weights": "DEFAULT"}, "not downloaded"),
    ],
)
def test_unknown_names_and_arguments(name: str, kwargs: dict[str, object], expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        build_model(name, **kwargs)


@pytest.mark.parametrize("value", [{}, {"name": 3}, {"name": "a", "kwargs": [1]}, {"name": "a", "extra": 1}])
def test_records_of_another_kind_are_refused(value: dict[str, object]) -> None:
    with pytest.raises(InputError, match="not a model record"):
        ModelSpec.from_json(value)


@pytest.mark.parametrize("name", list_models())
def test_identify_built_ins(name: str) -> None:
    model, spec = build_model(name, num_classes=7, width=0.25, stem_stride=2, std=(1, 1, 1))
    assert identify(model) == spec


def test_identify_reads_the_classes_of_a_replaced_classifier() -> None:
    model = resnet20()
    model.fc = nn.Linear(64, 3)
    spec = identify(model)
    assert spec is not None and spec.kwargs["num_classes"] == 3
    assert shapes(spec.build()) == shapes(model)


@pytest.mark.parametrize(
    "name",
    ["resnet18", "resnet50", "mobilenet_v2", "squeezenet1_0", "vgg11_bn", "densenet121", "vit_b_16", "googlenet"],
)
def test_identify_torchvision(name: str) -> None:
    with torch.device("meta"):
        model, spec = build_model(f"torchvision:{name}", num_classes=7)
    assert identify(model) == spec


def test_identify_as_callers_build_them() -> None:
    from torchvision.models import resnet18

    assert identify(resnet18()) == ModelSpec("torchvision:resnet18", {"num_classes": 1000})


def test_identify_leaves_random_numbers_and_the_model_alone() -> None:
    from torchvision.models import resnet18

    model = resnet18().eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    identify(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_identify_refuses_what_it_could_not_rebuild() -> None:
    from torchvision.models import resnet18

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

    stem, pool, stride, head, patched = (resnet18() for _ in range(5))
    stem.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    pool.maxpool = nn.Identity()  # the same state dict, another function
    stride.layer2[0].conv1.stride = (1, 1)
    head.fc = nn.Sequential(nn.Dropout(), nn.Linear(512, 10))
    patched.layer1.forward = lambda x: x
    narrowed = resnet20()
    narrowed.layers[0][0].conv1 = nn.Conv2d(16, 12, 3, padding=1, bias=False)
    normalised = resnet20()
    normalised.normalize.std.fill_(1)
    for model in (stem, pool, stride, head, patched, narrowed, normalised, Own(), nn.ReLU()):
        assert identify(model) is None
