"""What the documentation's snippets name: tiny models under their Hub ids, as folders, and data sets."""

import json
import shutil
from pathlib import Path

import torch
import transformers as hf
from datasets import Dataset
from peft import get_peft_model
from PIL import Image

from peft_ext import NeuroAdaConfig
from tests.knockout._processors import tokenizer


SHAPES_LLAVA = Path(__file__).parents[2] / "examples" / "shapes_llava"
LANGUAGE_MODELS = ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.1-8B")


def make_hub(folder):
    """Folders that `from_pretrained` and `load_dataset` find by the ids that the snippets give."""
    words = tokenizer()
    small = {"intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"vocab_size": len(words), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    llama = hf.LlamaForCausalLM(hf.LlamaConfig(hidden_size=32, **small, **ids))
    for name in LANGUAGE_MODELS:
        llama.save_pretrained(folder / name)
        words.save_pretrained(folder / name)
    experts = {"moe_intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 2, "num_key_value_heads": 2}
    mixture = hf.Qwen3MoeConfig(hidden_size=32, head_dim=8, **experts, **small, **ids)
    hf.Qwen3MoeForCausalLM(mixture).save_pretrained(folder / "Qwen/Qwen3-30B-A3B")
    bert = hf.DistilBertConfig(dim=32, hidden_dim=48, n_layers=2, n_heads=4, vocab_size=len(words), pad_token_id=0)
    hf.DistilBertModel(bert).save_pretrained(folder / "distilbert/distilbert-base-uncased")
    words.save_pretrained(folder / "distilbert/distilbert-base-uncased")
    vit = hf.ViTConfig(hidden_size=32, image_size=16, patch_size=8, **small)
    hf.ViTModel(vit).save_pretrained(folder / "google/vit-base-patch16-224-in21k")
    processor = hf.ViTImageProcessor(size={"height": 16, "width": 16})
    processor.save_pretrained(folder / "google/vit-base-patch16-224-in21k")
    shutil.copytree(SHAPES_LLAVA, folder / "llava-hf/llava-1.5-7b-hf")
    (folder / "trl-lib/Capybara").mkdir(parents=True)
    with open(folder / "trl-lib/Capybara/train.jsonl", "w") as file:
        for _ in range(8):
            file.write(json.dumps({"text": "Is the mirror to the left of the bed?"}) + "\n")
    pictures = [
        {"img": Image.new("RGB", (16, 16), color), "label": i % 2} for i, color in enumerate(["red", "blue"] * 4)
    ]
    opinions = [{"text": "Is the mirror to the left of the bed?", "label": i % 2} for i in range(8)]
    for name, rows in {"uoft-cs/cifar10": pictures, "stanfordnlp/imdb": opinions}.items():
        (folder / name).mkdir(parents=True)
        Dataset.from_list(rows).to_parquet(folder / name / "train.parquet")
    Image.new("RGB", (64, 64), "red").save(folder / "picture.png")


def _classifier(name="distilbert/distilbert-base-uncased"):
    return hf.AutoModelForSequenceClassification.from_pretrained(name, num_labels=2)


def _language_model():
    return hf.AutoModelForCausalLM.from_pretrained(LANGUAGE_MODELS[0])


def _sentences():
    ids = torch.randint(4, 60, (8, 12))
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": i % 2} for i, row in enumerate(ids)]


def _portraits():
    images = [{"pixel_values": torch.randn(3, 16, 16)} for _ in range(8)]
    return [{**image, "labels_kind": i % 2, "labels_age": 0.5 * i} for i, image in enumerate(images)]


def _texts():
    return Dataset.from_list([{"text": "Is the mirror to the left of the bed?"}] * 8)


def _loader(rows, size=4):
    return torch.utils.data.DataLoader(rows, batch_size=size)


def _language_rows():
    return [{**row, "labels": row["input_ids"]} for row in _sentences()]


def _question():
    """A model of the shapes world with an image, a question, and the inputs made of them."""
    model = hf.AutoModelForImageTextToText.from_pretrained("llava-hf/llava-1.5-7b-hf")
    processor = hf.AutoProcessor.from_pretrained("llava-hf/llava-1.5-7b-hf")
    image, question = Image.new("RGB", (64, 64), "red"), "what color is the circle ?"
    inputs = processor(images=image, text=f"<image> {question}", return_tensors="pt")
    return {"model": model, "processor": processor, "image": image, "question": question, "inputs": inputs}


def _saved_adapter():
    """An adapter of the first language model, in a folder."""
    model = get_peft_model(hf.AutoModelForCausalLM.from_pretrained(LANGUAGE_MODELS[0]), NeuroAdaConfig(k=1))
    shutil.rmtree("my-adapter", ignore_errors=True)
    model.save_pretrained("my-adapter")
    return {}


def names_for(page):
    """What the snippets of a page take for granted."""
    made = {
        "../CONTRIBUTING.md": lambda: {"model": _classifier()},
        "index.md": lambda: {"model": _classifier()},
        "methods/neuroada.md": lambda: {"model": _classifier(), "inputs": {"input_ids": torch.tensor([[5, 6]])}},
        "methods/gps.md": lambda: {
            "model": _classifier(), "base_model": _classifier(), "dataloader": _loader(_sentences()),
            "text_dataloader": _loader(_language_rows()),
        },
        "methods/psn.md": lambda: {"model": _classifier()},
        "methods/mores.md": lambda: {"llava": _question()["model"]},
        "methods/multi-task.md": lambda: {
            "model": _classifier(), "sentiment_dataset": _sentences(), "topic_dataset": _sentences()
        },
        "methods/knockout.md": _question,
        "knockout-report.md": _question,
        "how-to/experts.md": lambda: {"dataloader": _loader(_language_rows())},
        "how-to/multi-task.md": lambda: {
            "summaries": _texts(), "questions": _texts(), "dataset": _portraits(), "model": _classifier(),
            "train_dataset": _sentences(), "film_reviews": _sentences(), "book_reviews": _sentences(),
        },
        "how-to/serving.md": _saved_adapter,
    }  # fmt: skip
    return made.get(page, dict)()
