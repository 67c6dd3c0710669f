"""Features: where latents fire, what they are near to and promote, on cases known by hand."""

import re
from html import unescape

import pytest
import torch
from keyboard import assert_usable_by_keys
from pages import assert_self_contained, assert_shown, elements_of, needs_browser
from saereg_command import saereg
from tiny_checkpoint import save_stock_model, write_text

from hf_saereg.corpora import character_tokenizer
from hf_saereg.feature_matches import chance_cosine, match_by_correlation, match_by_decoder
from hf_saereg.features import (
    Context,
    Feature,
    Reader,
    Survey,
    describe,
    logits,
    nearest_directions,
    survey,
)
from hf_saereg.heads import SAEHeadConfig, make_head
from hf_saereg.heads.folder import save_heads
from hf_saereg.loading import load_checkpoint
from hf_saereg.report.feature_page import Shown

SITE = "blocks.0.hook_resid_pre"
TEXT = "the king; the queen. a cat!!hello, hello"  # two blocks of 20
LETTERS = "the!"


def unit_rows(tensor):
    centred = tensor - tensor.mean(dim=1, keepdim=True)
    return centred / centred.norm(dim=1, keepdim=True)


@pytest.fixture
def reader(tmp_path):
    """Latent j fires on the j-th of `LETTERS` alone, with 0.1, whatever the position."""
    model, tokenizer = load_checkpoint(str(save_stock_model(tmp_path / "model")))
    head = make_head(SAEHeadConfig("standard", SITE, 16, len(LETTERS) + 1)).eval()
    with torch.no_grad():
        model.transformer.wpe.weight.zero_()
        embedding = model.transformer.wte.weight
        embedding.copy_(unit_rows(embedding))
        chosen = embedding[[ord(letter) for letter in LETTERS]]
        head.W_enc.zero_()
        head.W_enc[:, : len(LETTERS)] = chosen.T
        head.b_enc.fill_(-0.9)
        head.W_dec[: len(LETTERS)] = 3 * chosen
    return Reader("model", model, head, tokenizer)


@pytest.fixture
def batches():
    ids = torch.tensor([ord(character) for character in TEXT]).view(2, 20)
    return [{"input_ids": row[None], "labels": row[None]} for row in ids]


def test_densities_and_activations_are_those_of_the_text(reader, batches):
    (found,), correlations = survey([reader], batches, contexts=3)
    assert correlations is None
    assert found.tokens == len(TEXT)
    counts = [TEXT.count(letter) for letter in LETTERS]
    assert found.fired.tolist() == [*counts, 0]
    features = describe(reader, found, batches, range(len(LETTERS)), window=2)
    for feature, count in zip(features, counts, strict=True):
        assert feature.density == count / len(TEXT)
        assert feature.mean == pytest.approx(0.1, abs=1e-5)
        assert feature.largest == pytest.approx(0.1, abs=1e-5)


def test_contexts_are_where_a_latent_fires_each_from_another_block(reader, batches):
    (found,), _ = survey([reader], batches, contexts=3)
    features = describe(reader, found, batches, [1, 3, 4], window=2)
    h, exclamation, never = ([bytes(c.tokens).decode() for c in f.contexts] for f in features)
    assert sorted(h) == ["!!hel", "the "]  # at the edge of its block, and inside
    assert exclamation == ["cat!!"[1:] + "h"] or exclamation == ["at!!h"]
    assert never == []
    for context in features[0].contexts:
        fires = [ord("h") == token for token in context.tokens]
        assert [activation > 0 for activation in context.activations] == fires


def test_the_strongest_contexts_come_first(reader, batches):
    with torch.no_grad():
        reader.head.W_enc[:, 0] += 0.5 * reader.head.W_enc[:, 3]  # on "!" of the second block too
        reader.head.b_enc[0] = -0.45
    (found,), _ = survey([reader], batches, contexts=2)
    largest = found.largest[0].tolist()
    assert largest == sorted(largest, reverse=True)
    (feature,) = describe(reader, found, batches, [0], window=0)
    peaks = [context.activations[0] for context in feature.contexts]
    assert peaks == pytest.approx(largest)


def test_neighbours_are_the_latents_with_the_nearest_directions():
    head = make_head(SAEHeadConfig("standard", SITE, 2, 4))
    with torch.no_grad():
        head.W_dec.copy_(torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 3.0], [-1.0, 0.0]]))
    first, last = nearest_directions(head, torch.tensor([0, 3]))
    assert [index for index, _ in first] == [2, 1, 3]
    assert [cosine for _, cosine in first] == pytest.approx([0.5**0.5, 0, -1])
    assert [index for index, _ in last] == [1, 2, 0]


