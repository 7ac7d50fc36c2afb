"""Which experts and which of their entries are trained."""

from functools import partial

import pytest
import torch
from peft import PeftModel, get_peft_model

from peft_ext import NeuroAdaConfig, activation_scores, busiest_experts, gradient_scores
from tests._models.experts import COLUMNS, IMPLEMENTATIONS, MODELS, adapted, layers_of, run, tiny, token_ids

from .._asserts import positions
from .._probes import peak_bytes


IDS = token_ids(4)
DATA = [{"input_ids": IDS, "labels": IDS}]
EACH_LAYOUT = pytest.mark.parametrize("name", ["mixtral", *COLUMNS])


def neurons(name, tensor):
    """`[experts, rows, fan_in]`."""
    return tensor.transpose(1, 2) if name in COLUMNS else tensor


def per_expert(layer, experts=4):
    """Of each expert, how many entries its neurons have."""
    counts = torch.zeros(layer.deltas["default"].support.rows, dtype=torch.int64)
    for row, _ in positions(layer.deltas["default"].support):
        counts[row] += 1
    return counts.view(experts, -1)


@pytest.mark.parametrize(
    ("name", "selection"), [*((name, "magnitude") for name in MODELS), ("mixtral", "reverse"), ("gpt_oss", "random")]
)
def test_every_neuron_of_every_expert_gets_k_entries(name, selection):
    model = adapted(name, k=3, selection=selection)
    for layer in layers_of(model).values():
        assert (per_expert(layer) == 3).all()
    trained, _ = model.get_nb_trainable_parameters()
    assert trained == 3 * 4 * (48 + 16)  # k x experts x neurons


def test_experts_draw_their_own_random_entries():
    support = (
        layers_of(adapted(selection="random"))["model.layers.0.mlp.experts.gate_up_proj"].deltas["default"].support
    )
    each = support.indices.view(4, 48, 2)
    assert all(not torch.equal(each[0], each[number]) for number in (1, 2, 3))


SCORERS = {"gradient": partial(gradient_scores, loss="model"), "activation": activation_scores}


@pytest.mark.parametrize("scope", ["neuron", "layer", "network"])
@pytest.mark.parametrize("criterion", ["magnitude", "reverse", *SCORERS])
@EACH_LAYOUT
def test_the_best_of_each_scope(name, criterion, scope):
    """A neuron is one of an expert's, a layer one expert's matrix, the network all of them."""
    selection = criterion if scope == "neuron" else f"{criterion}_{scope}"
    config = NeuroAdaConfig(k=2, target_modules=["experts"], selection=selection)
    ranks = {key: parameter.detach() for key, parameter in tiny(name).named_parameters()}
    if criterion in SCORERS:
        ranks = dict(SCORERS[criterion](tiny(name), DATA, progress=False))
        config = config.with_scores(ranks)
    scores, masks, wanted = [], [], []
    for key, layer in layers_of(get_peft_model(tiny(name), config)).items():
        values = neurons(name, ranks[key]).abs() * (-1 if criterion == "reverse" else 1)
        experts, rows, fan_in = values.shape
        mask = torch.zeros(experts * rows, fan_in, dtype=torch.bool)
        for row, column in positions(layer.deltas["default"].support):
            mask[row, column] = True
        parts = {"neuron": experts * rows, "layer": experts, "network": 1}[scope]
        scores += [*values.reshape(parts, -1)]
        masks += [*mask.view(parts, -1)]
        wanted += [2 * experts * rows // parts] * parts
    if scope == "network":
        scores, masks, wanted = [torch.cat(scores)], [torch.cat(masks)], [sum(wanted)]
    for own, mask, budget in zip(scores, masks, wanted, strict=True):
        assert int(mask.sum()) == budget
        assert own[mask].min() >= own[~mask].max()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_one_gradient_of_all_experts_is_alive_at_a_time(implementation, tmp_path):
    """Of four blocks: an ordinary pass ends with eight. Scoring by activations makes none."""
    base = tiny(hidden_size=128, intermediate_size=192, num_hidden_layers=4)
    base.set_experts_implementation(implementation)
    few = token_ids(1, 4)  # so that weights, and not activations, fill the memory
    data = [{"input_ids": few, "labels": few}]
    experts = [p for key, p in base.named_parameters() if ".experts." in key]
    config, largest = NeuroAdaConfig(target_modules=["experts"]), max(p.nbytes for p in experts)
    options = {"loss": "model", "offload": str(tmp_path), "config": config, "progress": False}
    assert peak_bytes(lambda: gradient_scores(base, data, **options)) < 2 * largest < sum(p.nbytes for p in experts)
    if implementation != "batched_mm":  # whose own forward copies an expert for each token
        assert peak_bytes(lambda: activation_scores(base, data, config=config, progress=False)) < largest


def test_a_share_of_the_neurons_of_each_expert():
    for layer in layers_of(adapted(neuron_ratio=0.25)).values():
        counts = per_expert(layer)
        assert ((counts > 0).sum(1) == counts.shape[1] // 4).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@EACH_LAYOUT
def test_gradient_scores_are_the_gradients(name, implementation):
    base = tiny(name)
    if name != "llama4_text":
        base.set_experts_implementation(implementation)
    before = base.config._experts_implementation
    scores = gradient_scores(base, DATA, loss="model", progress=False)
    assert base.config._experts_implementation == before
    base(**DATA[0]).loss.backward()
    for key in layers_of(adapted(name)):
        torch.testing.assert_close(scores[key], base.get_parameter(key).grad, atol=1e-5, rtol=1e-4)


def routed(base):
    """The module of experts, the hidden states that it gets, and which experts compute them where it is told."""
    module = next(m for m in base.modules() if "Experts" in type(m).__name__)
    seen = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args))
    base(**DATA[0])
    handle.remove()
    x, *routing = seen[0]
    return module, x, routing


