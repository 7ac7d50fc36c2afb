"""What `target_modules=None` leaves out: all that a task puts on top of the pretrained model."""

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification

from peft_ext import NeuroAdaConfig
from tests.contract._common import fill, layers_of
from tests.contract._untouched import Untouched


SIZES = {"vocab_size": 64, "max_position_embeddings": 32, "num_labels": 3}
BERT = {**SIZES, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
BART = {
    **SIZES, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "pad_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
# Name, the pretrained model without a task's head, options, and the names that would be adapted by mistake.
MODELS = {
    "bart": ("BartModel", "BartConfig", BART, {"classification_head.dense", "classification_head.out_proj"}),
    "bert": ("BertForMaskedLM", "BertConfig", BERT, {"bert.pooler.dense", "classifier"}),
    "distilbert": (
        "DistilBertModel", "DistilBertConfig",
        {**SIZES, "dim": 16, "hidden_dim": 32, "n_layers": 1, "n_heads": 2}, {"pre_classifier", "classifier"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore")
def test_adapter_on_a_new_head_is_loaded_onto_another(name, tmp_path):
    model_class, config_class, options, left_out = MODELS[name]
    config = getattr(transformers, config_class)(**options)
    getattr(transformers, model_class)(config).save_pretrained(tmp_path / "base")

    def with_new_head():
        return AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3).eval()

    model = fill(get_peft_model(with_new_head(), NeuroAdaConfig(task_type="SEQ_CLS"))).eval()
    names = {key.removeprefix("base_model.model.") for key in layers_of(model)}
    assert names and not any(key == out or key.startswith(f"{out}.") for key in names for out in left_out)
    model.save_pretrained(tmp_path / "adapter")
    base = with_new_head()
    ids = torch.tensor([[3, 4, 5, 6, 7, 2]])  # BART classifies by the end-of-sequence token
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    hidden = [m(ids, output_hidden_states=True) for m in (model, loaded)]
    states = [getattr(h, "hidden_states", None) or h.decoder_hidden_states for h in hidden]
    assert torch.equal(states[0][-1], states[1][-1])


def test_blocks_that_are_not_there(llama):
    with Untouched(llama), pytest.raises(ValueError, match=r"layers_to_transform=\[9\].*leave no layer"):
        get_peft_model(llama, NeuroAdaConfig(layers_to_transform=[9]))