def test_a_direction_promotes_the_token_whose_embedding_it_is(reader):
    chosen = torch.arange(len(LETTERS))
    added = logits(reader, chosen)
    assert added.argmax(dim=1).tolist() == [ord(letter) for letter in LETTERS]
    torch.testing.assert_close(added.mean(dim=1), torch.zeros(4), atol=1e-6, rtol=0)
    cosines = reader.model.transformer.wte.weight @ reader.model.transformer.wte.weight[ord("t")]
    expected = cosines - cosines.mean()  # whatever the length of the direction
    torch.testing.assert_close(added[0], expected.detach(), atol=1e-5, rtol=1e-4)


def test_logits_go_through_the_final_layer_norm(reader):
    """A push of the stream and what it does to the logits, with the layer norm's scale given."""
    ln_f = reader.model.transformer.ln_f
    with torch.no_grad():
        ln_f.weight.uniform_(0.5, 2.0)
        x, direction = torch.randn(16, dtype=torch.float64), reader.head.W_dec[2].double()
        unit = direction / direction.norm()
        push = 1e-4 * unit

        def out(x):
            y = (x - x.mean()) * ln_f.weight.double() + ln_f.bias.double()
            return reader.model.lm_head.weight.double() @ y

        change = (out(x + push) - out(x)) / 1e-4
    expected = change - change.mean()
    found = logits(reader, torch.tensor([2]))[0].double()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def surveyed(columns):
    latents = torch.tensor(columns).T[None]  # (1, tokens, d_sae)
    found = Survey.of_nothing(latents.shape[-1], 1).with_batch(latents, 0, latents.shape[1])
    return found, latents[0].double()


