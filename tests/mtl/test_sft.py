"""TRL's trainer with sparse adapters on two text tasks."""

import copy

import pytest
from PIL import Image

from tests.mtl._models import assert_same_weights
from tests.mtl._visual import Watching, assert_same, make, results


trl = pytest.importorskip("trl", reason="trl is not installed: pip install 'peft-ext[trl]'")
datasets = pytest.importorskip("datasets")

from peft_ext.mtl import MTLSFTConfig, MTLSFTTrainer  # noqa: E402
from tests.mtl._sft import in_one, run, texts  # noqa: E402


class WatchedSFT(Watching, MTLSFTTrainer):
    arguments = MTLSFTConfig


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A training whose steps are one batch each."""
    return run(tmp_path_factory.mktemp("whole"), mtl_method="pcgrad")


def test_neuroada_accumulates_exactly(tmp_path, whole):
    pieces = run(tmp_path, mtl_method="pcgrad", per_device_train_batch_size=4, gradient_accumulation_steps=3)
    assert_same_weights(pieces.model, whole.model, 2e-6)
    assert all(whole.mtl_state.gradients.shared)
    logs = whole.state.log_history[0]
    assert {"task_loss/short", "task_loss/long", "gradient_conflict/cos/short__long", "mean_token_accuracy"} <= set(
        logs
    )


def test_famo_trains_and_counts_tokens_once(tmp_path, whole):
    famo = run(tmp_path, mtl_method="famo", noise_floor_steps=2)
    tokens = [[entry["num_tokens"] for entry in r.state.log_history if "num_tokens" in entry] for r in (whole, famo)]
    assert tokens[0] == tokens[1]


def test_padding_free_rows_are_made_of_each_tasks_samples(tmp_path, whole):
    free = run(tmp_path, mtl_method="pcgrad", padding_free=True, max_length=None)
    assert_same_weights(free.model, whole.model, 2e-6)
    for task in ("short", "long"):
        losses = [r.state.log_history[0][f"task_loss/{task}"] for r in (whole, free)]
        assert losses[1] == pytest.approx(losses[0], abs=1e-5)


@pytest.mark.parametrize("data", [None, in_one(short=texts(1), long=texts(2))], ids=["dict", "column"])
def test_rows_packed_of_several_tasks_are_refused(tmp_path, data):
    with pytest.raises(ValueError, match="packing=True puts samples of several tasks into one row"):
        run(tmp_path, train=False, train_dataset=data, mtl_method="pcgrad", packing=True)
    with pytest.raises(ValueError, match="eval_packing=True puts samples of several tasks into one row"):
        run(tmp_path, train=False, eval_dataset=in_one(short=texts(3), long=texts(4)), eval_packing=True)


def test_a_data_set_of_several_tasks_is_evaluated_label_by_label(tmp_path):
    """Every batch has both tasks; their losses are those of each task's data set in one batch."""
    data = {"short": texts(3, 5), "long": texts(4, 7)}
    options = {"task_names": ["short", "long"], "train": False}
    mixed = in_one(**data).shuffle(seed=0)
    metrics = run(tmp_path, eval_dataset=mixed, per_device_eval_batch_size=5, **options).evaluate()
    alone = run(tmp_path, eval_dataset=data, **options).evaluate()
    for task in data:
        assert metrics[f"eval_{task}_loss"] == pytest.approx(alone[f"eval_{task}_loss"], abs=1e-5)


def test_images_stay_with_their_samples_in_trls_collator(tmp_path):
    processors = pytest.importorskip("tests.knockout._processors")
    rows = [
        {
            "task_ids": task,
            "images": [Image.effect_noise((32, 32), 60.0).convert("RGB") for _ in range(images)],
            "prompt": "<image>" * images + text,
            "completion": " Red or green",
        }
        for task, images, text in [(0, 2, "USER: Is it red?"), (0, 0, "the picture"), (1, 1, "Is the mirror left?")]
    ]
    processor = processors.llava()
    model = processors.local_model(processor)
    alone = copy.deepcopy(model)
    data = datasets.Dataset.from_list(rows)
    made = make(tmp_path, "llava", data, model, kind=WatchedSFT, collator=None, processing_class=processor)
    assert_same(results(made), "llava", rows, model=alone, collate=made.data_collator)
