"""modeling_distrogpt.py in transformers: forward uses each of its arguments or refuses it, and every way to
generate writes the same text."""

import sys
from typing import Any

import pytest
import torch
from conftest import REPO
from test_export import (
    KINDS,
    change_settings,
    export_model,
    greedy,
    load_in_transformers,
    modules_cache,  # noqa: F401  the fixture
    our_greedy,
    random_ids,
    random_model,
)

from model import GPT

OURS = ("modern", "own, table of positions")


@pytest.fixture(scope="module", params=OURS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[GPT, Any]:
    """A network of ours, and its export in transformers."""
    model = random_model(**KINDS[request.param][1])
    return model, load_in_transformers(export_model(tmp_path_factory.mktemp("hf"), model))


@pytest.fixture
def theirs(pair: tuple[GPT, Any]) -> Any:
    return pair[1]


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def returned_cache(output: Any) -> Any:
    """The cache in what forward returns; the name of its field depends on the version."""
    return output.to_tuple()[-1]


def new_cache(theirs: Any, kind: str) -> Any:
    from transformers import DynamicCache, StaticCache

    return DynamicCache(config=theirs.config) if kind == "dynamic" else StaticCache(theirs.config, 16)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_is_read_under_either_name(name, kind, pair):
    model, theirs = pair
    ids, cache = random_ids(2, 9), new_cache(theirs, kind)
    parts = [theirs(part, **{name: cache}) for part in ids.split([4, 1, 1, 3], dim=1)]
    assert_close(torch.cat([part.logits for part in parts], dim=1), model(ids, ids)[0][..., :97])
    assert int(cache.get_seq_length()) == 9
    assert all(returned_cache(part) is cache for part in parts)


@torch.no_grad()
def test_two_different_caches_are_refused(theirs):
    ids, (one, other) = random_ids(1, 4), (new_cache(theirs, "dynamic") for _ in range(2))
    with pytest.raises(ValueError, match="two names of one argument"):
        theirs(ids, cache=one, past_key_values=other)
    assert returned_cache(theirs(ids, cache=one, past_key_values=one)) is one


UNKNOWN = {
    "the_cache": object(),
    "token_type_ids": torch.ones(1, 4, dtype=torch.long),
    "encoder_hidden_states": torch.ones(1, 4, 64),
    "cu_seq_lens_q": torch.tensor([0, 2, 4]),
    "output_attentions": True,
    "output_router_logits": True,
    "is_causal": False,
}


@torch.no_grad()
@pytest.mark.parametrize("name", UNKNOWN)
def test_an_argument_that_would_change_the_result_is_refused(name, theirs):
    with pytest.raises(TypeError, match=f"does not support {name}"):
        theirs(random_ids(1, 4), **{name: UNKNOWN[name]})


@torch.no_grad()
def test_an_argument_that_changes_nothing_is_accepted(theirs):
    ids = random_ids(1, 4)
    same = {**dict.fromkeys(UNKNOWN), "output_attentions": False, "is_causal": True}
    same |= {"num_items_in_batch": 3, "cache_position": torch.arange(4)}
    assert theirs(ids, **same).logits.equal(theirs(ids).logits)


@torch.no_grad()
def test_arguments_that_contradict_each_other_are_refused(theirs):
    ids, table = random_ids(1, 4), theirs.get_input_embeddings()
    past = returned_cache(theirs(ids))
    for wrong, words in (
        ({"input_ids": ids, "inputs_embeds": table(ids)}, "either input_ids or inputs_embeds"),
        ({}, "either input_ids or inputs_embeds"),
        ({"input_ids": ids, "attention_mask": torch.ones(1, 3)}, "for 3 tokens, but 0 are in the"),
        ({"input_ids": ids, "attention_mask": torch.ones(1, 4), "past_key_values": past}, "4 are in the"),
        ({"input_ids": ids, "attention_mask": torch.ones(1, 4, 4)}, "a tensor of 2 or 4 dimensions"),
        ({"input_ids": ids, "attention_mask": {}}, "a tensor of 2 or 4 dimensions"),
        ({"input_ids": ids, "position_ids": torch.tensor([[0, 1, 0, 1]])}, "packed into one row"),
    ):
        with pytest.raises(ValueError, match=words):
            theirs(**wrong)


@torch.no_grad()
@pytest.mark.parametrize("additive", [False, True])
def test_texts_packed_into_one_row_are_read_as_if_alone(additive, pair):
    model, theirs = pair
    first, second = random_ids(1, 5), random_ids(1, 4)
    mask = torch.block_diag(torch.ones(5, 5), torch.ones(4, 4)).tril().bool()[None, None]
    if additive:
        mask = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    packed, positions = torch.cat((first, second), dim=1), torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]])
    logits = theirs(packed, attention_mask=mask, position_ids=positions, use_cache=False).logits
    expected = [model(text, text)[0] for text in (first, second)]
    assert_close(logits, torch.cat(expected, dim=1)[..., : logits.size(-1)])  # the vocabulary is not padded


