"""Two processes train, save and choose what one does: DistributedDataParallel, FSDP1 and FSDP2 through accelerate."""

import re

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from tests._processes import results_of
from tests.distributed._trainings import base, tokens
from tests.tuners.neuroada._common import logits


pytestmark = pytest.mark.slow

TRAIN = [
    *[("train", method, "ddp") for method in ("neuroada", "psn", "gps")],
    *[("train", method, "fsdp1") for method in ("neuroada", "gps")],
    *[("train", method, "fsdp2") for method in ("neuroada", "psn", "gps", "ragged", "experts")],
]
CASES = [
    *TRAIN,
    ("resume", "neuroada", "fsdp2"),
    ("load", "neuroada", "fsdp2"),
    ("select", "neuroada", "fsdp2"),
    ("select", "ragged", "fsdp2"),
    ("resume", "experts", "fsdp2"),
    ("select", "experts", "fsdp2"),
    ("select", "neuroada", "merge"),
    ("select", "neuroada", "fsdp1"),
]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    methods = list(dict.fromkeys(method for _, method, _ in TRAIN))
    cases = [("train", method, "alone") for method in methods]
    (results,) = results_of("tests.distributed._trainings", tmp_path_factory.mktemp("one"), 1, cases)
    return dict(zip(methods, results, strict=True))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    results = results_of("tests.distributed._trainings", tmp_path_factory.mktemp("two"), 2, CASES)
    return {case: [process[number] for process in results] for number, case in enumerate(CASES)}


@pytest.mark.parametrize("case", TRAIN, ids="-".join)
def test_training_and_saving(one, two, case):
    _, method, kind = case
    alone = one[method]
    for process in two[case]:
        assert "error" not in process, process
        assert process["sharded"] == kind.startswith("fsdp")
        for indices, expected in zip(process["indices"], alone["indices"], strict=True):
            assert torch.equal(indices, expected)  # whole in every process
    saved = load_file(f"{two[case][0]['folder']}/adapter_model.safetensors")
    expected = load_file(f"{alone['folder']}/adapter_model.safetensors")
    assert saved.keys() == expected.keys()
    for name, tensor in expected.items():
        # Sums over samples are taken in another order.
        torch.testing.assert_close(saved[name], tensor, rtol=0, atol=1e-6 if tensor.is_floating_point() else 0)
    folders = [result["folder"] for result in (two[case][0], alone)]
    loaded = [PeftModel.from_pretrained(base(method), folder).eval() for folder in folders]
    mine, theirs = (logits(model, tokens()) for model in loaded)
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(theirs, logits(base(method).eval(), tokens()), atol=1e-2)


@pytest.mark.parametrize("method", ["neuroada", "experts"])
def test_training_goes_on_from_a_sharded_checkpoint(two, method):
    for process in two["resume", method, "fsdp2"]:
        assert process["straight"].keys() == process["resumed"].keys()
        for name, values in process["straight"].items():
            assert torch.equal(process["resumed"][name], values), name


def test_a_state_dict_of_the_first_process_reaches_all_with_its_entries(two):
    """torch hands parameters and buffers to the other processes, and the entries are neither."""
    expected = two["load", "neuroada", "fsdp2"][0]["expected"]
    for process in two["load", "neuroada", "fsdp2"]:
        assert process["found"].keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(process["found"][name], tensor), name


@pytest.mark.parametrize("method", ["neuroada", "ragged", "experts"])
def test_entries_of_a_sharded_model_are_those_of_the_whole_one(two, one, method):
    expected = load_file(f"{one[method]['folder']}/adapter_model.safetensors")
    for process in two["select", method, "fsdp2"]:
        assert len(process["state"]) == len(expected)
        for name, tensor in process["state"].items():
            if not name.endswith(".weight"):
                assert torch.equal(tensor, expected[name.replace(".default", "")].to(tensor.dtype)), name


@pytest.mark.parametrize(
    ("case", "match"),
    [
        (("select", "neuroada", "merge"), "sharded over several processes.*one process"),
        (("select", "neuroada", "fsdp1"), "FSDP1 has sharded.*Adapt the model first"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_what_a_sharded_model_cannot_do_says_what_to_do_instead(two, case, match):
    for process in two[case]:
        assert re.search(match, process["error"])
