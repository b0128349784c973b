"Initial weights from a corpus: what they are, for every shape of model, and that nothing else changes."

import numpy as np
import pytest
import torch
from transformers import BertConfig, ModernBertConfig, PreTrainedModel, RobertaConfig, RobertaForMaskedLM

from langmlm.model import initialization
from langmlm.model.initialization import (
    _fit_contexts,
    _neighbor_offset,
    _read_contexts,
    attend_by_rotation,
    attend_to_neighbors,
    count_neighbors,
    embed_neighbors,
    initialize_from_corpus,
)
from langmlm.model.roberta import build_model

VOCABULARY, SPECIAL, MASK = 120, range(5), 4
SIZES = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 3, "intermediate_size": 128}
FIXED = {"vocab_size": VOCABULARY, "max_position_embeddings": 66, "pad_token_id": 1, "attn_implementation": "eager"}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
IDS = {"bos_token_id": 0, "eos_token_id": 2, "cls_token_id": 0, "sep_token_id": 2}
FAMILIES = {"roberta": RobertaConfig, "bert": BertConfig, "modernbert": ModernBertConfig}


def make_model(**changes) -> RobertaForMaskedLM:
    "A stock model with random weights."
    return build_model(RobertaConfig(**FIXED, **SIZES | NO_DROPOUT | changes))


@pytest.fixture
def corpus() -> list[tuple[np.ndarray, np.ndarray]]:
    "Sequences of ordinary tokens between <s> and </s>; the tokens from 110 on never occur."
    generator = np.random.default_rng(0)
    rows = np.minimum(109, 5 + generator.geometric(0.03, (200, 12)))
    rows[:, 0], rows[:, -1] = 0, 2
    return [(part.ravel(), np.full(len(part), 12)) for part in np.split(rows, 4)]


def counts(corpus) -> np.ndarray:
    return sum(np.bincount(ids, minlength=VOCABULARY) for ids, _ in corpus)


def initialize(model: PreTrainedModel, corpus) -> None:
    initialize_from_corpus(model, counts(corpus), lambda tokens: corpus, SPECIAL, MASK)


def test_counts_equal_a_loop():
    "Neighbors at distance 1 and 2, before and after, in the same sequence, of contexts only."
    generator = np.random.default_rng(1)
    lengths, contexts = np.array([1, 7, 2, 30]), np.array([6, 5, 9])
    ids = generator.integers(5, 12, lengths.sum())
    expected = torch.zeros(12, 6)
    for end, length in zip(np.cumsum(lengths), lengths):
        row = ids[end - length : end]
        for here, token in enumerate(row):
            for distance in (1, 2):
                for column, there in ((0, here - distance), (3, here + distance)):
                    if 0 <= there < length and row[there] in contexts:
                        expected[token, column + contexts.tolist().index(row[there])] += 1 / distance
    assert torch.equal(count_neighbors([(ids, lengths)], contexts, 12), expected)


def test_blocks_add_up(corpus):
    whole = [(np.concatenate([ids for ids, _ in corpus]), np.concatenate([lengths for _, lengths in corpus]))]
    contexts = np.arange(5, 60)
    parts = count_neighbors(corpus, contexts, VOCABULARY)
    assert torch.equal(parts, count_neighbors(whole, contexts, VOCABULARY))


@pytest.mark.parametrize("width", [16, 64, 512], ids="narrow as-wide wider-than-the-table".split())
def test_embeddings_have_the_norm_of_random_ones(corpus, width: int):
    table = count_neighbors(corpus, np.arange(5, 60), VOCABULARY)
    with_neighbors = table.any(1)
    embedding = embed_neighbors(table, width, norm=0.3)
    assert embedding.shape == (VOCABULARY, width) and embedding.isfinite().all()
    assert torch.allclose(embedding[with_neighbors].norm(dim=1), torch.tensor(0.3), atol=1e-4)
    assert not embedding[~with_neighbors].any()


def test_initialization_is_deterministic_and_keeps_the_random_state(corpus):
    models = []
    for _ in range(2):
        model, state = make_model(), torch.get_rng_state()
        initialize(model, corpus)
        assert torch.equal(torch.get_rng_state(), state)
        models.append(model.state_dict())
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


@pytest.mark.parametrize("tied", [True, False])
def test_what_changes(corpus, tied: bool):
    "Embeddings of tokens with neighbors, positions, attention, the output bias, the head; nothing else."
    model, before = make_model(tie_word_embeddings=tied), make_model(tie_word_embeddings=tied).state_dict()
    initialize(model, corpus)
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    suffixes = ("word_embeddings.weight", "position_embeddings.weight", "query.weight", "key.weight")
    suffixes += ("lm_head.decoder.weight", "decoder.bias", "lm_head.bias", "lm_head.dense.weight")
    suffixes += (
        "layer.0.attention.self.value.weight",
        "layer.0.attention.output.dense.weight",
    )  # Of the first layer only
    assert all(name.endswith(suffixes) for name in changed)
    added = model.lm_head.dense.weight - before["lm_head.dense.weight"]
    torch.testing.assert_close(added, torch.eye(64))
    words, decoder = model.roberta.embeddings.word_embeddings.weight, model.lm_head.decoder.weight
    seen = torch.from_numpy(counts(corpus) > 0)
    seen[list(SPECIAL)] = False
    assert torch.equal(decoder[seen], words[seen]) and (decoder is words) == tied
    assert torch.equal(words[~seen], before["roberta.embeddings.word_embeddings.weight"][~seen])
    assert not words[1].any()  # The padding row stays zero