@torch.no_grad()
def test_hidden_states_and_tuples_are_returned_if_requested(theirs):
    ids = random_ids(2, 4)
    plain, output = theirs(ids), theirs(ids, output_hidden_states=True)
    assert plain.hidden_states is None and len(output.hidden_states) == theirs.config.n_layer + 1
    embedded = theirs.get_input_embeddings()(ids)
    if not theirs.config.rotary:
        embedded = embedded + theirs.transformer["wpe"].weight[:4]
    assert output.hidden_states[0].equal(embedded)
    logits, cap = theirs.lm_head(output.hidden_states[-1]), theirs.config.logit_softcap
    assert_close(cap * torch.tanh(logits / cap) if cap else logits, plain.logits)
    loss, logits, _ = theirs(ids, labels=ids, return_dict=False)
    assert loss.equal(theirs(ids, labels=ids).loss) and logits.equal(plain.logits)
    with pytest.raises(TypeError, match="output_attentions"):
        greedy(theirs, ids, 3, output_attentions=True, return_dict_in_generate=True)
    steps = greedy(theirs, ids, 3, output_hidden_states=True, return_dict_in_generate=True).hidden_states
    assert [step[-1].shape[1] for step in steps] == [4, 1, 1]


GENERATION_OPTIONS: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "without a cache": {"use_cache": False},
    "a cache of fixed size": {"cache_implementation": "static", "disable_compile": True},
    "the prompt in parts": {"cache_implementation": "dynamic", "prefill_chunk_size": 4},
    "guesses from the prompt": {"prompt_lookup_num_tokens": 3},
    "a prompt of embeddings": {},
    "the cache of an earlier call": {},
}


@torch.no_grad()
@pytest.mark.parametrize("way", GENERATION_OPTIONS)
def test_each_way_to_generate_writes_our_text(way, pair):
    model, theirs = pair
    ids, options = random_ids(1, 9).repeat(1, 2), GENERATION_OPTIONS[way]
    expected = our_greedy(model, ids, 30)
    never = min(set(range(97)) - set(expected.flatten().tolist()))  # of transformers 5.0, guesses need an end
    if way == "a prompt of embeddings":
        options = {"inputs_embeds": theirs.get_input_embeddings()(ids)}
    elif way == "the cache of an earlier call":
        earlier = theirs(ids[:, :7])
        options = {list(earlier)[-1]: returned_cache(earlier)}
    assert greedy(theirs, ids, 30, eos_token_id=never, **options).tolist() == expected.tolist()


def test_assisted_generation(pair):
    model, theirs = pair
    ids = random_ids(1, 9)
    assert greedy(theirs, ids, 20, assistant_model=theirs).tolist() == our_greedy(model, ids, 20).tolist()


def test_transformers_trainer(theirs, tmp_path):
    from transformers import Trainer, TrainingArguments

    ids = random_ids(8, 12)
    labels = ids.clone()
    labels[:, 0] = -100  # which no position predicts; transformers 5.0 counts it otherwise
    rows = [{"input_ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)]
    paths = {"output_dir": str(tmp_path), "report_to": [], "use_cpu": True, "disable_tqdm": True}
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 2}
    rate = {"learning_rate": 0.0, "logging_steps": 1, "save_strategy": "no"}
    trainer = Trainer(theirs, TrainingArguments(**paths, **sizes, **rate), train_dataset=rows)
    with torch.no_grad():
        expected = theirs.eval()(ids, labels=labels)
    theirs.config.use_cache = True  # the trainer may have changed it
    prediction = trainer.predict(rows)
    assert_close(torch.from_numpy(prediction.predictions), expected.logits)  # and no cache beside them
    assert prediction.metrics["test_loss"] == pytest.approx(expected.loss.item(), abs=1e-4)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses) / 2 == pytest.approx(expected.loss.item(), abs=1e-3)
    theirs.eval()


def test_transformers_5_3_is_refused(tmp_path, monkeypatch):
    folder = export_model(tmp_path, random_model(**KINDS["own, LayerNorm"][1]))
    code = sys.modules[type(load_in_transformers(folder)).__module__]
    monkeypatch.setattr(code.transformers, "__version__", "5.3.0")
    with pytest.raises(ImportError, match=r"5\.3\.0 leaves lm_head.weight of this model empty"):
        load_in_transformers(folder)


@pytest.mark.parametrize("name", ["activation", "norm"])
def test_unknown_settings_are_refused(name, tmp_path):
    folder = export_model(tmp_path, random_model(**KINDS["own, LayerNorm"][1]))
    change_settings(folder, **{name: "newer"})
    with pytest.raises(ValueError, match=f"{name}=newer"):
        load_in_transformers(folder)


def test_the_file_alone_refreshes_a_folder(tmp_path):
    model = random_model(**KINDS["modern"][1])
    folder = export_model(tmp_path, model)
    code = folder / "modeling_distrogpt.py"
    fresh = code.read_text(encoding="utf-8")
    code.write_text(fresh.replace("def forward", "def backward"), encoding="utf-8")
    load_in_transformers(folder)
    code.write_bytes((REPO / "distrogpt" / "huggingface" / code.name).read_bytes())  # README's cp
    ids = random_ids(1, 9)
    assert greedy(load_in_transformers(folder), ids, 20).tolist() == our_greedy(model, ids, 20).tolist()
