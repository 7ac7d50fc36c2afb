"""Layers whose weight is read without calling them, or computed by a parametrization."""

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from torch import nn
from torch.nn.utils import parametrizations
from transformers import AutoConfig, AutoModelForAudioClassification, AutoModelForCausalLM

from peft_ext import GPSConfig, NeuroAdaConfig, PSNConfig, activation_scores, gps, gradient_scores
from peft_ext.sparse.choose.targets import resolve_targets
from peft_ext.sparse.choose.unsuitable import unsuitable_layers
from peft_ext.sparse.choose.weight_reads import layers_read
from peft_ext.sparse.layers import SparseLayer
from tests.contract._untouched import Untouched


class Block(nn.Module):
    """Calls `up` and reads `down`."""

    tensor_parallel = 1

    def __init__(self):
        super().__init__()
        self.up, self.down, self.side = (nn.Linear(4, 4) for _ in range(3))
        self.convs = nn.ModuleList(nn.Conv1d(4, 4, 1) for _ in range(2))

    def forward(self, x):
        return self.up(x.to(self.up.weight.dtype)) @ self.down.weight


class Alias(Block):
    def forward(self, x):
        layer = self.down
        return x @ layer.weight.T


class Helper(Block):
    def forward(self, x):
        return self._compute(x)

    def _compute(self, x):
        return F.linear(x, self.down.weight.clone(), bias=None)


class Inherited(Helper):
    def forward(self, x):
        return super().forward(x) + 1


class Loop(Block):
    def forward(self, x):
        for conv in self.convs:
            x = F.conv1d(x, conv.weight)
        return x


class Item(Block):
    def forward(self, x):
        return F.conv1d(x, self.convs[0].weight)


class OnOnePath(Block):
    def forward(self, x, cache=None):
        return self.down(x) if cache is None else F.linear(x, self.down.weight)


class Bias(Block):
    def forward(self, x):
        return self.up(x) + (self.down.bias if self.training else 0)


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = nn.Identity()
        self.block.down = nn.Linear(4, 4)

    def forward(self, x):
        return F.linear(x, self.block.down.weight)


class Decorated(Block):
    @torch.no_grad()
    def forward(self, x):
        return F.linear(x, self.down.weight)


class OtherBranch(Block):
    """As the models that can be cut into slices for tensor parallelism."""

    def forward(self, x):
        if self.tensor_parallel > 1 and not self.training:
            return F.linear(x, self.down.weight)
        return self.down(x)


class Sliced(OtherBranch):
    tensor_parallel = 2


class Questions(Block):
    def forward(self, x):
        if isinstance(self.down.weight, torch.Tensor) and self.down.bias is not None:
            x = x.to(self.down.weight.device).reshape(-1, self.down.weight.shape[1])
        return self.down(x)


class Elsewhere(Block):
    def forward(self, x):
        return self.down(x)

    def norms(self):
        return self.down.weight.norm()


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (Block, {"down"}),
        (Alias, {"down"}),
        (Helper, {"down"}),
        (Inherited, {"down"}),
        (Loop, {"convs.0", "convs.1"}),
        (Item, {"convs.0", "convs.1"}),
        (OnOnePath, {"down"}),
        (Bias, {"down"}),
        (Outer, {"block.down"}),
        (Decorated, {"down"}),
        (Sliced, {"down"}),
        (OtherBranch, set()),
        (Questions, set()),
        (Elsewhere, set()),
        (nn.MultiheadAttention, set()),
    ],
)
def test_the_source_tells_which_weights_are_read(kind, expected):
    module = kind(4, 2) if kind is nn.MultiheadAttention else kind()
    assert set(layers_read(module)) == expected


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.up(x) @ self.down.weight


class Caller(Reader):
    def forward(self, x):
        return self.down(self.up(x))


class Model(nn.Module):
    def __init__(self, block=Reader):
        super().__init__()
        self.blocks = nn.ModuleList(block() for _ in range(2))
        self.conv = parametrizations.weight_norm(nn.Conv1d(4, 4, 1))
        self.old = nn.utils.weight_norm(nn.Conv1d(4, 4, 1))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.old(self.conv(x[..., None])).squeeze(-1)


READ = {"blocks.0.down", "blocks.1.down"}
PARAMETRISED = {"conv", "old"}
CALLED = {"blocks.0.up", "blocks.1.up"}
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")


def _adapted(model):
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    return {name for name, module in model.named_modules() if isinstance(module, SparseLayer)}


