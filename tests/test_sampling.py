"""Counter-based randomness and laws."""

from __future__ import annotations

import pytest
import torch

from specdec_kernels.noise import cpu as compiled
from specdec_kernels.noise import reference
from specdec_kernels.noise.reference import philox
from specdec_lab.engine.sampling import Noise, Processor, Purpose, draw

# Published with Random123 (Salmon 2011): (counter, key, words) of Philox-4x32-10.
VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("counter", "key", "words"), VECTORS)
def test_philox_gives_the_published_words(counter, key, words):
    made = philox(tuple(torch.tensor(c) for c in counter), key)
    assert tuple(int(w) for w in made) == words


def noise(rows=3, seed=7):
    return Noise(seed, torch.arange(rows))


def test_noise_depends_on_sequence_position_and_purpose_but_not_on_the_row():
    positions = torch.tensor([[5, 6], [5, 6], [5, 6]])
    straight = noise().uniform(positions, Purpose.DRAFT)
    shuffled = Noise(7, torch.tensor([2, 0, 1])).uniform(positions, Purpose.DRAFT)
    assert torch.equal(shuffled, straight[[2, 0, 1]])
    assert straight.unique().numel() == 6
    assert not torch.equal(straight, noise().uniform(positions, Purpose.ACCEPT))
    assert not torch.equal(straight, noise(seed=8).uniform(positions, Purpose.DRAFT))


def test_noise_of_a_position_does_not_depend_on_what_is_asked_beside_it():
    alone = noise().gumbel(torch.tensor([[9]] * 3), 11, Purpose.TARGET)
    among = noise().gumbel(torch.tensor([[7, 8, 9]] * 3), 11, Purpose.TARGET)
    assert torch.equal(alone[:, 0], among[:, 2])


def test_uniforms_are_uniform_and_gumbels_have_their_mean():
    positions = torch.arange(20_000)[None].expand(2, -1)
    u = noise(2).uniform(positions, Purpose.ACCEPT)
    assert u.min() >= 0
    assert u.max() < 1
    counts = torch.histc(u.float().flatten(), 50, 0, 1)
    chi2 = ((counts - 800) ** 2 / 800).sum()
    assert chi2 < 95  # 49 degrees of freedom: exceeded with chance 1e-4
    g = noise(2).gumbel(positions[:, :4000], 8, Purpose.TARGET)
    assert abs(g.mean() - 0.5772) < 0.02


def test_draw_follows_the_weights_and_never_takes_a_token_of_weight_zero():
    weights = torch.tensor([0.0, 3.0, 0.0, 1.0, 0.0])
    u = noise(1).uniform(torch.arange(40_000)[None], Purpose.RESIDUAL)[0]
    tokens = draw(weights.expand(40_000, -1), u)
    assert set(tokens.tolist()) == {1, 3}
    assert abs((tokens == 1).float().mean() - 0.75) < 0.01
    edges = draw(weights.expand(2, -1), torch.tensor([0.0, 1 - 2.0**-32], dtype=torch.float64))
    assert edges.tolist() == [1, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_drawing_follows_the_law(dtype):
    law = torch.tensor([0.5, 0.3, 0.2, 0.0], dtype=dtype)
    tokens = noise(1).draw(law.expand(1, 40_000, -1), torch.arange(40_000)[None], Purpose.TARGET)
    share = torch.bincount(tokens[0], minlength=4) / 40_000
    assert torch.allclose(share, law.float(), atol=0.01)
    assert share[3] == 0


@pytest.mark.skipif(compiled.why_not() is not None, reason=str(compiled.why_not()))
@pytest.mark.parametrize("vocabulary", [1, 4, 31, 63, 64, 65, 129, 2048])
def test_the_compiled_noise_equals_its_reference(vocabulary):
    sequences = torch.tensor([0, 2**33 + 5, 77])
    positions = torch.tensor([[0, 9, 2**31], [1, 2, 3], [2**40, 5, 5]])
    for seed in (0, 2**40 + 9):
        arguments = (seed, sequences, positions, int(Purpose.TARGET))
        assert torch.equal(compiled.words(*arguments, vocabulary), reference.words(*arguments, vocabulary))
        law = (torch.randn(3, 3, vocabulary, generator=torch.Generator().manual_seed(seed % 97)) * 4).softmax(-1)
        law[..., 1::3] = 0
        assert torch.equal(compiled.gumbel_argmax(law, *arguments), reference.gumbel_argmax(law, *arguments))
    zero = torch.zeros(1, dtype=torch.int64)
    assert compiled.words(0, zero, zero[None], 0, 4).flatten().tolist() == list(VECTORS[0][2])


@pytest.mark.skipif(compiled.why_not() is not None, reason=str(compiled.why_not()))
def test_the_compiled_noise_refuses_what_it_cannot_read():
    with pytest.raises(ValueError, match="int64 sequences"):
        compiled.words(0, torch.zeros(2), torch.zeros(2, 1, dtype=torch.int64), 0, 4)
    zero = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="float32 law"):
        compiled.gumbel_argmax(torch.ones(2, 1, 4, dtype=torch.float64), 0, zero, zero[:, None], 0)


@pytest.mark.parametrize("kwargs", [{"top_k": 3}, {"top_p": 0.7}, {"top_k": 6, "top_p": 0.5}, {}])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_processor_equals_the_warpers_of_transformers(kwargs, temperature):
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(5, 17, generator=torch.Generator().manual_seed(1)) * 3
    expected = TemperatureLogitsWarper(temperature)(None, logits.clone())
    if kwargs.get("top_k"):
        expected = TopKLogitsWarper(kwargs["top_k"])(None, expected)
    if kwargs.get("top_p"):
        expected = TopPLogitsWarper(kwargs["top_p"])(None, expected)
    assert torch.allclose(Processor(temperature, **kwargs).law(logits), expected.softmax(-1), atol=1e-6)
