"""What is kept of each task's gradient, and where that cannot be done."""

from types import SimpleNamespace

import pytest
import torch

from peft_ext import NeuroAdaConfig
from peft_ext.mtl.gradients.gramian import CHUNK, gramian_of, layer_of
from peft_ext.mtl.gradients.task_gradients import TaskGradients
from peft_ext.mtl.parallel import refuse_unsupported


def test_sparse_adapters_keep_one_row_of_values_per_task(llama, ids):
    from peft import get_peft_model

    model = get_peft_model(llama, NeuroAdaConfig(k=2, task_type="CAUSAL_LM"))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    store = TaskGradients(trained, 3)
    for task in range(3):
        model(input_ids=ids, labels=ids.roll(task, 0)).loss.backward()
        store.collect(task)
    values = sum(p.numel() for p in trained.values())
    assert sum(row.numel() for task in store.rows for row in task.values()) == 3 * values
    assert all(p.grad is None for p in model.parameters())
    store.reduce()
    assert all(store.shared)


def test_a_tasks_gradients_lie_in_one_block():
    """Small pieces between the temporaries of backward passes would keep the heap from being used again."""
    parameters = {str(i): torch.nn.Parameter(torch.randn(3, i + 1)) for i in range(8)}
    store = TaskGradients(parameters, 2)
    given = []
    for task, names in ((0, "0123456"), (1, "1357")):
        given.append({int(name): torch.randn_like(parameters[name]) for name in names})
        for index, gradient in given[task].items():
            parameters[str(index)].grad = gradient.clone()
        store.collect(task)
    assert all(parameter.grad is None for parameter in parameters.values())
    for row, gradients in zip(store.rows, given, strict=True):
        assert len({gradient.untyped_storage().data_ptr() for gradient in row.values()}) == 1
        assert set(row) == set(gradients)
        assert all(torch.equal(row[index], gradient) for index, gradient in gradients.items())


def test_micro_batches_add_to_what_is_there_and_make_room_for_what_is_new():
    parameters = {name: torch.nn.Parameter(torch.zeros(2, 3)) for name in "ab"}
    store = TaskGradients(parameters, 1, dtype=torch.float64)
    first, second, third = torch.randn(3, 2, 3)
    parameters["a"].grad = first.clone()
    store.collect(0)
    parameters["a"].grad, parameters["b"].grad = second.clone(), third.clone()
    store.collect(0)
    assert torch.equal(store.rows[0][0], first.double() + second.double())
    assert torch.equal(store.rows[0][1], third.double())


def test_a_stand_ins_gradients_are_dropped():
    parameters = {name: torch.nn.Parameter(torch.zeros(2)) for name in "ab"}
    store = TaskGradients(parameters, 1)
    parameters["a"].grad = torch.ones(2)
    store.collect(0)
    for parameter in parameters.values():
        parameter.grad = torch.full((2,), float("nan"))
    store.collect(0, is_stand_in=True)
    assert list(store.rows[0]) == [0] and torch.equal(store.rows[0][0], torch.ones(2))
    assert all(parameter.grad is None for parameter in parameters.values())


def test_gramian_is_exact_over_chunks():
    generator = torch.Generator().manual_seed(0)
    rows = 1e-6 * torch.randn(3, CHUNK + 17, generator=generator)
    expected = rows.double() @ rows.double().T
    torch.testing.assert_close(gramian_of(list(rows)), expected, rtol=1e-12, atol=0)
    with_gap = gramian_of([rows[0], None, rows[2]])
    assert not with_gap[1].any()
    torch.testing.assert_close(with_gap[0, 2], expected[0, 2], rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("base_model.model.model.layers.3.mlp.up_proj.neuroada_values.default.weight", "model.layers.3"),
        ("trunk.0.weight", "trunk.0"),
        ("encoder.full.weight", "encoder.full"),
    ],
)
def test_layers_are_blocks(name, layer):
    assert layer_of(name) == layer


def trainer_with(**options):
    state = SimpleNamespace(fsdp_plugin=options.get("fsdp_plugin"))
    accelerator = SimpleNamespace(
        distributed_type=options.get("distributed_type", "DistributedType.NO"),
        state=state,
        parallelism_config=options.get("parallelism_config"),
    )
    args = SimpleNamespace(
        n_gpu=options.get("n_gpu", 1),
        optim=options.get("optim", "adamw_torch"),
        noise_floor_steps=options.get("noise_floor_steps", 0),
    )
    return SimpleNamespace(args=args, accelerator=accelerator, is_deepspeed_enabled=options.get("deepspeed", False))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_gpu": 2}, "nn.DataParallel"),
        ({"deepspeed": True}, "DeepSpeed"),
        ({"distributed_type": "DistributedType.DEEPSPEED"}, "DeepSpeed"),
        ({"distributed_type": "DistributedType.MEGATRON_LM"}, "MEGATRON_LM"),
        ({"fsdp_plugin": SimpleNamespace(fsdp_version=1)}, "fsdp_version: 2"),
        ({"fsdp_plugin": SimpleNamespace(fsdp_version=2), "noise_floor_steps": 5}, "noise_floor_steps=5"),
        ({"optim": "lomo"}, "optim='lomo'"),
        ({"optim": "galore_adamw_layerwise"}, "optim='galore_adamw_layerwise'"),
        ({"parallelism_config": SimpleNamespace(tp_size=2)}, "tensor, context or hybrid"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_set_ups_without_gradients_per_task_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        refuse_unsupported(trainer_with(**options))


def test_other_set_ups_are_not():
    refuse_unsupported(trainer_with())
    refuse_unsupported(trainer_with(noise_floor_steps=5))
    refuse_unsupported(trainer_with(fsdp_plugin=SimpleNamespace(fsdp_version=2)))