def test_correlations_by_hand():
    first, a = surveyed([[0.0, 1.0, 0.0, 1.0], [0.0, 0.0, 0.0, 3.0], [0.0, 0.0, 0.0, 0.0]])
    second, b = surveyed([[0.0, 2.0, 0.0, 2.0], [5.0, 0.0, 5.0, 0.0]])
    found = first.correlations(second, a.T @ b)
    third = 1 / 3**0.5
    expected = torch.tensor([[1.0, -1.0], [third, -third], [0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(found, expected)


def indices(matches):
    return [(match.first, match.second) for match in matches]


def test_each_feature_stands_beside_the_one_that_correlates_most():
    correlations = torch.tensor([[0.1, 0.9, 0.99], [0.0, 0.5, 0.0], [0.2, 0.1, 0.0]])
    # the second head's latent 2 is not shown
    found = match_by_correlation([0, 2, 1], [0, 1], correlations)
    assert indices(found) == [(0, 1), (2, 0), (1, 1)]
    assert found[0].correlation == pytest.approx(0.9)
    assert indices(match_by_correlation([0], [0, 1], correlations)) == [(0, 1), (None, 0)]
    assert indices(match_by_correlation([1], [], correlations)) == [(1, None)]


def test_by_the_decoder_features_are_paired_one_to_one_by_the_sum_of_cosines():
    first = torch.tensor([[1.0, 0.0, 0.0], [0.0, 5.0, 0.0], [0.0, 0.0, 2.0]])
    second = torch.tensor([[0.6, 0.0, 0.8], [0.0, 0.0, 3.0], [0.0, 0.1, 0.0], [1.0, 0.0, 0.0]])
    correlations = torch.arange(12.0).view(3, 4) / 100
    # of the second head latent 3 is not shown; 0 and 2 of the first are both nearest to 0 or 1
    found = match_by_decoder([2, 0, 1], [1, 0, 2], [first, second], correlations)
    assert indices(found) == [(2, 1), (0, 0), (1, 2)]
    assert [match.cosine for match in found] == pytest.approx([1.0, 0.6, 1.0])
    assert [match.correlation for match in found] == pytest.approx([0.09, 0.0, 0.06])


def test_by_the_decoder_the_wider_head_has_features_without_a_partner():
    eye = torch.eye(3)
    none = torch.zeros(3, 3)
    assert indices(match_by_decoder([0, 2], [1, 2, 0], [eye, eye], none)) == [
        (0, 0),
        (2, 2),
        (None, 1),
    ]
    found = match_by_decoder([0, 1, 2], [2], [eye, eye], none)
    assert indices(found) == [(0, None), (1, None), (2, 2)]
    assert found[0].cosine is None and found[0].correlation is None
    assert indices(match_by_decoder([1], [], [eye, eye], none)) == [(1, None)]


def test_chance_is_that_of_as_many_random_directions():
    few, many = torch.randn(2, 40, 8, generator=torch.Generator().manual_seed(3))
    narrow, wide = (chance_cosine(range(4), range(n), [few, many]) for n in (4, 40))
    assert 0 < narrow < wide < 1  # more to choose from
    assert wide == chance_cosine(range(4), range(40), [few, -many])
    assert chance_cosine([], [1], [few, many]) is None


def shown(*indices):
    features = [Feature(index, 0.1, 1.0, 2.0, [], [], [], []) for index in indices]
    return Shown("model", SITE, "a head", 10, features, 0, 0, character_tokenizer(8))


def test_tokens_are_highlighted_by_strength_and_signs_stand_for_what_cannot_be_seen():
    context = Context([*b"ab\n c\x00d"], [0.0, 0.0, 1.8, 0.0, 0.1, 2.0, -1.0])
    runs = shown(0).runs(context, largest=2.0)
    assert [(run.text, run.level) for run in runs] == [
        ("ab", 0),
        ("↵", 8),
        (" ", 0),
        ("c", 1),
        ("\\x00", 9),
        ("d", 0),
    ]


# ---- the command ----


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Two models with heads of their own, heads of a sweep, and a text."""
    folder = tmp_path_factory.mktemp("given")
    write_text(folder / "text.txt")
    for seed, name in enumerate(("one", "two")):
        model, tokenizer = load_checkpoint(str(save_stock_model(folder / name, seed)))
        torch.manual_seed(seed)
        model.attach_heads([SAEHeadConfig("topk", SITE, 16, 24, k=2)])
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    slim, tokenizer = load_checkpoint(str(save_stock_model(folder / "slim", n_embd=8)))
    slim.attach_heads([SAEHeadConfig("topk", SITE, 8, 10, k=2)])
    slim.save_pretrained(folder / "slim")
    tokenizer.save_pretrained(folder / "slim")
    save_heads([make_head(SAEHeadConfig("topk", SITE, 16, 10, k=2))], folder / "cell")
    save_heads([make_head(SAEHeadConfig("topk", SITE, 8, 10, k=2))], folder / "narrow")
    return folder


def features(given, output_dir, models=("one",), **changes):
    options = {"hook_name": SITE, "dataset": given / "text.txt", "blocks": 6, "contexts": 2}
    options |= {"window": 4, "use_cpu": "true", "output_dir": output_dir} | changes
    words = ["features", *(str(given / name) for name in models)]
    for name, value in options.items():
        values = value if isinstance(value, list) else [value]
        words += [f"--{name}", *map(str, values)]
    return saereg(*words)


def text_of(page):
    html = page.read_text("utf-8").partition("<body>")[2]
    return " ".join(unescape(re.sub(r"<[^>]+>", "", html)).split())


@pytest.fixture(scope="module")
def page(given, tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    assert features(given, folder) is None
    return folder / "index.html"


@pytest.fixture(scope="module")
def pair(given, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    assert features(given, folder, ["one", "two"]) is None
    return folder / "index.html"


@pytest.fixture(scope="module")
def decoder_pair(given, tmp_path_factory):
    """A head of 24 latents beside one of 10."""
    pytest.importorskip("scipy")
    folder = tmp_path_factory.mktemp("decoder_pair")
    changes = {"match_by": "decoder", "saes": [given / "one", given / "cell"]}
    assert features(given, folder, ["one", "two"], **changes) is None
    return folder / "index.html"


def test_every_feature_that_fires_has_a_card(page):
    elements = elements_of(page)
    cards = {own["id"] for tag, own in elements if tag == "article"}
    text = text_of(page)
    number, dead = map(int, re.search(r"(\d+) features shown.*?; (\d+) never fired", text).groups())
    assert len(cards) == number > 5 and number + dead == 24
    marks = [own for tag, own in elements if tag == "mark"]
    assert len(marks) >= number and all(float(own["title"]) > 0 for own in marks)
    assert "a topk head with 24 latents, read on 192 tokens" in text


def test_a_pair_stands_side_by_side(pair):
    elements = elements_of(pair)
    cards = [own.get("id") for tag, own in elements if tag == "article"]
    ids = [card for card in cards if card]
    assert len(ids) == len(set(ids))
    assert {card[0] for card in ids} == {"a", "b"}
    assert "Features of one and two" in text_of(pair)
    assert "the median correlation is" in text_of(pair)
    assert re.search(r"Without a partner: 0 of the \d+ features shown of one,", text_of(pair))


def test_a_pair_by_the_decoder_states_cosines_and_who_is_without_a_partner(decoder_pair):
    text = text_of(decoder_pair)
    said = re.search(
        r"Without a partner: (\d+) of the (\d+) features shown of one, (\d+) of the (\d+) of two",
        text,
    )
    alone, of_one, also_alone, of_two = map(int, said.groups())
    pairs = re.findall(r"cosine [+−]?\d\.\d\d, correlation [+−]?\d\.\d\d", text)
    assert len(pairs) == of_two == of_one - alone
    assert also_alone == 0 and text.count("No feature of two is left for it.") == alone > 0
    assert re.search(r"the median cosine is \S+ \(0\.\d\d if one model's were random\)", text)


@pytest.mark.parametrize("which", ["page", "pair", "decoder_pair"])
def test_pages_are_whole_and_load_nothing(which, request):
    page = request.getfixturevalue(which)
    assert_self_contained(page, elements_of(page))


@needs_browser
@pytest.mark.parametrize("which", ["page", "pair", "decoder_pair"])
def test_browser_shows_the_page_without_an_error(which, request, tmp_path):
    assert_shown(request.getfixturevalue(which), tmp_path, images=0)


@needs_browser
@pytest.mark.parametrize("which", ["page", "pair"])
def test_pages_can_be_used_by_keys_alone(which, request, tmp_path):
    assert_usable_by_keys(request.getfixturevalue(which), tmp_path)


def test_heads_of_a_sweep_can_be_shown(given, tmp_path):
    assert features(given, tmp_path, saes=[given / "cell"], max_features=3) is None
    text = text_of(tmp_path / "index.html")
    assert "a topk head with 10 latents" in text and "3 features shown" in text


UNCHECKED = "No record says on which model the head was trained"


@pytest.fixture(scope="module")
def swept(given):
    """A cell of a real sweep of the first model."""
    text = ("--dataset", given / "text.txt", "--use_cpu", "true")
    grid = "--families topk --target_l0 2 --d_sae 10 --max_steps 2 --warmup_steps 1"
    more = "--batch_size 2 --fidelity_blocks 2"
    options = (*text, *grid.split(), *more.split(), "--output_dir", given / "sweep")
    assert saereg("sweep", given / "one", *options) is None
    (cell,) = (given / "sweep" / "saes").iterdir()
    return cell


def test_heads_that_were_swept_on_another_model_are_refused(given, swept, tmp_path):
    said = features(given, tmp_path / "out", ["two"], saes=[swept])
    assert "was on another model than" in said and "\n" not in said
    assert not (tmp_path / "out").exists()
    assert features(given, tmp_path, ["one"], saes=[swept]) is None
    assert UNCHECKED not in text_of(tmp_path / "index.html")


def test_the_page_says_where_no_record_names_the_model_of_the_heads(given, page, tmp_path):
    assert features(given, tmp_path, ["two"], saes=[given / "cell"]) is None
    assert UNCHECKED in text_of(tmp_path / "index.html")
    assert features(given, tmp_path, ["two"], saes=[given / "two"]) is None
    assert UNCHECKED not in text_of(tmp_path / "index.html") + text_of(page)


@pytest.mark.parametrize(
    ("models", "changes", "sentence"),
    [
        (["one"], {"hook_name": "blocks.9.hook_resid_pre"}, "Unknown hook name"),
        (["one"], {"hook_name": "blocks.1.hook_resid_pre"}, "none on blocks.1"),
        (["one"], {"saes": ["nowhere"]}, "nowhere has no heads"),
        (["one", "two"], {"saes": ["cell"]}, "1 folders for 2 models"),
        (["one", "two", "one"], {}, "3 models"),
        (["one"], {"blocks": 0}, "blocks is 0"),
        (["one", "two"], {"match_by": "luck"}, "must be correlation or decoder"),
        (["one"], {"match_by": "decoder"}, "one was named"),
        (["one", "slim"], {"match_by": "decoder"}, "streams of 16 and 8 dimensions"),
        (["three"], {}, "neither a folder nor"),
    ],
)
def test_what_cannot_be_shown_is_refused_in_one_sentence(
    given, tmp_path, models, changes, sentence
):
    found = features(given, tmp_path / "out", models, **changes)
    assert sentence in found and "\n" not in found
    assert not (tmp_path / "out").exists()


def test_models_of_different_widths_are_compared_by_what_they_read(given, tmp_path):
    assert features(given, tmp_path, ["one", "slim"]) is None
    assert "the median correlation is" in text_of(tmp_path / "index.html")


def test_a_head_of_another_width_is_refused(given, tmp_path):
    assert "reads 8 dimensions" in features(given, tmp_path, saes=[given / "narrow"])
