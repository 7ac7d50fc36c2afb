"""Malformed input: a clear error or a correct result, never a silent no-op; and the model as it was."""

import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peft_ext.knockout import AttentionKnockout, FlowSample, ModuleKnockout, find_token_groups, layer_sweep
from peft_ext.knockout.sweep.windows import windows
from tests._models.vision_language import LAYERS, build, grouped

from . import _processors as make
from ._reference import decoder_embeddings, llama_logits


SETTINGS = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck), "database": None}


def examples(count):
    """These add up to 1,000."""
    return settings(max_examples=count, **SETTINGS)


MODEL = build("llama")
BATCH, GROUPS = grouped("llama", texts=((3, 7),))
LENGTH = BATCH["input_ids"].shape[1]
AT = torch.arange(LENGTH)
ATTENDED = BATCH["attention_mask"].bool()
with torch.no_grad():
    CLEAN = MODEL(**BATCH).logits
    EMBEDDINGS = decoder_embeddings(MODEL, BATCH)

whole = st.lists(st.booleans(), min_size=LENGTH, max_size=LENGTH).map(lambda bits: torch.tensor([bits]))
# Neighbours, often one token: of such pairs many have no edge.
few = st.tuples(st.integers(0, LENGTH - 1), st.integers(1, 4)).map(
    lambda run: ((run[0] <= AT) & (run[0] + run[1] > AT))[None]
)
masks = st.one_of(
    *[whole] * 3,
    *[few] * 3,
    st.lists(st.booleans(), min_size=0, max_size=LENGTH + 4).map(lambda bits: torch.tensor([bits], dtype=torch.bool)),
    st.sampled_from([torch.float32, torch.int64, torch.uint8]).map(lambda dtype: torch.ones(1, LENGTH, dtype=dtype)),
    st.integers(0, 4).map(lambda rows: torch.ones(rows, LENGTH, dtype=torch.bool)),
    st.sampled_from([None, "image", 3, [True] * LENGTH, torch.tensor(True), torch.ones(LENGTH, dtype=torch.bool)]),
)
layers = st.one_of(
    *[st.lists(st.integers(-LAYERS, LAYERS - 1), min_size=1, max_size=5)] * 3,
    st.lists(st.integers(-LAYERS - 2, LAYERS + 2), max_size=5),
    st.integers(-LAYERS - 2, LAYERS + 2),
    st.sampled_from([None, "all", 1.5, [0.5], [True], range(0), range(LAYERS), [None]]),
)


def check_clean():
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in MODEL.modules())
    with torch.no_grad():
        assert torch.equal(MODEL(**BATCH).logits, CLEAN)


def run(knockout):
    """Logits under a context, or the error and the warnings."""
    with warnings.catch_warnings(record=True) as warned, torch.no_grad():
        warnings.simplefilter("always")
        try:
            with knockout():
                found = MODEL(**BATCH).logits
        except (ValueError, RuntimeError) as error:
            found = error
    check_clean()
    return found, [str(warning.message) for warning in warned]


def assert_clear(error):
    assert isinstance(error, ValueError) and len(str(error)) > 20, repr(error)


def numbers(given_layers):
    asked = [given_layers] if isinstance(given_layers, int) else list(given_layers)
    assert asked and all(-LAYERS <= n < LAYERS for n in asked)  # others are refused
    return {n % LAYERS for n in asked}


@examples(300)
@given(masks, masks, layers)
def test_attention_knockout(source, target, over):
    found, warned = run(lambda: AttentionKnockout(MODEL, over, [(source, target)]))
    if isinstance(found, Exception):
        return assert_clear(found)
    assert source.any() and target.any()
    blocked = (source.unsqueeze(1) & target.unsqueeze(2)).expand(1, -1, -1)
    expected = llama_logits(MODEL, EMBEDDINGS, ATTENDED, dict.fromkeys(numbers(over), blocked))
    torch.testing.assert_close(found, expected.detach(), rtol=0, atol=5e-6)
    if not (blocked & torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()).any():
        assert any("blocks nothing" in message for message in warned)


@examples(200)
@given(masks, layers, st.sampled_from(["attention", "mlp", "MLP", None, 3]))
def test_module_knockout(positions, over, module):
    found, _ = run(lambda: ModuleKnockout(MODEL, over, positions, module))
    if isinstance(found, Exception):
        return assert_clear(found)
    assert positions.any()
    zeroed = {(number, module): positions for number in numbers(over)}
    expected = llama_logits(MODEL, EMBEDDINGS, ATTENDED, zeroed=zeroed)
    torch.testing.assert_close(found, expected.detach(), rtol=0, atol=5e-6)


