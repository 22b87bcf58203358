import pytest
import torch

from stillhouse.errors import UserError
from stillhouse.records.language import LanguageOutput, VocabularyHead
from stillhouse.teachers.codecs import Hidden, TopK, bits_of, describe, pack, unpack


def draws() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def output(rows: int, vocabulary: int, layers=()) -> LanguageOutput:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    head = VocabularyHead(normal(vocabulary, 8), bias=normal(vocabulary), logit_softcap=30.0)
    return LanguageOutput(normal(rows, 8), head, {i: normal(rows, 8) for i in layers})


@pytest.mark.parametrize("vocabulary", [2, 3, 255, 256, 257, 49_152, 128_256])
@pytest.mark.parametrize("k", [1, 3, 64])
def test_packed_ids_come_back(vocabulary, k):
    ids = torch.randint(vocabulary, (5, k), generator=torch.Generator().manual_seed(k))
    ids[0, 0], ids[1, 0] = 0, vocabulary - 1
    bits = bits_of(vocabulary)
    packed = pack(ids, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (5, (k * bits + 7) // 8)
    assert torch.equal(unpack(packed, k, bits), ids)


def test_bits_are_as_many_as_the_largest_id_takes():
    assert [bits_of(v) for v in (1, 2, 3, 256, 257, 128_256)] == [1, 1, 2, 8, 9, 17]


def test_float16_top_k_of_128k_tokens_takes_at_most_300_bytes_a_token():
    rows = TopK(k=64, tail_samples=12, dtype="float16").encode(output(3, 128_256), draws())
    assert sum(t.numel() * t.element_size() for t in rows.values()) / 3 == 294


def test_float32_top_k_holds_the_dense_log_probabilities_and_the_mass_of_the_rest():
    dense = output(6, 50)
    codec = TopK(k=7, tail_samples=0, dtype="float32")
    signal = codec.decode(codec.encode(dense, draws()), 50, None)
    log_p = dense.logits.log_softmax(-1)
    assert torch.equal(signal.log_probs, log_p.gather(-1, signal.token_ids))
    assert torch.equal(signal.token_ids, log_p.topk(7, -1).indices)
    kept = signal.log_probs.exp().sum(-1)
    torch.testing.assert_close(signal.log_residual.exp(), 1 - kept, rtol=1e-4, atol=1e-6)
    assert signal.vocabulary_size == 50


def test_drawn_tokens_come_back_with_the_entropy_of_the_tail():
    dense = output(6, 50)
    codec = TopK(k=7, tail_samples=300, dtype="float32")
    signal = codec.decode(codec.encode(dense, draws()), 50, None)
    P = dense.logits.softmax(-1).scatter(-1, signal.token_ids, 0.0)
    P = P / P.sum(-1, keepdim=True)
    assert signal.tail_ids.shape == (6, 300)
    assert (P.gather(-1, signal.tail_ids) > 0).all()
    entropy = -(P * P.clamp_min(1e-30).log()).sum(-1)
    torch.testing.assert_close(signal.tail_entropy, entropy, rtol=1e-4, atol=1e-5)
    drawn = -P.gather(-1, signal.tail_ids).log().mean(-1)
    torch.testing.assert_close(drawn, entropy, rtol=0.15, atol=0.05)


def test_without_a_tail_nothing_is_drawn():
    dense = output(6, 50)
    codec = TopK(k=50, tail_samples=5, dtype="float32")
    signal = codec.decode(codec.encode(dense, draws()), 50, None)
    assert signal.tail_ids.shape == (6, 0)
    assert torch.equal(signal.log_residual, torch.full((6,), -torch.inf))


def test_hidden_states_come_back_with_the_head():
    dense = output(6, 50, layers=(0, 2))
    codec = Hidden(dtype="float32")
    signal = codec.decode(codec.encode(dense, draws()), 50, dense.head)
    assert torch.equal(signal.logits, dense.logits)
    assert signal.layers.keys() == {0, 2}
    assert all(torch.equal(signal.layers[i], dense.layers[i]) for i in (0, 2))


@pytest.mark.parametrize(
    "codec", [TopK(k=4, tail_samples=0, dtype="float16"), Hidden(dtype="float16")], ids=str
)
def test_chosen_layers_are_kept_by_every_codec(codec):
    dense = output(6, 50, layers=(1,))
    signal = codec.decode(codec.encode(dense, draws()), 50, dense.head)
    assert torch.equal(signal.layers[1], dense.layers[1].half().float())


def test_more_tokens_than_the_vocabulary_has_are_refused():
    TopK(k=50, tail_samples=0, dtype="float16").check(50)
    with pytest.raises(UserError, match=r"codec\.k=51: the teacher's vocabulary has 50 tokens"):
        TopK(k=51, tail_samples=0, dtype="float16").check(50)
    with pytest.raises(UserError, match=r"codec\.k=0"):
        TopK(k=0, tail_samples=0, dtype="float16").check(50)


def test_descriptions_tell_codecs_apart():
    settings = [(4, 0, "float16"), (4, 0, "float32"), (5, 0, "float16"), (4, 1, "float16")]
    codecs = [TopK(k=k, tail_samples=n, dtype=dtype) for k, n, dtype in settings]
    codecs += [Hidden(dtype="float16"), Hidden(dtype="float32")]
    assert len({str(describe(codec)) for codec in codecs}) == len(codecs)


@pytest.mark.parametrize("layers", [(), (2,)])
def test_hidden_states_that_do_not_fit_into_float16_are_refused(layers):
    dense = output(6, 50, layers)
    large = dense.layers[2] if layers else dense.hidden_states
    large[3, 1] = 7e4
    with pytest.raises(UserError) as caught:
        Hidden(dtype="float16").encode(dense, draws())
    assert str(caught.value) == (
        "codec.dtype=float16: the teacher has hidden states up to 7e+04, more than that type "
        "holds; set codec.dtype=float32"
    )
    Hidden(dtype="float32").encode(dense, draws())
