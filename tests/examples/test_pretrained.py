"""Packages are checked before anything is read from them; the data sets are what their loaders say."""

from __future__ import annotations

import hashlib
import io
import tarfile
import zipfile

import pytest
import torch
from pretrained import data, encoders, packages
from pretrained.packages import Package


CONTENT = b"weights"


@pytest.fixture
def package(tmp_path, monkeypatch):
    monkeypatch.setenv("PEFT_EXT_PRETRAINED", str(tmp_path / "cache"))
    packages.file_of.cache_clear()
    archive = tmp_path / "toy-1.0-py3-none-any.whl"
    with zipfile.ZipFile(archive, "w") as wheel:
        wheel.writestr("toy/model.bin", CONTENT)
    monkeypatch.setattr(packages, "_download", lambda package, folder: archive)
    return Package("toy", "1.0", "unused", "toy/model.bin", hashlib.sha256(CONTENT).hexdigest())


def test_a_package_that_was_not_fetched_is_an_error_that_says_how(package):
    with pytest.raises(FileNotFoundError, match="make evidence"):
        packages.file_of(package)


def test_a_fetched_package_is_read_from_the_cache(package, monkeypatch):
    packages.fetch([package])
    assert packages.file_of(package).read_bytes() == CONTENT
    monkeypatch.setattr(packages, "_download", lambda *args: pytest.fail("downloaded again"))
    packages.fetch([package])


def test_a_damaged_file_is_refused(package):
    packages.fetch([package])
    packages.file_of(package).write_bytes(b"other")
    packages.file_of.cache_clear()
    with pytest.raises(ValueError, match="has the sha256"):
        packages.file_of(package)


def test_pip_is_given_the_hash(tmp_path, monkeypatch):
    called = []

    def run(command, check):
        called.append(command)
        (tmp_path / "toy.whl").touch()

    monkeypatch.setattr(packages.subprocess, "run", run)
    assert packages._download(Package("toy", "1.0", "abc", "", "", is_source=True), tmp_path).name == "toy.whl"
    assert "--require-hashes" in called[0] and "--no-deps" in called[0]
    assert called[0][called[0].index("--no-binary") + 1] == "toy"
    assert (tmp_path / "requirements.txt").read_text() == "toy==1.0 --hash=sha256:abc\n"


def test_sentiment_leaves_out_the_neutral_and_the_repeated(tmp_path, monkeypatch):
    rows = "1\t2.5\tgood\n2\t-1.0\tbad\n3\t0.4\tso so\n4\t2.1\tgood\n5\t-0.5\tmeh\n"
    archive = tmp_path / "ratings.tar.gz"
    with tarfile.open(archive, "w:gz") as file:
        info = tarfile.TarInfo("hutto_ICWSM_2014/tweets_GroundTruth.txt")
        info.size = len(rows)
        file.addfile(info, io.BytesIO(rows.encode()))
    monkeypatch.setattr(data, "file_of", lambda package: archive)
    found = data.load("tweets")
    assert found.inputs == ["good", "bad"] and found.labels.tolist() == [1, 0] and found.classes == 2


def test_digits_use_the_whole_range_of_bytes():
    found = data.load("digits")
    assert found.inputs.shape == (1797, 1, 8, 8) and found.inputs.dtype == torch.uint8
    assert int(found.inputs.max()) == 255 and found.classes == 10


def test_a_missing_column_is_named(tmp_path):
    (tmp_path / "table.csv").write_text("text,label\nhello,1\n")
    with pytest.raises(ValueError, match="no column 'mood', only text, label"):
        data.load(f"{tmp_path}/table.csv:text:mood")


def test_plain_convolutions_equal_the_padding_ones():
    class Padding(torch.nn.Conv2d):
        """Pads by itself, as that of EfficientNet-Lite does; one pixel pads nothing."""

        def forward(self, x):
            return super().forward(x)

    layer, x = Padding(4, 6, 1, bias=False), torch.randn(2, 4, 5, 5)
    plain = encoders._plain(layer)
    assert type(plain) is torch.nn.Conv2d
    assert torch.equal(plain(x), layer(x))


def test_a_model_that_was_made_dense_is_saved_as_what_it_is(tmp_path):
    from transformers import AutoModel, LlamaConfig, LlamaModel

    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = LlamaModel(LlamaConfig(vocab_size=5, **size))
    model.config.quantization_config = {"quant_method": "gguf"}
    encoders.save_dense(model, tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert type(again) is LlamaModel and not hasattr(again.config, "quantization_config")
    assert {n: v.tolist() for n, v in again.state_dict().items()} == {
        n: v.tolist() for n, v in model.state_dict().items()
    }


@pytest.mark.parametrize("vocabulary", [True, False])
def test_a_folder_is_an_encoder(tmp_path, vocabulary):
    from transformers import AutoModel, ViTConfig, ViTModel

    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    if vocabulary:
        pytest.importorskip("tokenizers")
        from tokenizers import Tokenizer, models
        from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast

        tokens = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
        PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="</s>").save_pretrained(tmp_path)
        model = LlamaModel(LlamaConfig(vocab_size=2, **size))
    else:
        model = ViTModel(ViTConfig(image_size=8, patch_size=4, **size), add_pooling_layer=False)
    model.save_pretrained(tmp_path)
    found = encoders.load(str(tmp_path))
    assert (found.width, found.is_text) == (16, vocabulary)
    assert found.pooling == ("mean" if vocabulary else "first")
    if vocabulary:
        assert found.tokenizer.pad_token == "</s>"
    for name, value in AutoModel.from_pretrained(tmp_path).state_dict().items():
        if not name.startswith("pooler"):
            assert torch.equal(found.model.state_dict()[name], value)


fetched = pytest.mark.skipif(
    not all(
        (package.folder / package.file).exists() for package in (packages.MINILM, packages.SENTIMENT, packages.MNIST)
    ),
    reason="run `python examples/pretrained/packages.py` first",
)


@fetched
def test_the_fetched_data_are_what_the_readme_says():
    packages.file_of.cache_clear()
    assert {domain: len(data.ratings(domain)) for domain in data.DOMAINS} == {
        "movies": 10603,  # 10,605 lines, two of them repeated
        "editorials": 5119,
        "tweets": 4200,
        "products": 3697,
    }
    digits = data.load("mnist")
    assert digits.inputs.shape == (5000, 1, 28, 28) and digits.labels.bincount().tolist() == [500] * 10


@fetched
def test_the_fetched_encoder_puts_related_words_near():
    encoder = encoders.load("minilm")
    words = encoder.tokenizer(["meal", "eating", "shares", "stocks"], return_tensors="pt", padding=True)
    with torch.no_grad():
        hidden = encoder.model.eval()(**words).last_hidden_state
    mask = words["attention_mask"][..., None]
    features = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
    cosines = features @ features.T
    assert cosines[0, 1] > 0.6 and cosines[2, 3] > 0.6
    assert cosines[:2, 2:].max() < 0.3