@EACH_LAYOUT
def test_activation_scores_are_weights_times_the_mean_input_of_the_expert(name):
    """Also of a model with adapters; the inputs of the first product are the hidden states that are routed."""
    base = tiny(name)
    module, x, routing = routed(base)
    key = next(key for key in layers_of(adapted(name)) if key.endswith("gate_up_proj"))
    for model in (base, adapted(name)):
        scores = activation_scores(model, DATA, progress=False)
        for expert in range(4):
            if routing:
                own = x[(routing[0] == expert).any(1)]
            else:
                own = x.view(4, -1, 16)[expert]
                own = own[own.any(1)]
            mean = own.abs().mean(0) if len(own) else torch.zeros(16)
            weight = neurons(name, base.get_parameter(key).detach())[expert]
            torch.testing.assert_close(neurons(name, scores[key])[expert], weight.abs() * mean)
        assert "forward" not in vars(module)


def test_scores_have_to_fit():
    scores = {f"model.layers.0.mlp.experts.{bank}_proj": torch.ones(4, 16, 48) for bank in ("gate_up", "down")}
    config = NeuroAdaConfig(target_modules=["experts"], selection="gradient")
    with pytest.raises(ValueError, match=r"gate_up_proj'\] has shape \(4, 16, 48\).*\(4, 48, 16\)"):
        get_peft_model(tiny(), config.with_scores(scores))


@pytest.mark.parametrize("selection", ["magnitude", "magnitude_layer", "magnitude_network"])
@EACH_LAYOUT
def test_only_some_experts(name, selection, tmp_path):
    model = adapted(name, k=2, selection=selection, experts_to_transform=[3, 1])
    for layer in layers_of(model).values():
        counts = per_expert(layer)
        assert not counts[[0, 2]].any() and counts[[1, 3]].sum() > 0
    trained, _ = model.get_nb_trainable_parameters()
    assert trained == 2 * 2 * (48 + 16)
    model(**DATA[0]).loss.backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny(name), tmp_path)
    assert torch.equal(run(loaded, input_ids=IDS), run(model, input_ids=IDS))


@EACH_LAYOUT
def test_the_busiest_experts_are_those_that_most_tokens_are_routed_to(name):
    base = tiny(name)
    module, x, routing = routed(base)
    load = routing[0].flatten().bincount(minlength=4) if routing else x.view(4, -1, 16).any(-1).sum(1)
    found = busiest_experts(base, DATA, 0.5, progress=False)
    (path,) = found
    assert base.get_submodule(path) is module
    assert found[path] == sorted(load.argsort(descending=True, stable=True)[:2].tolist())
    assert busiest_experts(adapted(name), DATA, 0.5, progress=False).keys() == {path}
    model = adapted(name, experts_to_transform=found)
    assert [bool(counts.any()) for counts in per_expert(next(iter(layers_of(model).values())))] == [
        expert in found[path] for expert in range(4)
    ]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ([4], r"experts_to_transform=\[4\].*experts 0 to 3"),
        ([], "name some of these"),
        ({"layers.7.mlp.experts": [0]}, "lacks 'model.layers.0.mlp.experts'"),
    ],
)
def test_experts_that_are_not_there(wanted, message):
    base = tiny()
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, NeuroAdaConfig(target_modules=["experts"], experts_to_transform=wanted))
    assert not layers_of(base)


def test_a_model_without_experts_has_no_busy_ones():
    with pytest.raises(ValueError, match="no fused experts"):
        busiest_experts(torch.nn.Linear(2, 2), DATA)