@pytest.mark.parametrize("name", NO_DROPOUT)
def test_with_dropout_the_first_layer_stays_random(corpus, name: str):
    model, before = make_model(**{name: 0.1}), make_model().state_dict()
    initialize(model, corpus)
    for suffix in (
        "layer.0.attention.self.value.weight",
        "layer.0.attention.output.dense.weight",
        "lm_head.dense.weight",
    ):
        key = next(key for key in before if key.endswith(suffix))
        assert torch.equal(model.state_dict()[key], before[key])
    assert not torch.equal(
        model.roberta.embeddings.word_embeddings.weight, before["roberta.embeddings.word_embeddings.weight"]
    )


def test_bias_is_the_logarithm_of_frequencies(corpus):
    model = make_model()
    initialize(model, corpus)
    shares = model.lm_head.decoder.bias.exp()
    assert shares.sum().item() == pytest.approx(1)
    occurrences = counts(corpus)
    assert (shares[20] / shares[30]).item() == pytest.approx((occurrences[20] + 0.5) / (occurrences[30] + 0.5), rel=1e-4)
    assert shares[0] == shares[115]  # As if it never occurred: it is never predicted


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 8])
def test_heads_attend_to_their_offset(heads: int):
    model = make_model(num_attention_heads=heads, hidden_size=96)
    attend_to_neighbors(model)
    with torch.no_grad():
        attentions = model.eval().roberta(torch.randint(5, VOCABULARY, (1, 40)), output_attentions=True).attentions
    for number, attention in enumerate(attentions):
        for head in range(-(-heads // 2)):
            means = {offset: attention[0, head].diagonal(offset).mean() for offset in range(-9, 10)}
            assert max(means, key=means.get) == _neighbor_offset(head, number)


def test_one_dimension_a_head(corpus):
    "Heads too small for a rotation keep their random weights."
    model = make_model(hidden_size=8, num_attention_heads=8)
    initialize(model, corpus)
    loss = model(torch.randint(5, 100, (2, 9)), labels=torch.randint(5, 100, (2, 9))).loss
    assert loss.isfinite()


def test_a_single_token(corpus):
    "Text without any neighbors leaves the embeddings random."
    blocks, model = [(np.array([0, 7, 2]), np.array([3]))], make_model()
    before = model.roberta.embeddings.word_embeddings.weight.clone()
    initialize(model, blocks)
    assert torch.equal(model.roberta.embeddings.word_embeddings.weight[3:7], before[3:7])
    assert all(weight.isfinite().all() for weight in model.state_dict().values())


@pytest.mark.parametrize("heads", [1, 3, 4])
def test_rotated_heads_attend_to_their_offset(heads: int):
    "In global and local layers of a ModernBERT; the constant part of the tokens changes no probability."
    sizes = {"hidden_size": 32 * heads, "num_attention_heads": heads, "num_hidden_layers": 3, "intermediate_size": 64}
    model = build_model(ModernBertConfig(**FIXED | IDS, **sizes)).eval()
    attend_by_rotation(model)
    with torch.no_grad():
        attentions = model(torch.randint(5, VOCABULARY, (2, 40)), output_attentions=True).attentions
        decoder, hidden = model.get_output_embeddings(), torch.randn(7, 32 * heads)
        with_part = decoder(hidden).log_softmax(-1)
        decoder.weight[:, :2] = 0
        torch.testing.assert_close(decoder(hidden).log_softmax(-1), with_part)
    for number, attention in enumerate(attentions):
        for head in range(-(-heads // 2)):
            assert attention[:, head].diagonal(_neighbor_offset(head, number), 1, 2).mean() > 0.7


@pytest.mark.parametrize("family", FAMILIES)
def test_contexts_equal_a_loop(family: str):
    "Hidden states of the neighbors, zeros where there are none; tokens are hidden first."
    model = build_model(FAMILIES[family](**FIXED | IDS | NO_DROPOUT, **SIZES)).eval()
    lengths, offsets = np.array([1, 7, 2, 30]), [-1, 1, -2, 2]
    ids = np.random.default_rng(1).integers(5, VOCABULARY, lengths.sum())
    ids[[1, 7]] = 0, 2
    chosen = {"special_ids": torch.tensor([0, 1, 2, 3, 4]), "mask_id": MASK, "seed": 3}
    ((states, hidden_ids),) = _read_contexts(model, [(ids, lengths)], offsets, **chosen)
    is_hidden = (torch.rand(len(ids), generator=torch.Generator().manual_seed(3)) < 0.3).numpy() & (ids > 4)
    assert 3 < is_hidden.sum() == len(states) and hidden_ids.tolist() == ids[is_hidden].tolist()
    expected, masked = [], np.where(is_hidden, MASK, ids)
    for end, length in zip(np.cumsum(lengths), lengths):
        row = slice(end - length, end)
        inputs = model.base_model.embeddings(torch.from_numpy(masked[row])[None])[0]
        for here in np.flatnonzero(is_hidden[row]):
            near = [inputs[here + offset] if 0 <= here + offset < length else 0 * inputs[0] for offset in offsets]
            expected.append(torch.stack(near))
    torch.testing.assert_close(states, torch.stack(expected))


def test_known_maps_are_found():
    "Whatever the mean of the states; the maps ignore it, and predict with a norm of 1."
    torch.manual_seed(0)
    states, mean = torch.randn(4_000, 2, 8), torch.randn(2, 8)
    ids, targets = torch.arange(4_000), torch.einsum("npi,pij->nj", states, true := torch.randn(2, 8, 8))
    found = _fit_contexts(zip((states + 3 * mean).split(900), ids.split(900)), targets, torch.ones(4_000))
    torch.testing.assert_close(torch.einsum("pi,pij->pj", mean, found), torch.zeros(2, 8), atol=0.02, rtol=0)
    predicted = torch.einsum("npi,pij->nj", states, found)
    assert predicted.norm(dim=1).square().mean().sqrt().item() == pytest.approx(1, abs=0.02)
    ignored = torch.nn.functional.normalize(mean)
    kept = torch.eye(8) - ignored[:, :, None] * ignored[:, None]  # What a map that ignores the mean can know
    best = torch.einsum("npi,pij->nj", states, kept @ true)
    assert torch.nn.functional.cosine_similarity(predicted, best).mean() > 0.99


def test_rare_targets_count_more():
    states, ids = torch.eye(2).repeat(100, 1)[:, None], torch.zeros(200, dtype=torch.int64)
    ids[:20] = 1
    found = [
        _fit_contexts([(states + torch.tensor([5.0, 0.0]), ids)], torch.tensor([[1.0, 0.0], [0.0, 1.0]]), weights)
        for weights in (torch.tensor([1.0, 1.0]), torch.tensor([1.0, 50.0]))
    ]
    shares = [(linear[0, 1, 1] / linear[0, 1].abs().sum()).abs() for linear in found]
    assert found[0].isfinite().all() and shares[1] > shares[0]


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_values_and_outputs_multiply_to_the_maps(corpus, family: str, heads: int, monkeypatch: pytest.MonkeyPatch):
    "Of each neighbor, as well as their rank allows; the other heads stay random."
    maps = torch.randn(1 if heads < 4 else 2, 64, 64)
    monkeypatch.setattr(initialization, "_fit_contexts", lambda *_: maps / 8)
    model = build_model(FAMILIES[family](**FIXED | IDS | NO_DROPOUT, **SIZES | {"num_attention_heads": heads}))
    initialize(model, corpus)
    layer = model.model.layers[0].attn if family == "modernbert" else model.base_model.encoder.layer[0].attention
    values = layer.Wqkv.weight[128:] if family == "modernbert" else layer.self.value.weight
    output = layer.Wo.weight if family == "modernbert" else layer.output.dense.weight
    products = [output[:, rows] @ values[rows] for rows in torch.arange(64).split(64 // heads)]
    for linear, product in zip(maps, products):
        left, singular, right = torch.linalg.svd(linear)
        best = left[:, : 64 // heads] * singular[: 64 // heads] @ right[: 64 // heads]
        torch.testing.assert_close(product.T, best, atol=1e-4, rtol=1e-3)
    assert all(product.norm() < 1 for product in products[len(maps) :])


@pytest.mark.parametrize("family", FAMILIES)
def test_predicts_before_training(family: str):
    "Where each token follows from its neighbor, the initial loss is far below that of the token frequencies."
    generator = np.random.default_rng(0)
    rows = 5 + (generator.integers(0, 100, (400, 1)) + 7 * np.arange(12)) % 100  # Each token is followed by one 7 higher
    corpus = [(rows.ravel(), np.full(400, 12))]
    losses = []
    for predicts in (False, True):
        wider = SIZES | {"hidden_size": 128}  # Heads of 32 dimensions: room for maps of 100 tokens
        model = build_model(FAMILIES[family](**FIXED | IDS | NO_DROPOUT, **wider))
        with pytest.MonkeyPatch.context() as patch:
            if not predicts:
                patch.setattr(initialization, "_predict_from_contexts", lambda *_: None)
            initialize(model, corpus)
        assert model.training
        masked = torch.arange(12) == torch.from_numpy(generator.integers(1, 11, (400, 1)))
        ids = torch.from_numpy(rows)
        with torch.no_grad():
            labels = ids.where(masked, -100)
            losses.append(model.eval()(ids.where(~masked, MASK), labels=labels).loss.item())
    assert losses[1] < losses[0] - 0.3 and losses[0] > 4.5  # ln(100) is 4.6
