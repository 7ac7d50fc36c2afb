"""Which features are scored by default: those that a classifier's head goes by, in every kind of model."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import (
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    HGNetV2Config,
    HGNetV2ForImageClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    ResNetConfig,
    ResNetForImageClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForSequenceClassification,
)

from peft_ext import GPSConfig, SupervisedContrastiveLoss, gps, gradient_scores


RANGE = {"initializer_range": 0.2}
BERT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, **RANGE}
LABELS = torch.tensor([0, 1, 0, 1])
LAST = torch.tensor([6, 6, 4, 6])  # of each text's tokens, the last that is no padding; its number is 2


def _texts(**tensors):
    ids = torch.randint(3, 64, (4, 7), generator=torch.Generator().manual_seed(0))
    ids[torch.arange(4), LAST] = 2
    ids[2, 5:] = 0
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), **tensors}


def _images(**tensors):
    return {"pixel_values": torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)), **tensors}


def _texts_by(model, config, **shape):
    """Makes a classifier of texts."""
    return lambda: model(config(**{"vocab_size": 64, "num_labels": 3, "pad_token_id": 0, **shape}))


def _images_by(model, config, **shape):
    return lambda: model(config(**shape, embedding_size=8, num_labels=3))


_gpt2 = _texts_by(GPT2ForSequenceClassification, GPT2Config, **RANGE, n_embd=16, n_layer=2, n_head=2, n_positions=16)
_llama = _texts_by(LlamaForSequenceClassification, LlamaConfig, **BERT, num_key_value_heads=2)
_roberta = _texts_by(RobertaForSequenceClassification, RobertaConfig, **BERT, max_position_embeddings=16)
_deberta = _texts_by(DebertaV2ForSequenceClassification, DebertaV2Config, **BERT, pooler_hidden_size=16)
_distilbert = _texts_by(
    DistilBertForSequenceClassification, DistilBertConfig, **RANGE, dim=16, hidden_dim=24, n_layers=2, n_heads=2
)
_t5 = _texts_by(
    T5ForSequenceClassification, T5Config, eos_token_id=2, decoder_start_token_id=0, d_model=16, d_kv=8, d_ff=24,
    num_layers=2, num_heads=2,
)  # fmt: skip
_resnet = _images_by(
    ResNetForImageClassification, ResNetConfig, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"
)
_hgnet = _images_by(
    HGNetV2ForImageClassification, HGNetV2Config, stem_channels=[3, 4, 8], hidden_sizes=[16, 24], depths=[1, 1],
    stage_in_channels=[8, 16], stage_mid_channels=[8, 8], stage_out_channels=[16, 24], stage_num_blocks=[1, 1],
    stage_downsample=[False, True], stage_light_block=[False, False], stage_kernel_size=[3, 3],
    stage_numb_of_layers=[1, 1],
)  # fmt: skip


def _last_token(model, body, batch):
    return getattr(model, body)(**batch).last_hidden_state[torch.arange(4), LAST]


# Model, batch, its features by another way, and the children that are its head.
MODELS = {
    "GPT-2": (_gpt2, _texts, lambda m, b: _last_token(m, "transformer", b), {"score"}),
    "Llama": (_llama, _texts, lambda m, b: _last_token(m, "model", b), {"score"}),
    "RoBERTa": (_roberta, _texts, lambda m, b: m.roberta(**b).last_hidden_state[:, 0], {"classifier"}),
    "DeBERTa": (_deberta, _texts, lambda m, b: m.deberta(**b).last_hidden_state[:, 0], {"pooler", "classifier"}),
    "DistilBERT": (
        _distilbert, _texts, lambda m, b: m.distilbert(**b).last_hidden_state[:, 0], {"pre_classifier", "classifier"}
    ),
    "T5": (
        _t5, _texts,
        lambda m, b: m.transformer(**b, decoder_input_ids=m._shift_right(b["input_ids"])).last_hidden_state[
            torch.arange(4), LAST
        ],
        {"classification_head"},
    ),
    "ResNet": (_resnet, _images, lambda m, b: m.resnet(**b).pooler_output[:, :, 0, 0], {"classifier"}),
    "HGNetV2": (
        _hgnet, _images, lambda m, b: m.encoder(m.embedder(b["pixel_values"])).last_hidden_state.mean((2, 3)), {"fc"}
    ),
}  # fmt: skip
EVERY_MODEL = pytest.mark.parametrize("name", MODELS)


def _built(name):
    torch.manual_seed(0)
    return MODELS[name][0]().eval()


@EVERY_MODEL
def test_scores_are_the_gradients_through_what_the_head_goes_by(name):
    _, data, features, heads = MODELS[name]
    scores = gradient_scores(_built(name), [data(labels=LABELS)])
    model = _built(name)
    SupervisedContrastiveLoss()(features(model, data()), LABELS).backward()
    assert scores and not [key for key in scores if key.partition(".")[0] in heads]
    for key, score in scores.items():
        assert score.any(), key
        torch.testing.assert_close(score, model.get_submodule(key).weight.grad, atol=1e-5, rtol=1e-4)


@EVERY_MODEL
def test_gps_trains_what_the_task_put_on_top_and_nothing_else_whole(name):
    _, data, _, heads = MODELS[name]
    base = _built(name)
    expected = base(**data()).logits
    head = {f"{child}.{key}" for child in heads for key, _ in getattr(base, child).named_parameters()}
    model = gps(base, GPSConfig(), [data(labels=LABELS)]).eval()
    whole = [n for n, p in model.named_parameters() if p.requires_grad and "gps_delta" not in n]
    assert {n.removeprefix("base_model.model.").replace("modules_to_save.default.", "") for n in whole} == head
    torch.testing.assert_close(model(**data()).logits, expected)


def test_padding_on_the_left_moves_the_token():
    def scores(batch):
        return gradient_scores(_built("Llama"), [{**batch, "labels": LABELS}])

    left = {key: tensor.roll(1, 1) for key, tensor in _texts().items()}
    left["input_ids"][:, 0] = left["attention_mask"][:, 0] = 0
    cut = {key: tensor[:, 1:] for key, tensor in left.items()}
    for mine, theirs in zip(scores(left).values(), scores(cut).values(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-3)


def test_a_head_that_averages_over_positions_gives_their_mean():
    class Averaging(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.head(torch.tanh(self.body(x))).mean(1)

    torch.manual_seed(0)
    model, x = Averaging(), torch.randn(4, 5, 4)
    config = GPSConfig(target_modules=["body"])
    score = gradient_scores(model, [(x, LABELS)], config=config)["body"]
    SupervisedContrastiveLoss()(torch.tanh(model.body(x)).mean(1), LABELS).backward()
    torch.testing.assert_close(score, model.body.weight.grad, atol=1e-6, rtol=1e-4)


def test_a_second_adapter_finds_the_features_too():
    data = [_texts(labels=LABELS)]
    expected = gradient_scores(_built("RoBERTa"), data)
    model = gps(_built("RoBERTa"), GPSConfig(), data)
    with model.disable_adapter():
        scores = gradient_scores(model, data)
    for key, score in expected.items():
        torch.testing.assert_close(scores[key], score)


@pytest.mark.parametrize(
    ("build", "data", "features"),
    [
        (_gpt2, _texts, "transformer.ln_f"),
        (_roberta, _texts, "roberta.encoder"),
        (_t5, _texts, "transformer.encoder"),
        (_resnet, _images, "resnet.encoder"),
        # A head that starts at zero does not say which token it goes by.
        (lambda: _with_head_of_zeros(_gpt2()), _texts, None),
    ],
    ids=["GPT-2", "RoBERTa", "T5", "ResNet", "zeros"],
)
@pytest.mark.filterwarnings("ignore:The loss has no gradient")
def test_the_remedy_of_the_error_works(build, data, features):
    torch.manual_seed(0)
    model, batch = build().eval(), data(labels=LABELS)
    with pytest.raises(ValueError, match="needed is a tensor") as error:
        gradient_scores(model, [batch], features=features)
    assert "`model.config.output_hidden_states = True`" in str(error.value)
    assert "`lambda output: output.hidden_states[-1].mean(1)`" in str(error.value)
    if build is _t5:
        assert "`output.encoder_last_hidden_state`" in str(error.value)
        remedy = lambda output: output.encoder_last_hidden_state.mean(1)  # noqa: E731
    else:
        model.config.output_hidden_states = True
        remedy = lambda output: output.hidden_states[-1].mean((2, 3) if build is _resnet else 1)  # noqa: E731
    scores = gradient_scores(model, [batch], features=remedy)
    assert any(score.any() for score in scores.values())


def _with_head_of_zeros(model):
    nn.init.zeros_(model.score.weight)
    return model


def test_labels_of_tokens_are_refused_with_another_loss():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2))
    batch = _texts(labels=_texts()["input_ids"])
    with pytest.raises(ValueError, match=r"labels \(4, 7\)(.|\n)*'model'"):
        gradient_scores(model, [batch], SupervisedContrastiveLoss())
    by_default, by_name = gradient_scores(model, [batch]), gradient_scores(model, [batch], "model")
    assert by_default.keys() == by_name.keys()
    assert all(torch.equal(by_default[name], by_name[name]) for name in by_name)


def test_a_head_called_like_a_part_of_the_body_does_not_train_that_part_whole():
    model = _built("RoBERTa")
    model.dense = nn.Linear(16, 16)
    with pytest.warns(
        UserWarning, match="'dense' belongs to the head but stays frozen: .*'roberta.encoder.*dense' too"
    ):
        adapted = get_peft_model(model, GPSConfig(selection="magnitude"))
    assert adapted.peft_config["default"].modules_to_save == ["classifier"]
