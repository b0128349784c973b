"Initial weights from a corpus: what they are, for every shape of model, and that nothing else changes."

import numpy as np
import pytest
import torch
from transformers import BertConfig, ModernBertConfig, PreTrainedModel, RobertaConfig, RobertaForMaskedLM

from langmlm.model.initialization import (
    _neighbor_offset,
    attend_by_rotation,
    attend_to_neighbors,
    count_neighbors,
    embed_neighbors,
    initialize_from_corpus,
)
from langmlm.model.roberta import build_model

VOCABULARY, SPECIAL = 120, range(5)
SIZES = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 3, "intermediate_size": 128}
FIXED = {"vocab_size": VOCABULARY, "max_position_embeddings": 66, "pad_token_id": 1, "attn_implementation": "eager"}
IDS = {"bos_token_id": 0, "eos_token_id": 2, "cls_token_id": 0, "sep_token_id": 2}
FAMILIES = {"roberta": RobertaConfig, "bert": BertConfig, "modernbert": ModernBertConfig}
HEADS = {"roberta": "lm_head.dense", "bert": "transform.dense", "modernbert": "head.dense"}


def make_model(**changes) -> RobertaForMaskedLM:
    "A stock model with random weights."
    return build_model(RobertaConfig(**FIXED, **SIZES | changes))


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
    initialize_from_corpus(model, counts(corpus), corpus, SPECIAL)


def test_counts_of_stored_ids():
    "Datasets store ids in two bytes, into which the cells of the table do not fit."
    ids = np.array([60_000, 5, 60_000], np.uint16)
    assert count_neighbors([(ids, np.array([3]))], np.array([5]), 60_001)[60_000].tolist() == [1, 1]


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
    suffixes += ("lm_head.dense.bias", "lm_head.layer_norm.weight")
    assert all(name.endswith(suffixes) for name in changed)
    attention = "roberta.encoder.layer.0.attention.self"
    assert changed >= {f"{attention}.query.weight", f"{attention}.key.weight"}
    words, decoder = model.roberta.embeddings.word_embeddings.weight, model.lm_head.decoder.weight
    seen = torch.from_numpy(counts(corpus) > 0)
    seen[list(SPECIAL)] = False
    assert torch.equal(decoder[seen], words[seen]) and (decoder is words) == tied
    assert torch.equal(words[~seen], before["roberta.embeddings.word_embeddings.weight"][~seen])
    assert not words[1].any()  # The padding row stays zero


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_passes_hidden_states_on(corpus, family: str):
    "Its dense layer becomes the identity and the random matrix; a hidden state keeps its direction."
    model = build_model(FAMILIES[family](**FIXED | IDS, **SIZES))
    name = next(name for name, part in model.named_modules() if name.endswith(HEADS[family]))
    before, hidden = model.get_submodule(name).weight.clone(), torch.randn(9, 64)
    initialize(model, corpus)
    dense = model.get_submodule(name)
    torch.testing.assert_close(dense.weight - before, torch.eye(64))
    linear = torch.nn.functional.linear(hidden, dense.weight)
    assert torch.nn.functional.cosine_similarity(linear, hidden).min() > 0.9
    bias = 0 if dense.bias is None else dense.bias
    torch.testing.assert_close(dense(hidden), linear + bias)
    norm = next(part for part in model.get_submodule(name.rpartition(".")[0]).modules() if isinstance(part, torch.nn.LayerNorm))
    passed = norm(torch.nn.functional.gelu(linear + bias))
    assert torch.equal(norm.weight, torch.full((64,), 4.0))
    centered = hidden - hidden.mean(1, keepdim=True)
    least = 0.5 if dense.bias is None else 0.9  # Without a bias, the GELU cuts off the negative half
    assert torch.nn.functional.cosine_similarity(passed, centered).min() > least


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
    model, before = (make_model(hidden_size=8, num_attention_heads=8) for _ in range(2))
    initialize(model, corpus)
    for mine, theirs in zip(model.roberta.encoder.layer, before.roberta.encoder.layer, strict=True):
        assert torch.equal(mine.attention.self.query.weight, theirs.attention.self.query.weight)
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


@pytest.mark.parametrize(("width", "weight"), [(32, 4.0), (256, 2.0), (384, 4 / 3), (768, 1.0)])
def test_layer_norm_of_the_head(corpus, width: int, weight: float):
    "Narrow models need larger weights for logits of the same size."
    model = make_model(hidden_size=width, num_hidden_layers=1)
    initialize(model, corpus)
    torch.testing.assert_close(model.lm_head.layer_norm.weight, torch.full((width,), weight))
