"""Moving averages, casts and arithmetic on state dicts: values are averaged, entries and the fingerprint stay."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from peft_ext import NeuroAdaConfig

from ._asserts import bits
from ._probes import tensors_of


DECAYS = [0.9, 0.999, 0.99999]
WIDE = 90_000  # beyond what 16 bits hold, and where fp32 numbers are 2^-7 apart


def build(selection="random", seed=0):
    """A linear layer and a convolution, with table and ragged supports by the selection."""
    torch.manual_seed(0)
    base = nn.ModuleDict({"linear": nn.Linear(WIDE, 3), "conv": nn.Conv1d(12, 8, 3, padding=1)})
    options = {"target_modules": ["linear", "conv"], "init_weights": False, "train_bias": True}
    torch.manual_seed(seed)
    return get_peft_model(base, NeuroAdaConfig(k=3, selection=selection, seed=seed, **options))


def deltas(model):
    return {name: layer.deltas["default"] for name, layer in model.base_model.model.items()}


def fixed(model):
    """Bits of everything in the adapter that training leaves alone."""
    parameters = {name for name, _ in model.named_parameters()}
    assert all(delta.transposed_entries.numel() for delta in deltas(model).values())  # makes the tables
    held = {name.removeprefix("."): tensor for name, tensor in tensors_of(model).items() if "_delta." in name}
    return {name: bits(tensor) for name, tensor in held.items() if name not in parameters}


def steps(model, count=3):
    """Values as training would change them, step by step."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(torch.randn(parameter.shape, generator=generator))
        yield model


def by_averaged_model(model, decay, **options):
    averaged = AveragedModel(model, use_buffers=True, **options)
    for _ in steps(model):
        averaged.update_parameters(model)
    return averaged.module


def by_writing_into_the_state_dict(model, decay):
    """As timm does."""
    averaged = copy.deepcopy(model)
    for _ in steps(model):
        with torch.no_grad():
            for mine, theirs in zip(averaged.state_dict().values(), model.state_dict().values(), strict=True):
                mine.copy_(decay * mine + (1 - decay) * theirs)
    return averaged


def by_averaging_state_dicts(model, decay):
    averaged = copy.deepcopy(model)
    kept = averaged.state_dict()
    for _ in steps(model):
        kept = {name: decay * mine + (1 - decay) * model.state_dict()[name] for name, mine in kept.items()}
    averaged.load_state_dict(kept)
    return averaged


def by_averaging_adapters(model, decay):
    averaged = copy.deepcopy(model)
    kept = adapter_of(averaged)
    for _ in steps(model):
        kept = {name: decay * mine + (1 - decay) * adapter_of(model)[name] for name, mine in kept.items()}
    set_peft_model_state_dict(averaged, kept)
    return averaged


def adapter_of(model):
    """As PEFT saves it, but in types that torch computes with."""
    named = get_peft_model_state_dict(model).items()
    return {name: tensor.int() if tensor.dtype == torch.uint16 else tensor.clone() for name, tensor in named}


AVERAGES = {
    "AveragedModel, all at once": lambda model, decay: by_averaged_model(
        model, decay, multi_avg_fn=get_ema_multi_avg_fn(decay)
    ),
    "AveragedModel, one by one": lambda model, decay: by_averaged_model(model, decay, avg_fn=get_ema_avg_fn(decay)),
    "written into the state dict": by_writing_into_the_state_dict,
    "state dicts": by_averaging_state_dicts,
    "adapters": by_averaging_adapters,
}


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("how", AVERAGES)
def test_an_average_has_the_same_entries_and_the_mean_of_the_values(how, decay, tmp_path):
    model = build("random" if decay > 0.99 else "random_layer")
    before = fixed(model)
    assert {name.rpartition(".")[2] for name in before} >= {"indices", "fingerprint", "_transposed_entries"}
    path = [values_of(model), *(values_of(point) for point in steps(copy.deepcopy(model)))]
    averaged = AVERAGES[how](model, decay)
    if how.startswith("AveragedModel"):  # which starts at its first update
        del path[0]
    for name, delta in deltas(averaged).items():
        expected = path[0][name]
        for point in path[1:]:
            expected = decay * expected + (1 - decay) * point[name]
        torch.testing.assert_close(delta.weight.double(), expected, rtol=1e-5, atol=1e-6)
    assert same(fixed(model), before) and same(fixed(averaged), before)
    averaged.base_model.model["linear"](torch.randn(2, WIDE))  # checks the base, if the entries were taken for new

    averaged.save_pretrained(tmp_path)
    # Not onto the average's own base: most ways to average move equal numbers in their last bit.
    loaded = PeftModel.from_pretrained(build().unload(), tmp_path)
    assert same(fixed(loaded), before)
    for name, delta in deltas(loaded).items():
        assert torch.equal(delta.weight, deltas(averaged)[name].weight)


def values_of(model):
    return {name: delta.weight.detach().double() for name, delta in deltas(model).items()}


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_an_average_saves_from_its_state_dict(tmp_path):
    model = build()
    average = {name: 0.3 * tensor + 0.7 * tensor for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=average)
    loaded = PeftModel.from_pretrained(copy.deepcopy(model).unload(), tmp_path)
    assert same(fixed(loaded), fixed(model))


@pytest.mark.parametrize("share", [0.5, 0.01])
def test_an_average_of_other_entries_is_refused(share, tmp_path):
    """Half of one entry and half of another is none."""
    model, other = build(seed=0), build(seed=1)
    before = fixed(model)

    def mixed(state_of):
        return {name: (1 - share) * mine + share * state_of(other)[name] for name, mine in state_of(model).items()}

    with pytest.raises(RuntimeError, match=r"indices: these are no integers but torch.float32 numbers.*different"):
        model.load_state_dict(mixed(nn.Module.state_dict))
    with pytest.raises(ValueError, match="different entries"):
        model.save_pretrained(tmp_path, state_dict=mixed(nn.Module.state_dict))
    with pytest.raises(ValueError, match="Nothing was loaded"):
        set_peft_model_state_dict(model, mixed(adapter_of))
    assert same(fixed(model), before)


def test_a_state_dict_in_half_precision_is_loaded_where_its_integers_survive():
    model = build()
    before = fixed(model)
    state = model.state_dict()
    model.load_state_dict({name: t.half() if name.endswith("conv.indices") else t for name, t in state.items()})
    assert same(fixed(model), before)
    with pytest.raises(RuntimeError, match=r"linear\S*indices: these are no integers but torch.float16 numbers"):
        model.load_state_dict({name: tensor.half() for name, tensor in state.items()})
    assert same(fixed(model), before)


@pytest.mark.parametrize(("dtype", "shift"), [(torch.int64, 2**32), (torch.bool, 0), (torch.complex64, 0)], ids=str)
def test_other_numbers_than_integers_that_fit_are_refused(dtype, shift):
    model = build()
    before, state = fixed(model), model.state_dict()
    state |= {name: (t.long() + shift).to(dtype) for name, t in state.items() if name.endswith("indices")}
    with pytest.raises(RuntimeError, match=r"indices: these.*numbers"):
        model.load_state_dict(state)
    assert same(fixed(model), before)


def test_nothing_that_identifies_the_adapter_is_a_buffer():
    """Which DistributedDataParallel would send in every forward pass, and average models average."""
    model = build("random_layer")
    assert not [name for name, _ in model.named_buffers()]
    assert not [name for name, parameter in model.named_parameters() if not parameter.is_floating_point()]
