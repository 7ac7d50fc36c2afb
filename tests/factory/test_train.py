"""The two stages through the command, on the shapes world at the smallest size."""

import json
import shutil
from dataclasses import asdict

import pytest
import torch
import yaml
from _shapes.parts import SHAPES, write_questions
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file

from peft_ext.cli import main
from peft_ext.factory import load
from peft_ext.factory.data import Collator, sample_of
from peft_ext.factory.evaluate import generate, load_adapted
from peft_ext.factory.parts import prepare
from peft_ext.factory.train import LlavaTrainer, Settings, _trainer, defaults, load_data, read_settings, train
from tests._processes import launch


PARTS = TOWER, CONNECTOR, DECODER = ("vision_tower", "multi_modal_projector", "language_model")
TEXT_ALONE = [{"from": "human", "value": "is there a red circle ?"}, {"from": "gpt", "value": "Yes"}]
SMALL = {
    "learning_rate": 1e-2,
    "max_steps": 3,
    "per_device_train_batch_size": 4,
    "dataloader_num_workers": 0,
    "use_cpu": True,
    "dataloader_pin_memory": False,
    "save_strategy": "no",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Twelve conversations of two turns, and four of text alone."""
    file = tmp_path_factory.mktemp("data") / "mix.json"
    write_questions(file, 12, 0, turns=2)
    entries = json.loads(file.read_text())
    entries += [{"id": f"text{number}", "conversations": TEXT_ALONE} for number in range(4)]
    file.write_text(json.dumps(entries))
    return file


@pytest.fixture
def settings(composed_shapes, data, tmp_path):
    def make(stage="tune", arguments=None, **changed):
        base = yaml.safe_load(defaults(stage))
        base |= {"model": str(composed_shapes / "composed"), "output": str(tmp_path / "out")}
        base["data"] = [{"path": str(data)}]
        base["arguments"] |= SMALL | (arguments or {})
        return Settings(**(base | changed))

    return make


def changed_parts(before, after):
    """Names of a Llava's parts that differ between two models."""
    mine, theirs = before.state_dict(), after.state_dict()
    names = [key for key, tensor in mine.items() if not torch.equal(tensor, theirs[key])]
    return {part for part in PARTS for key in names if part in key}


def test_both_stages_through_the_command(composed_shapes, data, tmp_path, capsys):
    config = tmp_path / "stage.yaml"
    config.write_text(yaml.safe_dump({"data": [{"path": str(data)}], "arguments": SMALL}))
    folders = {name: str(tmp_path / name) for name in ("aligned", "tuned", "report")}
    composed = str(composed_shapes / "composed")
    options = ["--config", str(config), "--set"]
    aligning = [*options, f"model={composed}", "--set", f"output={folders['aligned']}"]
    assert main(["llava", "train", "align", *aligning]) == 0
    assert "connector 7,296, language_model 0" in capsys.readouterr().out
    assert changed_parts(load(composed).model, load(folders["aligned"]).model) == {CONNECTOR}
    options += [f"model={folders['aligned']}", "--set", f"output={folders['tuned']}", "--method", "mores-b"]
    assert main(["llava", "train", "tune", *options]) == 0
    assert "connector 7,296, language_model 774" in capsys.readouterr().out  # 6 · (2 · 64 + 1)
    report = json.loads((tmp_path / "tuned" / "report.json").read_text())
    assert report["steps"] == 3 and report["trained_parameters"]["language_model"] == 774
    options = ["--model", folders["aligned"], "--adapter", folders["tuned"], "--task", "llava"]
    options += f"--questions {data} --limit 4 --lmar-samples 2 --out {folders['report']} --before".split()
    assert main(["llava", "evaluate", *options]) == 0
    assert "| exact match | LMAR |" in capsys.readouterr().out
    before, after = json.loads((tmp_path / "report" / "report.json").read_text()).values()
    assert 0 <= after["exact match"] <= 100 and len(before["lmar"]) == len(after["lmar"]) == 6
    files = {"report.json", "table.md", "lmar.png", "lmar.csv", "answers_0.jsonl", "answers_1.jsonl"}
    assert {file.name for file in (tmp_path / "report").iterdir()} == files


@pytest.mark.parametrize("library", ["trainer", "trl"])
def test_a_loss_is_that_of_the_labels(settings, library):
    """The first step's loss, computed from the batch that the trainer drew."""
    one = {"max_steps": 1, "train_sampling_strategy": "sequential"}
    made = settings(library=library, arguments=one, connector="frozen")
    report = train(made)
    model, processor = (composed := load(made.model)).model, composed.processor
    rows = [load_data(made, 16)[number] for number in range(4)]
    batch = Collator(processor)(rows)
    with torch.no_grad():
        logits = model(**{key: batch[key] for key in batch if key != "labels"}).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert report["losses"][0] == pytest.approx(expected.item(), rel=1e-3)


@pytest.mark.parametrize("tower, connector, decoder", [(1, 1, 1), (1, 0, 0), (0, 1, 1)])
def test_whole_parts_are_trained_and_no_others(settings, tower, connector, decoder):
    modes = ["full" if mode else "frozen" for mode in (tower, connector, decoder)]
    made = settings(**dict(zip(("vision_tower", "connector", "language_model"), modes, strict=True)))
    train(made)
    expected = {part for part, mode in zip(PARTS, modes, strict=True) if mode == "full"}
    assert changed_parts(load(made.model).model, load(made.output).model) == expected


def test_an_adapter_beside_a_tower_and_a_connector_in_full(settings):
    made = settings(vision_tower="full", connector="full", language_model={"peft_type": "LORA", "r": 2})
    train(made)
    base = load(made.model).model
    merged = PeftModel.from_pretrained(load(made.model).model, made.output).merge_and_unload()
    assert changed_parts(base, merged) == set(PARTS)


def test_a_stage_with_another_template_leaves_the_models_own(settings, composed_shapes):
    made = settings("align", chat_template="plain", data=[{"path": str(composed_shapes / "one.json")}])
    Image.new("RGB", (32, 32)).save(composed_shapes / "one.png")
    turns = [{"from": "human", "value": "<image>\nwhat ?"}, {"from": "gpt", "value": "Yes"}]
    (composed_shapes / "one.json").write_text(json.dumps([{"conversations": turns, "image": "one.png"}]))
    train(made)
    assert load(made.output).processor.chat_template == load(made.model).processor.chat_template


def test_a_model_without_a_template_is_refused(settings):
    with pytest.raises(ValueError, match="has no chat template; name one"):
        train(settings(model=str(SHAPES)))


def test_batches_of_text_alone_train_nothing_but_do_not_fail(settings, composed_shapes, tmp_path):
    file = tmp_path / "text.json"
    file.write_text(json.dumps([{"conversations": TEXT_ALONE}] * 4))
    made = settings("align", data=[{"path": str(file)}])
    train(made)
    assert changed_parts(load(made.model).model, load(made.output).model) == set()


def test_a_resumed_run_equals_one_that_went_through(settings, tmp_path, monkeypatch):
    saving = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "save_total_limit": None}
    train(settings(language_model="mores-1@25", arguments=saving))
    adapter = tmp_path / "out" / "adapter_model.safetensors"
    expected, halfway = load_file(adapter), load_file(tmp_path / "out" / "checkpoint-2" / adapter.name)
    adapter.unlink()
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    steps = []
    step = LlavaTrainer.training_step
    monkeypatch.setattr(LlavaTrainer, "training_step", lambda *args, **more: steps.append(1) or step(*args, **more))
    train(settings(language_model="mores-1@25", arguments=saving, resume=True))
    assert len(steps) == 2
    for key, tensor in load_file(adapter).items():
        torch.testing.assert_close(tensor, expected[key])
        assert not torch.allclose(halfway[key], expected[key])


