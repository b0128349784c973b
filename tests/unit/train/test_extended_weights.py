"A model with more rows computes what it computed before, and its new rows are what was asked for."

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    PreTrainedModel,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
)

from langmlm.train.extend import embed_new_words, repeat_positions

SIZES = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
FAMILIES = {
    "roberta": lambda **options: RobertaForMaskedLM(RobertaConfig(**SIZES, pad_token_id=1, **options)),
    "xlm-roberta": lambda **options: XLMRobertaForMaskedLM(XLMRobertaConfig(**SIZES, pad_token_id=1, **options)),
    "bert": lambda **options: BertForMaskedLM(BertConfig(**SIZES, **options)),
}
IDS = torch.arange(5, 25)[None]


def build(family: str, **options) -> PreTrainedModel:
    "Make a model whose biases are no zeros."
    torch.manual_seed(0)
    model = FAMILIES[family](max_position_embeddings=32, **options).eval()
    torch.nn.init.normal_(model.get_output_embeddings().bias)
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_new_words_start_as_the_mean_of_their_pieces(family: str, tied: bool, tmp_path):
    old, pieces = build(family, tie_word_embeddings=tied), [[7, 8], [9, 9, 10], [11]]
    new = embed_new_words(old, pieces, first=32)
    assert new.config.vocab_size == 35 and old.config.vocab_size == 32 and not new.training
    with torch.no_grad():
        torch.testing.assert_close(new(IDS).logits[..., :32], old(IDS).logits)
        outputs = [(model.get_output_embeddings().weight, model.get_output_embeddings().bias) for model in (old, new)]
        for before, after in ((model.get_input_embeddings().weight for model in (old, new)), *zip(*outputs)):
            for id, ids in enumerate(pieces, start=32):
                torch.testing.assert_close(after[id], before[ids].mean(0))
        new.save_pretrained(tmp_path)
        torch.testing.assert_close(type(new).from_pretrained(tmp_path).eval()(IDS).logits, new(IDS).logits)


def test_rows_without_a_token_stay_at_the_end():
    old = build("roberta")  # Its tokenizer would have 30 tokens
    new, weight = embed_new_words(old, [[7, 8]], first=30), old.get_input_embeddings().weight
    expected = torch.cat([weight[:30], weight[7:9].mean(0, keepdim=True), weight[30:]])
    torch.testing.assert_close(new.get_input_embeddings().weight, expected)


def test_extending_leaves_the_random_generator_alone():
    model, state = build("roberta"), torch.get_rng_state()
    embed_new_words(model, [[7]], first=32)
    assert torch.get_rng_state().equal(state)


@pytest.mark.parametrize("family", FAMILIES)
def test_positions_are_repeated(family: str):
    old, first = build(family), 0 if family == "bert" else 2
    new = repeat_positions(old, 70)
    tables = [model.base_model.embeddings.position_embeddings.weight for model in (old, new)]
    assert len(tables[1]) == first + 70 == new.config.max_position_embeddings
    for position in range(70):
        assert tables[1][first + position].equal(tables[0][first + position % (32 - first)])
    assert tables[1][:first].equal(tables[0][:first])
    with torch.no_grad():
        torch.testing.assert_close(new(IDS).logits, old(IDS).logits)
        assert new(torch.arange(70)[None] % 27 + 5).logits.shape[1] == 70


def test_what_cannot_be_extended_is_an_error():
    with pytest.raises(ValueError, match="max_length must be an integer above 30, which the model reads already, got 30"):
        repeat_positions(build("roberta"), 30)
    small = T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match="t5 model has no learned position embeddings"):
        repeat_positions(T5ForConditionalGeneration(small), 30)
