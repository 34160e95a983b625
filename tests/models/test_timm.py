"""timm's networks by name: what is built, what is refused, and that nothing is fetched."""

from __future__ import annotations

import json
import socket
import sys
from typing import Any

import pytest
import torch

import robustcompress as rc
from robustcompress.models import ModelSpec, build_model, identify, list_timm_models
from robustcompress.structure import StructuralEditor

timm = pytest.importorskip("timm")

IMAGES = torch.rand(2, 3, 32, 32)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("timm:test_resnet", {}),
        ("timm:resnet50.a1_in1k", {"layers": (1, 1, 1, 1)}),
        ("timm:vit_tiny_patch16_224", {"img_size": 32, "depth": 2}),
    ],
)
def test_spec_survives_json_and_builds_what_timm_builds(name: str, kwargs: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, spec = build_model(name, num_classes=7, **kwargs)
    assert spec == ModelSpec(name, {**kwargs, "num_classes": 7}) and not spec.imports_code
    again = ModelSpec.from_json(json.loads(json.dumps(spec.to_json())))
    assert again == spec and repr(again.build()) == repr(model)
    torch.manual_seed(0)
    theirs = timm.create_model(name.partition(":")[2], num_classes=7, **kwargs)
    model.eval(), theirs.eval()
    assert torch.equal(model(IMAGES), theirs(IMAGES)) and model(IMAGES).shape == (2, 7)


@pytest.mark.parametrize(
    ("name", "kwargs", "said"),
    [
        ("timm:resnet62", {}, "timm has no model 'resnet62'; did you mean 'resnet26'"),
        ("timm:resnet50.a1_in2k", {}, "has no tag 'a1_in2k'; did you mean 'a1_in1k'"),
        ("timm:resnet26", {"pretrained": True}, "pretrained=True: weights are not downloaded here"),
        ("timm:resnet26", {"checkpoint_path": "weights.pth"}, "checkpoint_path='weights.pth'"),
        ("timm:resnet26", {"widht": 2}, "unexpected keyword argument 'widht'"),
        ("timm:vit_tiny_patch16_224", {"img_size": "large"}, "refuses {'img_size': 'large'}"),
        ("timm:hf-hub:timm/resnet26", {}, "more than one colon"),
        ("resnet26", {}, "timm's as 'timm:NAME'"),
    ],
)
def test_unknown_names_arguments_and_weights(name: str, kwargs: dict[str, Any], said: str) -> None:
    with pytest.raises(rc.InputError) as refused:
        build_model(name, **kwargs)
    assert said in str(refused.value)


def test_all_complaints_at_once() -> None:
    with pytest.raises(rc.InputError) as refused:
        build_model("timm:resnet62", pretrained=True, cache_dir="weights")
    assert all(said in str(refused.value) for said in ("resnet62", "pretrained=True", "cache_dir='weights'"))


def test_weights_that_are_not_asked_for_leave_no_trace() -> None:
    assert build_model("timm:test_resnet", pretrained=False)[1] == ModelSpec("timm:test_resnet")


def test_without_timm_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    for call in (lambda: build_model("timm:resnet26"), list_timm_models):
        with pytest.raises(rc.InputError, match=r"timm is not installed: pip install 'robustcompress\[timm\]'"):
            call()


def test_names_are_those_that_timm_builds() -> None:
    names = list_timm_models()
    assert len(names) > 500 and {"resnet26", "convnext_atto", "vit_tiny_patch16_224"} <= set(names)
    assert all(timm.is_model(name) for name in names)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [("test_resnet", {}), ("resnet26", {}), ("vit_tiny_patch16_224", {"img_size": (32, 32)}), ("convnext_atto", {})],
)
def test_identify_what_timm_built(name: str, kwargs: dict[str, Any]) -> None:
    model = timm.create_model(name, num_classes=5, **kwargs)
    spec = identify(model)
    assert spec == ModelSpec(f"timm:{name}", {"num_classes": 5, **kwargs})
    assert repr(spec.build()) == repr(model)


def test_identify_refuses_what_it_could_not_rebuild() -> None:
    strided, narrow = timm.create_model("test_resnet"), timm.create_model("vit_tiny_patch16_224", depth=2)
    strided.conv1[0].stride = (1, 1)
    assert identify(strided) is None and identify(narrow) is None


def test_networks_of_timm_can_be_edited() -> None:
    model, _ = build_model("timm:test_resnet", num_classes=10)
    editor = StructuralEditor(model.eval(), IMAGES)
    before = model(IMAGES)
    for group in editor.editable:
        editor.grow(group.name, 4)
    assert torch.allclose(model(IMAGES), before, atol=1e-5)
    vit, _ = build_model("timm:vit_tiny_patch16_224", img_size=32, depth=2, num_classes=10)
    editor = StructuralEditor(vit.eval(), IMAGES)
    heads = [group for group in editor.editable if group.kind == "heads"]
    assert [group.width for group in heads] == [3, 3]
    editor.prune(heads[0].name, keep=[0, 2])
    assert vit(IMAGES).shape == (2, 10)


def test_compress_names_the_argument_that_fits_the_images() -> None:
    with pytest.raises(rc.InputError, match=r"built for images of 224x224 .* img_size=32"):
        rc.compress("timm:vit_tiny_patch16_224", epochs=1, progress=False)


@pytest.mark.slow
def test_a_network_of_timm_is_compressed_saved_and_loaded(tmp_path: object) -> None:
    model = timm.create_model("test_resnet", num_classes=10)
    data = rc.load_data("digits", train_limit=300, test_limit=40)
    result = rc.compress(model, data=data, strategy="magnitude", epochs=0.4, attacks=("clean",), progress=False)
    assert result.spec == ModelSpec("timm:test_resnet", {"num_classes": 10})
    again = rc.load(result.save(f"{tmp_path}/result"))
    assert torch.equal(again.model(IMAGES), result.model(IMAGES)) and again.after.macs <= again.before.macs / 2
