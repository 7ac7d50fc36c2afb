"""TRL's `SFTTrainer` makes the adapter from its config."""

import pytest
import torch
from peft import PeftModel

from peft_ext import NeuroAdaConfig
from tests.tuners.neuroada._common import assert_equal_bits, base_bits, logits, wrapped


trl = pytest.importorskip("trl", reason="trl is not installed: pip install 'peft-ext[trl]'")
datasets = pytest.importorskip("datasets", reason="datasets is not installed: pip install 'peft-ext[trl]'")

WORDS = ["the", "a", "cat", "dog", "bird", "sees", "hears", "likes", "small", "big", "house", "tree", "and"]


@pytest.fixture
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.mark.parametrize("options", [{"k": 2}, {"selection": "magnitude_network", "backend": "folded"}], ids=str)
def test_sft_trains_saves_and_reloads(llama, tiny, tokenizer, ids, tmp_path, options):
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(WORDS), (16, 6), generator=generator).tolist()
    data = datasets.Dataset.from_list([{"text": " ".join(WORDS[i] for i in row)} for row in picks])
    before = base_bits(llama)
    trainer = trl.SFTTrainer(
        model=llama,
        args=trl.SFTConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=4,
            max_steps=6,
            learning_rate=3e-2,
            max_length=16,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
            dataset_num_proc=None,
        ),
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=NeuroAdaConfig(task_type="CAUSAL_LM", **options),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert wrapped(trainer.model)
    assert_equal_bits(base_bits(trainer.model), before)
    trainer.save_model(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path / "adapter")
    assert torch.equal(logits(loaded, ids), logits(trainer.model.eval(), ids))