def test_bf16_trains_in_fp32_on_a_frozen_bf16_base(settings, composed_shapes, tmp_path):
    half = load(str(composed_shapes / "composed"))
    half.model.bfloat16().save_pretrained(tmp_path / "half")
    half.processor.save_pretrained(tmp_path / "half")
    made = settings(model=str(tmp_path / "half"), language_model="mores-1@25", arguments={"bf16": True})
    train(made)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert any("projector" in key for key in tensors) and any("mores" in key for key in tensors)
    composed = load_adapted(made.model, made.output)
    row = load_data(made, 16)[0]
    assert len(generate(composed, [sample_of(row)], 1, 2)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mores-1@25", "lora-2"])
def test_two_processes_train_as_one(settings, tmp_path, method):
    """Also where a process has text alone: the last batch is half of it."""
    arguments = {"max_steps": 4, "train_sampling_strategy": "sequential", "logging_steps": 1}
    one = train(settings(language_model=method, output=str(tmp_path / "one"), arguments=arguments))
    two = settings(language_model=method, arguments=arguments | {"per_device_train_batch_size": 2})
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(asdict(two)))
    command = ["llava", "train", "tune", "--config", str(tmp_path / "two.yaml")]
    launch("peft_ext.cli", tmp_path / "logs", 2, *command)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["losses"] == pytest.approx(one["losses"], rel=1e-3)
    mine, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "out"))
    for key, tensor in mine.items():
        torch.testing.assert_close(tensor, theirs[key], rtol=1e-2, atol=1e-4)


