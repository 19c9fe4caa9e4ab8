import torch

from merge_engine.noise import key_of, uniform


def test_numbers_depend_on_key_and_place_alone():
    key = key_of(0, "model.norm.weight", 1)
    assert torch.equal(uniform(key, (7, 11)).flatten(), uniform(key, (77,)))
    assert torch.equal(uniform(key, (50,)), uniform(key, (77,))[:50])


def test_these_numbers_never_change():
    # By hand from the definition, with Python's own integers: an exported seed stays meaningful.
    key, mask = key_of(3, "x", 0), (1 << 64) - 1
    expected = []
    for place in (1, 2, 3):
        state = (key + place * 0x9E3779B97F4A7C15) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        expected.append(((state ^ (state >> 31)) >> 40) / 2**24)
    assert uniform(key, (3,)).tolist() == expected


def test_keys_differ_by_seed_tensor_and_donor():
    keys = {key_of(s, t, d) for s in range(5) for t in ("a", "b", "ab") for d in range(5)}
    assert len(keys) == 75


def test_numbers_are_uniform_and_keys_independent():
    one, other = (uniform(key_of(0, "x", donor), (1_000_000,)).double() for donor in (0, 1))
    assert one.min() >= 0
    assert one.max() < 1
    assert abs(one.mean() - 0.5) < 4 * (1 / 12 / 1e6) ** 0.5
    counts = torch.histc(one, bins=100, min=0, max=1)
    assert ((counts - 1e4) ** 2 / 1e4).sum() < 99 + 5 * (2 * 99) ** 0.5  # chi-square, 5 sigma
    pairs = torch.stack([one, other, one.roll(1)])
    off_diagonal = torch.corrcoef(pairs) - torch.eye(3)
    assert off_diagonal.abs().max() < 5e-3