@pytest.mark.parametrize("targets", ["all-neurons", "all-linear"])
def test_shorthands_leave_them_out(targets):
    base = Model()
    assert set(unsuitable_layers(base)) == READ | PARAMETRISED
    model = get_peft_model(base, NeuroAdaConfig(target_modules=targets))
    assert _adapted(model) == CALLED
    model.add_adapter("second", NeuroAdaConfig(target_modules=targets))
    assert _adapted(model) == CALLED
    assert set(unsuitable_layers(base)) == READ | PARAMETRISED


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["up", "down"], r"'blocks.0.down' \(2 such layers in all\). Reader computes.*or add 'down' to `exclude_mod"),
        (r"blocks\.1\.(up|down)", r"target_modules has 'blocks.1.down'. Reader computes with its weight without"),
        (["conv", "up"], r"'conv'. A parametrization computes its weight.*remove_parametrizations.*'conv' to `excl"),
        (["old", "up"], "'old'. A parametrization computes"),
    ],
    ids=str,
)
def test_names_of_them_are_refused_before_anything_changes(targets, message):
    base = Model()
    with Untouched(base), pytest.raises(ValueError, match=message):
        get_peft_model(base, NeuroAdaConfig(target_modules=targets))
    for score in (gradient_scores, activation_scores):
        with Untouched(base), pytest.raises(ValueError, match=message):
            score(base, [], config=GPSConfig(target_modules=targets))
    config = NeuroAdaConfig(target_modules=targets, exclude_modules=["down", "conv", "old"])
    assert _adapted(get_peft_model(base, config)) <= CALLED


def test_scores_are_of_the_layers_that_can_be_adapted():
    batches = [(torch.randn(4, 4), torch.arange(4))]
    options = {"loss": F.cross_entropy, "features": lambda output: output, "progress": False}
    for config in (None, GPSConfig(target_modules="all-neurons"), GPSConfig(target_modules=["up"])):
        assert set(gradient_scores(Model(), batches, config=config, **options)) == CALLED
        assert set(activation_scores(Model(), batches, config=config, progress=False)) == CALLED


@pytest.mark.parametrize("by", ["PEFT", "state dict"])
def test_an_adapter_that_has_them_loads_with_a_warning(by, tmp_path):
    kind = NeuroAdaConfig(target_modules=["up", "down"], init_weights=False)
    torch.manual_seed(0)
    trained = get_peft_model(Model(Caller), kind)
    trained.save_pretrained(tmp_path)
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match=r"values on 'blocks.0.down' \(2 such.*Reader.*merging them changes"):
        if by == "PEFT":
            loaded = PeftModel.from_pretrained(Model(), tmp_path)
        else:
            state = {
                key.removeprefix("base_model.model."): tensor
                for key, tensor in get_peft_model_state_dict(trained).items()
            }
            loaded = inject_adapter_in_model(kind, Model(), state_dict=state)
    assert _adapted(loaded) == READ | CALLED
    if by == "PEFT":  # such adapters can be combined, as they could
        with pytest.warns(UserWarning, match="merging them changes"):
            loaded.add_weighted_adapter(["default"], [0.5], "halved")


# What the blocks of each architecture, on any path, read and don't call.
READ_BY_TRANSFORMERS = {
    "mamba": {"conv1d", "dt_proj", "x_proj", "out_proj"},
    "falcon_mamba": {"conv1d", "dt_proj", "x_proj", "out_proj"},
    "mamba2": {"conv1d", "out_proj"},
    "bamba": {"conv1d", "out_proj"},
    "granitemoehybrid": {"conv1d", "out_proj"},
    "jamba": {"conv1d", "dt_proj"},
    "lfm2": {"conv"},
    "qwen3_next": {"conv1d"},
}


@pytest.mark.parametrize("name", READ_BY_TRANSFORMERS)
def test_layers_that_state_space_models_read_are_no_targets(name):
    options = {"layer_types": ["conv", "full_attention"]} if name == "lfm2" else {}
    config = AutoConfig.for_model(name, num_hidden_layers=2, **options)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    read = unsuitable_layers(model)
    assert {layer.rpartition(".")[2] for layer in read} == READ_BY_TRANSFORMERS[name]
    for default in ("all-linear", "all-neurons"):
        config = PSNConfig()
        resolve_targets(config, model, default)
        assert config.target_modules and read.keys().isdisjoint(config.target_modules)


AUDIO = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "num_labels": 3,
    "conv_dim": (8, 8), "conv_stride": (4, 4), "conv_kernel": (8, 4), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8, "num_buckets": 8,
    "mask_time_prob": 0.0, "layerdrop": 0.0,
}  # fmt: skip


@pytest.mark.parametrize("name", ["hubert", "wav2vec2", "wavlm"])
def test_gps_adapts_speech_classifiers_by_default(name):
    base = AutoModelForAudioClassification.from_config(AutoConfig.for_model(name, **AUDIO))
    batch = {"input_values": torch.randn(4, 400), "labels": torch.tensor([0, 1, 0, 1])}
    model = gps(base, GPSConfig(k=1), [batch], progress=False)
    layers = {f"{name}.encoder.layers.0.attention.{part}_proj" for part in "qkv"}
    assert (layers <= _adapted(model)) == (name != "wavlm")  # which hands their weights to torch's function
    assert not any("pos_conv_embed" in layer for layer in _adapted(model))
    model(**batch).loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "delta" in n and p.requires_grad)