def test_a_data_set_is_streamed_from_a_folder(settings, data, tmp_path):
    from datasets import Dataset
    from datasets import Image as Pictures

    entries = json.loads(data.read_text())[:6]
    rows = [{"messages": [{"role": "user", "content": e["conversations"][0]["value"]},
                          {"role": "assistant", "content": e["conversations"][1]["value"]}],
             "images": [str(data.parent / e["image"])]} for e in entries]  # fmt: skip
    table = Dataset.from_list(rows).cast_column("images", [Pictures()])
    table.to_parquet(tmp_path / "set" / "train.parquet")
    made = settings(data=[{"path": str(tmp_path / "set")}], streaming=True, arguments={"max_steps": 2})
    assert train(made)["steps"] == 2
    whole = settings(data=[{"path": str(tmp_path / "set")}], arguments={"max_steps": 1})
    assert load_data(whole, 16)["length"][0] > 16 and train(whole)["steps"] == 1
    with pytest.raises(ValueError, match=r"set arguments\.max_steps"):
        settings(data=[{"path": "x"}], streaming=True, arguments={"max_steps": -1})


def test_samples_of_like_length_come_together(settings):
    made = settings(arguments={"train_sampling_strategy": "group_by_length", "per_device_train_batch_size": 2})
    composed = load(made.model)
    composed.model = prepare(composed.model, "frozen", "full", "frozen")
    trainer = _trainer(made, composed, load_data(made, 16))
    lengths = trainer.train_dataset["length"]
    order = [lengths[number] for number in trainer._get_train_sampler()]
    together = [abs(first - second) for first, second in zip(order[::2], order[1::2], strict=True)]
    apart = [abs(first - second) for first in lengths for second in lengths]
    assert sum(together) / len(together) < 0.7 * sum(apart) / len(apart)


def test_the_connector_has_a_learning_rate_of_its_own(settings):
    made = settings(connector_learning_rate=1e-5, language_model="lora-2")
    composed = load(made.model)
    composed.model = prepare(composed.model, "frozen", "full", "lora-2")
    trainer = _trainer(made, composed, load_data(made, 16))
    assert isinstance(trainer, LlavaTrainer)
    rates = {}
    names = {id(p): name for name, p in composed.model.named_parameters()}
    for group in trainer.create_optimizer().param_groups:
        for parameter in group["params"]:
            rates.setdefault("multi_modal_projector" in names[id(parameter)], set()).add(group["lr"])
    assert rates == {True: {1e-5}, False: {1e-2}}


def test_stages_are_the_papers_recipe():
    align, tune = (yaml.safe_load(defaults(stage)) for stage in ("align", "tune"))
    assert (align["vision_tower"], align["connector"], align["language_model"]) == ("frozen", "full", "frozen")
    assert align["arguments"]["learning_rate"] == 1e-3 and tune["connector_learning_rate"] == 2e-5
    assert 8 * align["arguments"]["per_device_train_batch_size"] == 256
    assert 8 * tune["arguments"]["per_device_train_batch_size"] == 128


@pytest.mark.parametrize(
    "changes, message",
    [
        (["modle=x"], "'modle' is no setting; known are arguments"),
        (["model"], "write key=value"),
        (["arguments.lerning_rate=1"], "arguments.lerning_rate is no argument of TrainingArguments"),
        (["language_model=lora-x"], "method='lora-x' is not known"),
        (["library=lightning"], "library='lightning'"),
        (["output=null"], "output is not given"),
        (["data=[{path: absent.json}]"], "there is no file absent.json"),
        (["connector=linear"], "the connector is 'frozen' or 'full'"),
        (["vision_tower=lora-2", "language_model=lora-4"], "different adapters"),
        (["vision_tower=lora-2", "language_model=full"], "beside an adapter, only"),
        (["vision_tower=mores-b", "language_model=mores-b"], "it can't adapt the vision_tower"),
        (["connector=frozen", "language_model=frozen"], "nothing is trained"),
    ],
)
def test_wrong_settings_are_refused(changes, message, composed_shapes, data, tmp_path, capsys):
    given = [f"model={composed_shapes / 'composed'}", f"output={tmp_path / 'out'}", f"data=[{{path: {data}}}]"]
    small = [f"arguments.{key}={json.dumps(value)}" for key, value in SMALL.items()]
    options = [option for change in [*small, *given, *changes] for option in ("--set", change)]
    assert main(["llava", "train", "tune", *options]) == 1
    assert message in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_settings_of_a_file_and_single_ones(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("model: m\noutput: o\ndata: [{path: d}]\narguments: {max_steps: 7}\n")
    made = read_settings("tune", file, ["arguments.learning_rate=3e-5", "data=[{path: e}]"])
    assert made.arguments["max_steps"] == 7 and made.arguments["weight_decay"] == 0.0
    assert made.data == [{"path": "e"}] and made.arguments["learning_rate"] == "3e-5"
