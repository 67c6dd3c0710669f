"""Measures of features, against cases computed by hand."""

import math
import sys

import pytest
import torch

from hf_saereg.quality import (
    FiringCounts,
    QualityError,
    chance_consistency,
    character_classes,
    composition,
    consistency,
    count_firings,
    random_directions,
)

# ---- consistency ----


def test_permuted_and_scaled_directions_are_the_same_features():
    pytest.importorskip("scipy")
    first = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    order = torch.tensor([3, 0, 5, 1, 2, 4])
    scales = torch.arange(1.0, 7.0)[:, None]
    found = consistency(first, scales * first[order])
    assert found.mean_max == pytest.approx(1, abs=1e-6)
    assert found.matched == pytest.approx(1, abs=1e-6)
    assert order[found.pairs[:, 1]].tolist() == found.pairs[:, 0].tolist()


def test_matching_is_one_to_one_where_the_largest_cosines_are_not():
    """Both latents of the first head are nearest to the same one of the second."""
    pytest.importorskip("scipy")

    def at(degrees):
        angle = math.radians(degrees)
        return [math.cos(angle), math.sin(angle)]

    first, second = torch.tensor([at(0), at(20)]), torch.tensor([at(10), at(100)])
    found = consistency(first, second)
    cosine = {degrees: math.cos(math.radians(degrees)) for degrees in (10, 80, 100)}
    assert found.mean_max == pytest.approx(cosine[10], abs=1e-6)
    # 0° with 10° and 20° with 100° beats 0° with 100° and 20° with 10°
    assert found.pairs.tolist() == [[0, 0], [1, 1]]
    assert found.matched == pytest.approx((cosine[10] + cosine[80]) / 2, abs=1e-6)


def test_matching_takes_the_best_sum_not_the_best_first_pair():
    pytest.importorskip("scipy")
    first = torch.eye(3)
    second = torch.tensor([[0.8, 0.6, 0.0], [0.6, 0.0, 0.8], [0.0, 0.0, 1.0]])
    # greedy takes (2, 2) and (0, 0), which leaves (1, 1) with 0; the best: 0–1, 1–0, 2–2
    found = consistency(first, second)
    assert found.pairs.tolist() == [[0, 1], [1, 0], [2, 2]]
    assert found.matched == pytest.approx((0.6 + 0.6 + 1.0) / 3)


def test_a_head_without_latents_has_nothing_to_compare():
    with pytest.raises(QualityError, match="without living latents"):
        consistency(torch.empty(0, 4), torch.eye(4))


def test_without_scipy_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match=r"hf-saereg\[quality\]"):
        consistency(torch.eye(2), torch.eye(2))


# ---- composition ----


def test_a_sum_of_two_directions_needs_two_parts():
    wide = torch.eye(4)
    narrow = torch.tensor([[5.0, 0, 0, 0], [3.0, 4.0, 0, 0], [1.0, 1.0, 1.0, 1.0]])
    found = composition(narrow, wide, parts=3)
    expected = torch.tensor([[1, 1, 1], [16 / 25, 1, 1], [1 / 4, 2 / 4, 3 / 4]])
    torch.testing.assert_close(found.explained.float(), expected)


def test_parts_that_overlap_count_once():
    """Both directions span the plane; their squared cosines alone would add up to more than 1."""
    wide = torch.tensor([[1.0, 0.0, 0.0], [0.8, 0.6, 0.0], [0.0, 0.0, 1.0]])
    narrow = torch.tensor([[2.0, 1.0, 0.0]])
    found = composition(narrow, wide, parts=2).explained[0].tolist()
    assert found[0] == pytest.approx((2.2 / 5**0.5) ** 2)
    assert found[1] == pytest.approx(1)


def test_chance_is_that_of_as_many_random_directions():
    narrow = torch.randn(50, 8, generator=torch.Generator().manual_seed(1))
    few, many = (composition(narrow, torch.eye(8).repeat(n, 1), parts=1) for n in (1, 64))
    assert torch.equal(few.explained, many.explained)  # copies add nothing
    assert many.chance.mean() > few.chance.mean() + 0.1
    again = composition(narrow, torch.eye(8), parts=1)
    assert torch.equal(again.chance, few.chance)


@pytest.mark.parametrize("parts", [0, 5])
def test_as_many_parts_as_there_are_not_are_refused(parts):
    with pytest.raises(QualityError, match=f"{parts} directions"):
        composition(torch.eye(4), torch.eye(4), parts)


# ---- classes ----

PLAY = "First Citizen:\nBefore we\n\nAll:\nSpeak: no!"


def marked(name):
    """The text with every character of a class replaced by #."""
    members = character_classes(PLAY)[name]
    return "".join("#" if own else c for c, own in zip(PLAY, members, strict=True))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vowel", "F#rst C#t#z#n:\nB#f#r# w#\n\n#ll:\nSp##k: n#!"),
        ("upper", "#irst #itizen:\n#efore we\n\n#ll:\n#peak: no!"),
        ("punctuation", "First Citizen#\nBefore we\n\nAll#\nSpeak# no#"),
        ("line_start", "#irst Citizen:\n#efore we\n\n#ll:\n#peak: no!"),
        ("speaker", "#############:\nBefore we\n\n###:\nSpeak: no!"),
    ],
)
def test_classes_of_characters(name, expected):
    assert marked(name) == expected


# ---- probes ----


