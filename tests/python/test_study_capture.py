"""Q, K and V recorded from models of several kinds: they are what the models' layers compute."""

import pytest
import torch
import transformers

from hopper_attention import reference
from hopper_attention.study.capture import ATTENTION_NAME, recording
from hopper_attention.study.errors import StudyError

SIZES = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "vocab_size": 50,
    "max_position_embeddings": 64,
}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GQA = {"num_key_value_heads": 2}
SEQLEN = 24


def bert():
    return transformers.BertModel(transformers.BertConfig(**SIZES))


def llama():
    return transformers.LlamaModel(transformers.LlamaConfig(**SIZES, **GQA, **TOKENS))


def gpt2():
    config = transformers.GPT2Config(
        n_embd=32, n_head=4, n_layer=2, vocab_size=50, n_positions=64, **TOKENS
    )
    return transformers.GPT2Model(config)


def mistral():
    config = transformers.MistralConfig(**SIZES, **GQA, **TOKENS, sliding_window=8)
    return transformers.MistralModel(config)


def gemma2():
    config = transformers.Gemma2Config(
        **SIZES,
        **GQA,
        **TOKENS,
        head_dim=16,
        sliding_window=8,
        attn_logit_softcapping=0.5,
        query_pre_attn_scalar=16,
    )
    model = transformers.Gemma2Model(config)
    model.set_attn_implementation("eager")  # PyTorch's own has no softcap
    return model


def modernbert():
    config = transformers.ModernBertConfig(
        **SIZES,
        **TOKENS,
        cls_token_id=1,
        sep_token_id=2,
        local_attention=8,
        global_attn_every_n_layers=2,
    )
    return transformers.ModernBertModel(config)


# The layers' attention modules, then for each layer: KV heads, causal, window, softcap.
MODELS = {
    bert: ("attention.self", [(4, False, (-1, -1), 0.0)] * 2),
    llama: ("self_attn", [(2, True, (-1, -1), 0.0)] * 2),
    gpt2: ("attn", [(4, True, (-1, -1), 0.0)] * 2),
    mistral: ("self_attn", [(2, True, (7, 0), 0.0)] * 2),
    gemma2: ("self_attn", [(2, True, (7, 0), 0.5), (2, True, (-1, -1), 0.5)]),
    modernbert: ("attn", [(4, False, (-1, -1), 0.0), (4, False, (4, 4), 0.0)]),
}


@pytest.fixture(params=list(MODELS), ids=lambda make: make.__name__)
def case(request):
    torch.manual_seed(0)
    model = request.param().eval()
    model.config.use_cache = False
    return model, *MODELS[request.param]


def token_ids():
    return torch.randint(3, 50, (3, SEQLEN), generator=torch.Generator().manual_seed(1))


def attend(x):
    out, _ = reference.attention(
        x.query, x.key, x.value, x.softmax_scale, x.causal, x.window_size, x.softcap
    )
    return out.flatten(2).float()


def output_projection(model, name):
    """The linear layer that takes the attention's output, whose input is recorded, too."""
    module = dict(model.named_modules())[name]
    for attribute in ("o_proj", "c_proj", "Wo", "out_proj"):
        if hasattr(module, attribute):
            return getattr(module, attribute)
    parent = dict(model.named_modules())[name.rpartition(".")[0]]
    return parent.output.dense  # BERT's


def record(model, **inputs):
    """All activations, and by layer name what went into the output projection."""
    recorded, projected, hooks = [], {}, []
    names = [name for name, _ in model.named_modules()]
    for name in names:
        if name.rpartition(".")[2] in ("self", "self_attn", "attn"):
            keep = lambda _m, args, name=name: projected.__setitem__(name, args[0])  # noqa: E731
            hooks.append(output_projection(model, name).register_forward_pre_hook(keep))
    with torch.inference_mode(), recording(model, recorded.append):
        hidden = model(**inputs).last_hidden_state
    for hook in hooks:
        hook.remove()
    return recorded, projected, hidden


def test_recorded_activations_reproduce_the_attention_output(case):
    model, suffix, expected = case
    recorded, projected, _ = record(model, input_ids=token_ids())
    assert [r.index for r in recorded] == [0, 1]
    for layer, (heads_kv, causal, window, softcap) in zip(recorded, expected, strict=True):
        assert layer.name.endswith(suffix)
        assert layer.padding is None
        (x,) = layer.problems
        assert (x.batch, x.seqlen_q, x.heads, x.heads_kv) == (3, SEQLEN, 4, heads_kv)
        assert (x.causal, x.window_size, x.softcap) == (causal, window, softcap)
        torch.testing.assert_close(
            attend(x), projected[layer.name].view(3, SEQLEN, -1), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_known_and_cut_off(case, side):
    model, _, expected = case
    tokens = torch.ones(3, SEQLEN, dtype=torch.long)
    tokens[1, slice(0, 5) if side == "left" else slice(SEQLEN - 5, None)] = 0
    recorded, projected, _ = record(model, input_ids=token_ids(), attention_mask=tokens)
    for layer, (_, causal, window, _) in zip(recorded, expected, strict=True):
        assert torch.equal(layer.padding, tokens == 0)
        assert [x.seqlen_q for x in layer.problems] == [SEQLEN, SEQLEN - 5, SEQLEN]
        out = projected[layer.name].view(3, SEQLEN, -1)
        for sequence, x in enumerate(layer.problems):
            assert (x.causal, x.window_size) == (causal, window)
            want = out[sequence : sequence + 1, tokens[sequence] == 1]
            torch.testing.assert_close(attend(x), want, rtol=1e-4, atol=1e-5)


def test_recording_leaves_the_model_as_it_was(case):
    model = case[0]
    before = model.config._attn_implementation
    with torch.inference_mode():
        want = model(input_ids=token_ids()).last_hidden_state
    _, _, hidden = record(model, input_ids=token_ids())
    torch.testing.assert_close(hidden, want, rtol=1e-4, atol=1e-5)
    assert model.config._attn_implementation == before != ATTENTION_NAME
    recorded = []
    with torch.inference_mode():
        with recording(model, recorded.append):
            model(input_ids=token_ids())
        model(input_ids=token_ids())
    assert len(recorded) == 2


def test_recording_ends_when_the_model_fails():
    model = llama().eval()
    before = model.config._attn_implementation

    def refuse(_):
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"), recording(model, refuse):
        model(input_ids=token_ids())
    assert model.config._attn_implementation == before
    model(input_ids=token_ids())


def test_the_models_own_scale_is_recorded():
    torch.manual_seed(0)
    config = transformers.GraniteConfig(**SIZES, **GQA, **TOKENS, attention_multiplier=0.01)
    recorded, projected, _ = record(transformers.GraniteModel(config).eval(), input_ids=token_ids())
    assert [r.problems[0].softmax_scale for r in recorded] == [0.01, 0.01]
    torch.testing.assert_close(
        attend(recorded[0].problems[0]), projected[recorded[0].name], rtol=1e-4, atol=1e-5
    )


def test_attention_sinks_are_refused():
    config = transformers.GptOssConfig(
        **SIZES, **GQA, **TOKENS, head_dim=8, num_local_experts=2, num_experts_per_tok=1
    )
    model = transformers.GptOssModel(config).eval()
    with pytest.raises(StudyError, match=r"layer layers\.0\.self_attn uses s_aux"):
        record(model, input_ids=token_ids())