@examples(100)
@given(
    st.dictionaries(st.sampled_from(["image", "question", "last"]), masks, max_size=3),
    st.sampled_from(["image:question", "question:last", "last", "a:b:c", ":", "", ["image:question"] * 2, None, 5]),
    st.one_of(st.integers(-2, 12), st.sampled_from([1.5, "9", True, None])),
    st.sampled_from(["auto", "full", "suffix", "packed", "fast"]),
    st.sampled_from(["first", "last", 0, 3, -1, "second", True]),
)
def test_layer_sweep(groups, pairs, window, engine, token):
    sample = FlowSample(BATCH, {**GROUPS, **groups}, answer_ids=[[5, 7]])
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        try:
            records = layer_sweep(MODEL, [sample], pairs, window, engine=engine, answer_token=token, progress=False)
        except ValueError as error:
            assert_clear(error)
        else:
            assert len(records) == LAYERS
            source, target = (sample.groups[name] for name in pairs.split(":"))
            assert source.any() and target.any()
            for record, over in zip(records, windows(LAYERS, window), strict=True):
                if token in ("first", 0):
                    blocked = source.unsqueeze(1) & target.unsqueeze(2)
                    expected = llama_logits(
                        MODEL, EMBEDDINGS, ATTENDED, dict.fromkeys(range(over.start, over.end), blocked)
                    )
                    assert record["probability"] == pytest.approx(float(expected[0, -1].softmax(-1)[5]), rel=1e-4)
                assert 0 <= record["probability"] <= 1
    check_clean()


PROCESSOR = make.llava()
QUESTION = "Is the table red or green?"
SIZE = (40, 32)
INPUTS = PROCESSOR(
    images=[torch.zeros(SIZE[1], SIZE[0], 3, dtype=torch.uint8).numpy()],
    text=[f"USER: <image>\n{QUESTION} ASSISTANT:"],
    return_tensors="pt",
)
number = st.one_of(
    st.integers(-60, 100), st.floats(-60, 100), st.sampled_from([float("nan"), float("inf"), None, "3"])
)
boxes = st.one_of(st.lists(st.lists(number, max_size=5), max_size=3), st.sampled_from([None, "box", 5, [[]], [[[]]]]))
phrase = st.one_of(
    st.sampled_from([QUESTION, "red", "green", "table", "blue", "", " ", "tab", "?", "red or green"]),
    st.text(max_size=12),
    st.none(),
)
spans = st.one_of(
    st.dictionaries(
        st.sampled_from(["question", "true_option", "objects", "mine"]),
        st.one_of(phrase, st.lists(phrase, max_size=3)),
        max_size=4,
    ),
    st.sampled_from([None, "question", [], [{}], [{"question": QUESTION}] * 2]),
)
images = st.sampled_from([SIZE, None, "image.png", (0, 5), (40, 32, 3), torch.zeros(32, 40, 3), 7])


@examples(400)
@given(spans, boxes, images, st.sampled_from(["xywh", "xyxy", "cxcywh"]), st.sampled_from([None, 0.5, 1.5, -1]))
def test_find_token_groups(given_spans, given_boxes, image, box_format, threshold):
    try:
        groups = find_token_groups(
            PROCESSOR, INPUTS, image, given_spans, given_boxes, box_format=box_format, threshold=threshold
        )
    except ValueError as error:
        return assert_clear(error)
    shape = INPUTS["input_ids"].shape
    for name, mask in groups.items():
        assert mask.dtype == torch.bool and mask.shape == shape and mask.any(), name
    for name, phrases in (given_spans or {}).items():
        found = PROCESSOR.tokenizer.decode(INPUTS["input_ids"][groups[name]])
        for one in [phrases] if isinstance(phrases, str) else phrases:
            assert "".join(one.lower().split()) in "".join(found.lower().split())
    if given_boxes is not None:
        assert "related_patches" in groups


@pytest.mark.parametrize("wrong", [torch.nn.Linear(2, 2), "model"])
def test_a_model_without_the_parts(wrong):
    with pytest.raises(ValueError, match="not a transformers model"):
        AttentionKnockout(wrong, [0], [(GROUPS["image"], GROUPS["last"])])


def test_errors_name_the_missing_part():
    import transformers as hf

    sizes = {"vocab_size": 32, "d_model": 16, "d_ff": 16, "num_layers": 1, "num_heads": 2, "d_kv": 8}
    with pytest.raises(ValueError, match="encoder-decoder"):
        AttentionKnockout(hf.T5ForConditionalGeneration(hf.T5Config(**sizes)), [0], [])
    config = hf.MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, state_size=4)
    with pytest.raises(ValueError, match="self-attention|no child|no list of layers"):
        AttentionKnockout(hf.MambaForCausalLM(config), [0], [])


def test_a_prompt_of_another_length():
    longer = {name: torch.cat([value, value[:, :1]], 1) for name, value in BATCH.items()}
    shorter = {name: value[:, 1:] for name, value in BATCH.items()}
    for batch in (longer, shorter):
        for knockout in (
            AttentionKnockout(MODEL, [0], [(GROUPS["image"], GROUPS["last"])]),
            ModuleKnockout(MODEL, [0], GROUPS["image"]),
        ):
            with knockout, pytest.raises(ValueError, match=f"prompt of {LENGTH} tokens"):
                MODEL(**batch)
    check_clean()
