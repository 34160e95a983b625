"""Attention modules of other origins: taught, recognised, or refused with a reason."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from robustcompress.errors import InputError, UnsupportedModelError
from robustcompress.models import Attention, open_attention, vit_micro
from robustcompress.structure import NEW, AttentionKind, StructuralEditor, attention, teach_attention
from robustcompress.structure.groups import Axis
from robustcompress.structure.magnitudes import group_norms
from tests.structure.networks import EXAMPLE, images
from tests.structure.test_mixing import assert_honest

HEADS, HEAD_DIM, DIM = 4, 3, 10


class Around(nn.Module):
    """A residual block of one attention module, between patches and a classifier."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.patch, self.norm, self.attn = nn.Conv2d(3, DIM, 2, stride=2), nn.LayerNorm(DIM), module
        self.fc = nn.Linear(DIM, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        return self.fc((x + self.attn(self.norm(x))).mean(1))


def product(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Attention of `[N, heads, T, head_dim]` written out: what the fused one must equal."""
    return (q @ k.transpose(-2, -1) * scale).softmax(-1) @ v


class Counted(nn.Module):
    """Counts its heads in attributes, as timm's does; `inside` acts on the heads before they are read."""

    def __init__(self, inside: nn.Module | None = None, gated: bool = False) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.attn_dim = HEADS, HEAD_DIM, HEADS * HEAD_DIM
        self.qkv = nn.Linear(DIM, 3 * self.attn_dim, bias=False)
        self.gate = nn.Linear(DIM, self.attn_dim) if gated else None
        self.q_norm, self.inside = nn.LayerNorm(HEAD_DIM), inside or nn.Identity()
        self.proj = nn.Linear(self.attn_dim, DIM)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, t, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        y = product(self.q_norm(q), k, v, self.head_dim**-0.5).transpose(1, 2).reshape(n, t, self.attn_dim)
        y = self.inside(y)
        return self.proj(y if self.gate is None else y * self.gate(x).sigmoid())


class Apart(nn.Module):
    """Queries, keys and values by layers of their own, under names of its own, defined in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.size = HEAD_DIM
        self.value, self.query, self.key = (nn.Linear(DIM, HEADS * HEAD_DIM) for _ in range(3))
        self.out = nn.Linear(HEADS * HEAD_DIM, DIM)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (f(x).unflatten(2, (-1, self.size)).transpose(1, 2) for f in (self.query, self.key, self.value))
        return self.out(product(q, k, v, self.size**-0.5).transpose(1, 2).flatten(2))


class FromTheEmbedding(nn.Module):
    """Infers a head's width from the embedding's: no head can leave it."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = 5, 2
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, t, c = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(product(q, k, v, 1.0).transpose(1, 2).reshape(n, t, c))


class Talking(Counted):
    """Heads that speak with each other (Shazeer et al. 2020): one cannot leave without the others hearing less."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, t, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-2, -1)).softmax(-1)
        y = ((weights + weights.mean(1, keepdim=True)) @ v).transpose(1, 2).reshape(n, t, self.attn_dim)
        return self.proj(y)


@pytest.fixture
def taught() -> Iterator[None]:
    kept = dict(attention._TAUGHT)
    yield
    attention._TAUGHT.clear()
    attention._TAUGHT.update(kept)


def editor_of(module: nn.Module, seed: int = 0) -> StructuralEditor:
    torch.manual_seed(seed)
    return assert_honest(Around(module))


@pytest.mark.parametrize("gated", [False, True])
def test_attention_that_counts_its_heads_is_recognised_and_its_counts_stay_true(gated: bool) -> None:
    editor = editor_of(Counted(gated=gated))
    module, group = editor.model.attn, editor.groups["attn.qkv"]
    assert (group.kind, group.width, group.min_width, group.editable) == ("heads", HEADS, 1, True)
    assert [a.module for a in group.writers] == ["attn.qkv", *(["attn.gate"] if gated else [])]
    for sources, width in (([1, 3], 2), ([1], 1), ([0, NEW, NEW], 3)):
        editor.resize("attn.qkv", sources)
        assert (module.num_heads, module.head_dim, module.attn_dim) == (width, HEAD_DIM, width * HEAD_DIM)
        assert module.qkv.out_features == len(module.qkv.weight) == 3 * width * HEAD_DIM
        assert module.proj.in_features == module.proj.weight.shape[1] == width * HEAD_DIM
        assert StructuralEditor(editor.model, EXAMPLE).widths == editor.widths
        assert editor.model(images(2)).isfinite().all()


def test_removing_a_head_takes_its_rows_of_queries_keys_and_values_and_its_columns() -> None:
    editor = editor_of(Counted())
    module = editor.model.attn
    qkv = module.qkv.weight.detach().clone().view(3, HEADS, HEAD_DIM, DIM)
    proj = module.proj.weight.detach().clone().view(DIM, HEADS, HEAD_DIM)
    norms = (qkv.square().sum((0, 2, 3)) + proj.square().sum((0, 2))).sqrt()
    assert torch.allclose(group_norms(editor)["attn.qkv"], norms)
    editor.resize("attn.qkv", [3, 0])
    assert torch.equal(module.qkv.weight.view(3, 2, HEAD_DIM, DIM), qkv[:, [3, 0]])
    assert torch.equal(module.proj.weight.view(DIM, 2, HEAD_DIM), proj[:, [3, 0]])


def test_what_is_taught_and_does_not_fit_is_said(taught: None) -> None:
    teach_attention(Apart, AttentionKind(writers=(("qery", 1), ("key", 1), ("value", 1)), reader="out", head_dim="dim"))
    with pytest.raises(InputError) as caught:
        editor_of(Apart())
    assert "no linear layer 'qery'" in str(caught.value) and "no whole number 'dim'" in str(caught.value)
    for wrong in ("Apart", Apart()):
        with pytest.raises(InputError, match="give the class of the attention module"):
            teach_attention(wrong, AttentionKind())  # type: ignore[arg-type]
    with pytest.raises(InputError, match="give an AttentionKind"):
        teach_attention(Apart, "fused")  # type: ignore[arg-type]


def test_layers_under_other_names_are_taught(taught: None) -> None:
    frozen = editor_of(Apart())
    assert not any(g.kind == "heads" or ("attn" in g.name and g.editable) for g in frozen.groups.values())
    kind = AttentionKind(writers=(("query", 1), ("key", 1), ("value", 1)), reader="out", head_dim="size")
    teach_attention(Apart, kind)
    editor = editor_of(type("Subclass", (Apart,), {})())
    assert [(g.name, g.kind, g.width) for g in editor.editable if g.exact] == [("attn.value", "heads", HEADS)]
    assert [a.module for a in editor.groups["attn.value"].writers] == ["attn.value", "attn.query", "attn.key"]
    # What is left out is found: queries and keys have as many heads as the values that they weigh.
    teach_attention(Apart, AttentionKind(writers=(("query", 1), ("key", 1)), reader="out", head_dim="size"))
    completed = editor_of(Apart())
    assert [(g.name, g.kind, g.width) for g in completed.editable if g.exact] == [("attn.value", "heads", HEADS)]
    # What is taught wrongly is not believed: halves of heads.
    every = (("query", 1), ("key", 1), ("value", 1))
    teach_attention(Apart, AttentionKind(writers=every, reader="out", head_dim="half"))
    wrong = Apart()
    wrong.half = HEAD_DIM // 2
    assert [g.name for g in editor_of(wrong).editable if g.name.startswith("attn.")] == []


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (FromTheEmbedding, "forward() assumes its width"),
        (Talking, "cannot be followed"),
    ],
    ids=["width from the embedding", "talking heads"],
)
def test_heads_that_cannot_leave_stay_with_the_reason(make: Callable[[], nn.Module], reason: str) -> None:
    editor = editor_of(make())
    assert reason in editor.groups["attn.qkv"].reason
    assert [g.name for g in editor.editable if g.exact] == []
    with pytest.raises(InputError, match=r"group 'attn\.qkv' cannot be edited"):
        editor.prune("attn.qkv", [0])


def test_a_kind_without_writers_makes_no_sense() -> None:
    with pytest.raises(InputError, match=r"writers=\(\): name at least one"):
        AttentionKind(writers=())
    with pytest.raises(InputError, match="one run or more"):
        AttentionKind(writers=(("qkv", 0),))


def test_a_norm_over_all_heads_moves_with_them() -> None:
    editor = editor_of(Counted(inside=nn.LayerNorm(HEADS * HEAD_DIM)))
    heads = editor.groups["attn.qkv"]
    assert heads.editable and not heads.exact and heads.passers == (Axis("attn.inside", "both"),)


def test_the_embedding_is_one_group_that_layer_norms_look_at() -> None:
    editor = StructuralEditor(vit_micro(depth=1), EXAMPLE)
    embedding = editor.groups["patch"]
    assert embedding.editable and not embedding.exact and embedding.min_width == 2
    assert {axis.module for axis in embedding.writers} == {"patch", "blocks.0.attention.proj", "blocks.0.fc2"}
    assert {axis.module for axis in embedding.passers if axis.side == "param"} == {"position"}


class Perceptron(nn.Module):
    """Two linear layers over `[N, T, C]`: autograd records each as several operations, in several ways."""

    def __init__(self, bias: bool, contiguous: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 7, bias=bias), nn.Linear(7, 64, bias=bias)
        self.c, self.fc, self.contiguous = nn.Linear(64, 6, bias=bias), nn.Linear(6, 5), contiguous

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(2).transpose(1, 2)
        x = F.gelu(self.a(x.contiguous() if self.contiguous else x))
        if not self.contiguous:
            x = x.transpose(0, 1).contiguous().transpose(0, 1)
        return self.fc(F.gelu(self.c(F.gelu(self.b(x)))).mean(1))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("contiguous", [False, True])
def test_linear_layers_over_sequences_are_followed(bias: bool, contiguous: bool) -> None:
    torch.manual_seed(0)
    editor = assert_honest(Perceptron(bias, contiguous))
    assert [(g.name, g.kind, g.width) for g in editor.editable] == [
        ("a", "hidden", 7),
        ("b", "hidden", 64),
        ("c", "hidden", 6),
    ]


# open_attention


class Torchs(nn.Module):
    def __init__(self, **options: object) -> None:
        super().__init__()
        settings = {"embed_dim": DIM, "num_heads": 5, "batch_first": True} | options
        self.inner = nn.MultiheadAttention(**settings)  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_opened_attention_computes_the_same_and_loses_heads(bias: bool, training: bool) -> None:
    torch.manual_seed(0)
    model = Around(Torchs(bias=bias)).double().train(training)
    model.attn.inner.in_proj_weight.requires_grad_(False)
    twin, noise = copy.deepcopy(model), torch.random.get_rng_state()
    assert open_attention(model) is model
    assert torch.equal(torch.random.get_rng_state(), noise), "opening draws random numbers"
    assert all(module.training is training for module in model.modules())
    assert not model.attn.inner.inner.qkv.weight.requires_grad and model.attn.inner.inner.proj.weight.requires_grad
    x = images(3)
    torch.testing.assert_close(model(x), twin(x))
    editor = StructuralEditor(model, EXAMPLE)
    assert [(g.name, g.width) for g in editor.editable if g.exact] == [("attn.inner.inner.qkv", 5)]
    columns = torch.arange(DIM) // 2 % 2 == 1  # heads 1 and 3
    with torch.no_grad():
        twin.attn.inner.out_proj.weight[:, columns] = 0
    editor.prune("attn.inner.inner.qkv", [0, 2, 4])
    torch.testing.assert_close(model(x), twin(x))


def test_opened_attention_keeps_its_dropout() -> None:
    torch.manual_seed(0)
    model = Around(Torchs(dropout=0.5))
    twin = copy.deepcopy(model)
    open_attention(model)
    x = images(3).float()
    assert not torch.equal(model(x), model(x)), "no dropout while training"
    torch.testing.assert_close(model.eval()(x), twin.eval()(x))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Around(Torchs(kdim=4)), "attn.inner: keys or values are not as wide as queries"),
        (lambda: Around(Torchs(add_zero_attn=True)), "attn.inner: it adds a bias or zeros"),
        (lambda: Around(Torchs(add_bias_kv=True)), "attn.inner: it adds a bias or zeros"),
        (lambda: Around(Torchs(batch_first=False)), "attn.inner: .*use batch_first=True"),
        (lambda: Torchs().inner, "attention: it is the model itself"),
        (
            lambda: Around(nn.TransformerEncoderLayer(DIM, 5, 8)),
            "attn.self_attn: it is part of TransformerEncoderLayer",
        ),
    ],
)
def test_attention_that_cannot_be_opened_is_named(make: Callable[[], nn.Module], message: str) -> None:
    model = make()
    before = [type(module) for module in model.modules()]
    with pytest.raises(UnsupportedModelError, match=message):
        open_attention(model)
    assert [type(module) for module in model.modules()] == before


def test_opened_attention_refuses_calls_that_it_cannot_answer() -> None:
    opened = open_attention(Around(Torchs())).attn.inner
    x, y = torch.rand(2, 4, DIM), torch.rand(2, 4, DIM)
    with pytest.raises(UnsupportedModelError, match="query, key and value differ"):
        opened(x, y, y)
    with pytest.raises(UnsupportedModelError, match="attn_mask is given"):
        opened(x, x, x, attn_mask=torch.zeros(4, 4))
    assert opened(x, x, x, attn_mask=None)[1] is None


def test_the_fused_product_is_the_written_out_one() -> None:
    torch.manual_seed(0)
    module, x = Attention(DIM, HEADS, HEAD_DIM).double(), torch.rand(2, 6, DIM, dtype=torch.float64)
    q, k, v = module.qkv(x).view(2, 6, 3, HEADS, HEAD_DIM).permute(2, 0, 3, 1, 4)
    wanted = product(q, k, v, HEAD_DIM**-0.5).transpose(1, 2).reshape(2, 6, -1)
    torch.testing.assert_close(module(x), module.proj(wanted))
