"""The fast engines compute what the full one does, on every family; and say so where they cannot."""

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model

from peft_ext import MoReSConfig
from peft_ext.knockout import FlowSample, layer_sweep
from tests._models.vision_language import CAUSAL, FAMILIES, LAYERS, build, grouped, prepared

from ._runs import left_alone
from ._sweeps import FAST, PAIRS, assert_same, sweep


@pytest.mark.filterwarnings("ignore:.*blocks nothing:UserWarning")  # of a window that does not reach the image
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", CAUSAL)
def test_fast_equals_full(family, padding):
    records = assert_same(build(family), FlowSample(*grouped(family, padding=padding)), layers=[1, 2])
    assert max(abs(record["change_percent"]) for record in records) > 1


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "gemma2", "gpt2"])
def test_fast_equals_full_in_eager(family):
    assert_same(build(family, "eager"), FlowSample(*grouped(family)))


@pytest.mark.parametrize("name", ["flex_attention", "flash_attention_2"])
def test_fast_engines_switch_the_attention(name):
    batch, groups = grouped("llava")
    expected, _ = sweep(build("llava", "sdpa"), FlowSample(batch, groups), "packed")
    model = build("llava", name)
    found, _ = sweep(model, FlowSample(batch, groups), "packed")
    assert torch.equal(found, expected)
    assert model.get_decoder().config._attn_implementation == name


def test_rows_emptied_by_us():
    """The first token has only itself; blocked, its attention adds nothing, in each engine."""
    model, batch, groups = prepared("llama", texts=((3, 7),))
    first = torch.zeros_like(groups["last"])
    first[:, 0] = True
    assert_same(model, FlowSample(batch, {**groups, "first": first}), pairs=["first:first", "first:question"])


def test_under_lora():
    model = get_peft_model(build("llava"), LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    assert_same(model.eval(), FlowSample(*grouped("llava")))


@pytest.mark.parametrize("engine", FAST)
def test_a_bidirectional_prefix_is_refused(engine):
    model, batch, groups = prepared("paligemma")
    with pytest.raises(ValueError, match='bidirectional prefix.*engine="full"'):
        sweep(model, FlowSample(batch, groups), engine)
    records = layer_sweep(model, [FlowSample(batch, groups)], ["image:question"], progress=False)
    assert {record["engine"] for record in records} == {"full"}


@pytest.mark.parametrize("engine", FAST)
def test_a_target_inside_an_image_that_attends_both_ways(engine):
    """Gemma 3's image tokens see each other, so a knockout of some changes those before them."""
    model, batch, groups = prepared("gemma3", texts=((3, 7),))
    late = groups["image"] & (groups["image"].cumsum(1) > 2)
    early = groups["image"] & ~late
    sample = FlowSample(batch, {**groups, "late": late, "early": early})
    expected, _ = sweep(model, sample, "full", pairs=["early:late", "late:early"])
    found, _ = sweep(model, sample, engine, pairs=["early:late", "late:early"])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


UNDER = {
    "image": ("llava", MoReSConfig(rank=2, token_ratio=0.5, init="random"), "MoReS"),
    "text": ("llama", MoReSConfig(rank=2, token_positions="f2+l2", init="random"), "MoReS"),
    "prompt": ("llama", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), "virtual tokens"),
    "prefix": ("llama", PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), "mask has the shape"),
}


@pytest.mark.parametrize("self_check", [True, False])
@pytest.mark.parametrize("under", UNDER)
def test_auto_runs_the_whole_model_where_an_adapter_needs_that(under, self_check, recwarn):
    family, config, reason = UNDER[under]
    model = get_peft_model(build(family), config).eval()
    sample, options = FlowSample(*grouped(family)), {"self_check": self_check, "progress": False}
    expected = layer_sweep(model, [sample], ["question:last"], engine="full", **options)
    assert layer_sweep(model, [sample], ["question:last"], **options) == expected
    assert not [warning for warning in recwarn if "engine" in str(warning.message)]
    for engine in FAST:
        with pytest.raises(ValueError, match=f'engine="{engine}" would not be exact.*({reason}).*"full" or "auto"'):
            layer_sweep(model, [sample], ["question:last"], engine=engine, **options)


def test_fast_engines_with_mores_disabled_or_at_the_connector():
    sample = FlowSample(*grouped("llava"))
    model = get_peft_model(build("llava"), MoReSConfig(init="random")).eval()
    with model.disable_adapter():
        assert_same(model, sample)
    connector = MoReSConfig(site="connector", token_ratio=1.0, init="random")
    assert_same(get_peft_model(build("llava"), connector).eval(), sample)


@pytest.mark.parametrize("engine", FAST)
def test_a_pair_without_edges_warns(engine):
    with pytest.warns(UserWarning, match="question:image blocks nothing"):
        _, records = sweep(build("llama"), FlowSample(*grouped("llama")), engine, pairs=["question:image"])
    assert max(abs(record["change_percent"]) for record in records) < 1e-3


class _Doubled(torch.nn.Module):
    """A layer that the fast engines know nothing about: it depends on how many tokens it is called with."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.self_attn, self.mlp = layer, layer.self_attn, layer.mlp

    def forward(self, hidden_states, **kwargs):
        return self.layer(hidden_states, **kwargs) * (1 + 1 / hidden_states.shape[1])


@pytest.mark.parametrize("engine", ["auto", *FAST])
def test_the_self_check_falls_back(engine):
    model = build("llama")
    model.model.layers[1] = _Doubled(model.model.layers[1])
    batch, groups = grouped("llama")
    with pytest.warns(UserWarning, match='is off by .* using "full" instead'):
        records = layer_sweep(model, [FlowSample(batch, groups)], PAIRS, window=2, engine=engine, progress=False)
    expected = layer_sweep(model, [FlowSample(batch, groups)], PAIRS, window=2, engine="full", progress=False)
    assert records == expected


def test_the_self_check_passes_what_is_exact():
    batch, groups = grouped("llava")
    samples = [FlowSample(batch, groups, names=["a", "b"]), FlowSample(batch, groups, names=["c", "d"])]
    records = layer_sweep(build("llava"), samples, PAIRS, window=2, progress=False)
    assert {record["engine"] for record in records} == {"packed"}


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_left_behind(family):
    model, batch, groups = prepared(family)
    pairs = ["image:question", "last:last"]
    with left_alone(model, batch):
        layer_sweep(model, [FlowSample(batch, groups)], pairs, window=LAYERS, progress=False)