def counted(halves, labels):
    """Counts of two halves: latents (tokens, d_sae) and members of one class."""
    counts = FiringCounts(len(halves[0][0]), ["class"])
    for half, (latents, members) in enumerate(zip(halves, labels, strict=True)):
        own = {"class": torch.tensor(members, dtype=torch.bool)}
        counts.update(torch.tensor(latents, dtype=torch.float32), own, half)
    return counts


def test_f1_of_the_latent_that_was_best_on_the_other_half():
    chosen_on = [[0.5, 0.0], [2.0, 0.0], [0.0, 1.0], [0.0, 0.0]]  # latent 0 is the class
    scored_on = [[1.0, 3.0], [1.0, 0.0], [0.0, 0.0], [0.0, 0.0]]  # there latent 1 would be
    counts = counted([chosen_on, scored_on], [[1, 1, 0, 0], [1, 0, 0, 0]])
    probe = counts.probes()["class"]
    assert (probe.latent, probe.share) == (0, 0.25)
    assert probe.f1 == pytest.approx(2 / 3)  # precision 1/2, recall 1


def test_a_class_that_never_occurs_scores_nothing():
    quiet = [[0.0], [0.0]]
    assert counted([quiet, quiet], [[0, 0], [0, 0]]).probes()["class"].f1 == 0


def test_probes_need_both_halves():
    counts = FiringCounts(1, ["class"])
    counts.update(torch.ones(2, 1), {"class": torch.tensor([True, False])}, 0)
    with pytest.raises(QualityError, match="two blocks"):
        counts.probes()


# ---- co-occurrence ----


def patterns(*rows):
    """Counts of latents that fire as the rows say, forty tokens each."""
    latents = [list(map(float, row)) for row in rows for _ in range(40)]
    nobody = [0] * len(latents)
    return counted([latents, latents], [nobody, nobody]).co_occurrence()


def test_independent_latents_fire_together_as_chance_lets_them():
    found = patterns("00", "01", "10", "11")
    assert found.excess == pytest.approx(0)
    assert found.lifted == 0


def test_latents_that_always_fire_together_are_beyond_chance():
    found = patterns("00", "00", "00", "11")  # together 1/4, expected 1/16
    assert found.excess == pytest.approx(3 / 4)
    assert found.lifted == 1


def test_pairs_are_weighed_by_how_often_they_fire():
    found = patterns("000", "010", "101", "111")  # 0 and 2 are one; 1 is independent of both
    assert found.excess == pytest.approx((1 / 2 - 1 / 4) / (1 / 2 + 1 / 4 + 1 / 4))
    assert found.lifted == 0  # exactly twice is not more than twice


def test_rare_pairs_are_not_called_lifted():
    latents = [[0.0, 0.0]] * 90 + [[1.0, 1.0]] * 10  # expected once in a hundred tokens
    found = counted([latents, latents], [[0] * 100, [0] * 100]).co_occurrence()
    assert found.lifted == 0 and found.excess == pytest.approx(0.9)


def test_chance_is_what_independent_latents_of_these_rates_show():
    generator = torch.Generator().manual_seed(0)
    rates = torch.tensor([0.001, 0.002, 0.01, 0.05, 0.1, 0.3] * 5)
    latents = (torch.rand(4000, len(rates), generator=generator) < rates).float()
    halves = [part.tolist() for part in latents.split(2000)]
    found = counted(halves, [[0] * 2000, [0] * 2000]).co_occurrence()
    assert found.chance == pytest.approx(found.excess, rel=0.15)
    # P(J = 0), where the mean is below 1: the surplus of a rare pair is nearly its expectation
    assert patterns("00", "01", "10", "11").chance < 0.1


def test_random_directions_lie_where_the_given_ones_do():
    generator = torch.Generator().manual_seed(2)
    flat = torch.zeros(40, 16)
    flat[:, :2] = torch.randn(40, 2, generator=generator)
    drawn = random_directions(flat)
    assert drawn.shape == flat.shape and drawn[:, 2:].abs().max() < 1e-6
    round_ = torch.randn(40, 16, generator=generator)
    assert chance_consistency(flat, flat).matched > chance_consistency(round_, round_).matched + 0.2


def test_latents_that_never_meet_cannot_be_compared():
    with pytest.raises(QualityError, match="ever fired together"):
        patterns("10", "01")


# ---- on a text ----


def one_hot(characters):
    """Latents that fire on one character each."""
    table = torch.zeros(128, len(characters))
    table[[ord(character) for character in characters], range(len(characters))] = 1
    return lambda input_ids: table[input_ids]


def test_a_latent_for_a_character_tells_its_class():
    text = "Ab, ac. " * 8
    ids = torch.tensor([ord(character) for character in text])
    counts = count_firings(one_hot(",b. A"), ids.split(8), text)
    probes = counts.probes()
    assert (probes["upper"].latent, probes["upper"].f1) == (4, 1)
    assert probes["punctuation"].f1 == pytest.approx(2 / 3)  # one of two marks: recall 1/2
    assert probes["punctuation"].share == pytest.approx(1 / 4)
    assert probes["speaker"].f1 == 0


def test_tokens_that_are_no_characters_are_refused():
    with pytest.raises(QualityError, match="8 tokens are 16 characters"):
        count_firings(one_hot("a"), [torch.zeros(8, dtype=torch.int64)], "aa" * 8)
