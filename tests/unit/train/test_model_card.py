"The model card: valid metadata, true counts, no text of the corpus, and no edit is ever lost."

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard import metadata_load

from langmlm import tasks
from langmlm.config import ConfigError
from langmlm.disk import find_damage, read_json, read_manifest, unlisted_files, write_manifest
from langmlm.testing import tiny_run
from langmlm.train.checkpoint import save_model
from langmlm.train.config import TrainingConfig
from langmlm.train.model_card import _metadata, make_model_card

PROBES = ("Return the <mask> of the file.", "A <mask> and a <mask> | `x`", 'Say "<mask>": {no} \\ --- é')


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tasks.MLMTask:
    "A finished run with evaluations; names of its folders and of the run must not be in the card."
    folder = tmp_path_factory.mktemp("patients")
    settings = {"output_dir": folder / "demo", "eval_steps": 40, "probe_sentences": PROBES, "run_name": "ward-7"}
    settings |= {"logging_dir": folder / "logs", "language": "en", "license": "apache-2.0"}
    task = tiny_run(folder, tokenizer_config={"validation_fraction": 0.2}, **settings)
    task.train()
    return task


def final_model(run: tasks.MLMTask) -> Path:
    "The folder of the model."
    return run.config.run_folder / "final_model"


def trainer_state(run: tasks.MLMTask) -> dict:
    "A copy of the state of the run."
    return read_json(run.config.run_folder / "trainer_state.json")


def write_card(run: tasks.MLMTask, folder: Path, **changes) -> tuple[str, dict]:
    "A card of a run with other options, and its metadata."
    state = trainer_state(run)
    state["langmlm"]["config"] |= changes.pop("options", {})
    state["langmlm"]["state"] |= changes
    card = make_model_card(run.model, run.tokenizer, state)
    (folder / "README.md").write_text(card, encoding="utf-8")
    return card, metadata_load(folder / "README.md")


# Metadata


def test_metadata(run: tasks.MLMTask):
    "As the Hub's own tools read it; sentences with one mask are examples."
    data = metadata_load(final_model(run) / "README.md")
    assert data == {
        "language": "en",
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "fill-mask",
        "tags": ["masked-lm", "langmlm"],
        "mask_token": "<mask>",
        "widget": [{"text": PROBES[0]}, {"text": PROBES[2]}],
    }
    assert ModelCard.load(final_model(run) / "README.md").data.to_dict() == data


def test_another_mask_token(run: tasks.MLMTask, tmp_path: Path):
    "The user's sentences have `<mask>`; the card shows them with the token of the model."
    options = {"probe_sentences": ["the <mask> value"]}
    data = yaml.safe_load(_metadata(run.config.without_secrets() | options, "[MASK]"))
    assert data["widget"] == [{"text": "the [MASK] value"}] and data["mask_token"] == "[MASK]"
    filled = [{"sentence": "the [MASK] value", "predictions": [[["new", 0.5]]]}]
    state = trainer_state(run)
    state["langmlm"]["config"] |= options
    state["log_history"].append({"step": 1, "filled_masks": filled})
    card = make_model_card(run.model, SimpleNamespace(mask_token="[MASK]"), state)
    assert "the [MASK] value -> 'new' 50%" in card
    assert 'pipeline("fill-mask", model="path/to/final_model")("the [MASK] value")' in card


def test_what_is_unknown_is_left_out(run: tasks.MLMTask, tmp_path: Path):
    "Neither language nor license is guessed; without sentences there is no example."
    options = {"language": None, "license": None, "probe_sentences": []}
    card, data = write_card(run, tmp_path, options=options)
    assert data.keys() == {"library_name", "pipeline_tag", "tags", "mask_token"}
    assert "Filled masks" not in card and "Text with a <mask> in it." in card


def test_base_model(run: tasks.MLMTask, tmp_path: Path):
    "A model on the Hub is named, a folder is not: its path says where the user's data are."
    card, data = write_card(run, tmp_path, initial_weights="FacebookAI/roberta-base")
    assert data["base_model"] == "FacebookAI/roberta-base" and "from the weights of another model" in card
    for folder in (tmp_path, tmp_path / "deleted"):
        card, data = write_card(run, tmp_path, initial_weights=str(folder))
        assert "base_model" not in data and "from the weights of another model" in card and tmp_path.name not in card
    assert "pretrained from scratch" in write_card(run, tmp_path)[0]


@pytest.mark.parametrize("name", ["language", "license"])
def test_names_of_language_and_license(name: str):
    "What the Hub could not know is an error at once."
    assert getattr(TrainingConfig(**{name: "de"}), name) == "de"
    for value in ("", "German text", "Apache 2", "x\ny: z"):
        with pytest.raises(ConfigError, match=f"{name} must be lowercase letters"):
            TrainingConfig(**{name: value})


# Content


def test_counts(run: tasks.MLMTask):
    "What the card says of data, length and result is what manifest and log say."
    card = (final_model(run) / "README.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| ([^|]+?) +\| ([^|]+?) +\|$", card, re.MULTILINE))
    manifest = read_manifest(run.config.run_folder.parent / "dataset")
    for name in ("documents", "sequences", "tokens"):
        assert rows[f"{name} in the training split"] == f"{manifest['splits']['train'][name]:,}"
    steps = run.loader.plan.total_steps
    assert rows["optimizer steps"] == f"{steps:,}"
    assert rows["tokens seen"] == f"about {2 * manifest['splits']['train']['tokens']:,}"
    hours, minutes, seconds = map(int, rows["training time"].split()[1].split(":"))
    log = run.state.log_history
    speed = sorted(entry["tokens_per_second"] for entry in log if "tokens_per_second" in entry)
    slowest, fastest = (2 * manifest["splits"]["train"]["tokens"] / value for value in (speed[0], speed[-1]))
    assert fastest <= 3600 * hours + 60 * minutes + seconds <= slowest + 1
    last = [entry for entry in log if "eval_loss" in entry][-1]
    assert re.search(rf"^\| {steps} \| [\d.]+ \| {last['eval_loss']:.3f} \|", card, re.MULTILINE)
    assert f"{run.state.log_history[-1].get('unigram_entropy') or last['unigram_entropy']:.3f}" in card
    assert f"{run.model.num_parameters():,} parameters" in card


def test_loss_table(run: tasks.MLMTask, tmp_path: Path):
    "Evenly spaced, with the first and the last entry, however long the log is."
    state = trainer_state(run)
    state["log_history"] = [{"step": step, "loss": 10 / step} for step in range(1, 1_001)]
    rows = re.findall(r"^\| ([\d,]+) \| ([\d.]+) \|$", make_model_card(run.model, run.tokenizer, state), re.MULTILINE)
    steps = [int(step.replace(",", "")) for step, _ in rows]
    assert len(rows) == 12 and (steps[0], steps[-1]) == (1, 1_000) and max(steps[i + 1] - steps[i] for i in range(11)) < 93
    state["log_history"] = []
    assert "| step |" not in make_model_card(run.model, run.tokenizer, state)


def test_options(run: tasks.MLMTask):
    "Architecture and options, as JSON."
    card = (final_model(run) / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```json\n(.*?)```", card, re.DOTALL)
    shown = json.loads(block)
    assert shown["hidden_size"] == 32 and shown["learning_rate"] == 2e-3 and shown["optim"] == "adamw_torch_fused"
    assert shown["initialization"] == "random" and shown["hidden_dropout_prob"] == 0.1
    assert not {"max_rollbacks", "probe_held_out", "save_steps", "use_cpu"} & shown.keys()


def test_nothing_of_the_corpus(run: tasks.MLMTask):
    "No held-out sentence, path or name of a run; the user's own sentences are there, and their predictions."
    card = (final_model(run) / "README.md").read_text(encoding="utf-8")
    filled = [entry for entry in run.state.log_history if "filled_masks" in entry][-1]["filled_masks"]
    held_out = [entry["sentence"] for entry in filled if "held_out" in entry]
    assert len(held_out) == 3 and not any(text in card or text[:20] in card for text in held_out)
    for text in PROBES:
        assert re.search(rf"^    {re.escape(text)} -> '", card, re.MULTILINE)
    for secret in ("patients", "ward-7", str(run.config.run_folder.parent), "logs"):
        assert secret not in card
    corpus = (run.config.run_folder.parent / "data.txt").read_text(encoding="utf-8").splitlines()
    assert not any(line in card for line in corpus if len(line) > 20)


def test_older_probes_and_held_out_sentences_in_the_log(run: tasks.MLMTask):
    "A sentence is shown only if it is a probe sentence of this run and is not held out."
    state = trainer_state(run)
    for entry in state["log_history"]:
        for filled in entry.get("filled_masks", []):
            if filled["sentence"] == PROBES[0]:
                filled["held_out"] = "name"
            elif "held_out" in filled:
                filled["sentence"] = filled["sentence"] + " (secret)"
                del filled["held_out"]
    card = make_model_card(run.model, run.tokenizer, state)
    assert "secret" not in card and f"    {PROBES[0]} ->" not in card and f"    {PROBES[1]} ->" in card


def test_other_tools_data_have_no_documents(run: tasks.MLMTask):
    "A dataset without a manifest has sequences and tokens only."
    state = trainer_state(run)
    state["langmlm"]["data"]["documents"] = None
    card = make_model_card(run.model, run.tokenizer, state)
    assert "documents in" not in card and "sequences in the training split" in card


# In the folder


def test_an_edited_card(run: tasks.MLMTask, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    "Editing or deleting the card is no damage; a new model replaces the old card, but never an edited one."
    folder = tmp_path / "final_model"
    save_model(folder, run.model, run.tokenizer, "first")
    assert find_damage(folder) == [] and unlisted_files(folder) == []
    save_model(folder, run.model, run.tokenizer, "second")
    assert [path.name for path in tmp_path.iterdir()] == ["final_model"] and not caplog.text
    (folder / "README.md").write_text("mine", encoding="utf-8")
    assert find_damage(folder) == [] and unlisted_files(folder) == ["README.md"]
    save_model(folder, run.model, run.tokenizer, "third")
    assert (tmp_path / "superseded-final_model" / "README.md").read_text(encoding="utf-8") == "mine"
    assert (folder / "README.md").read_text(encoding="utf-8") == "third"
    (folder / "README.md").unlink()
    assert find_damage(folder) == []
    save_model(folder, run.model, run.tokenizer)
    assert not (folder / "README.md").exists() and len(list(tmp_path.iterdir())) == 2
    (folder / "config.json").write_text("{}")
    assert len(find_damage(folder)) == 1


def test_manifest_with_editable_files(tmp_path: Path):
    "They are listed apart from the others, which must not change."
    for name in ("a.txt", "notes.txt"):
        (tmp_path / name).write_text(name)
    manifest = write_manifest(tmp_path, "model", editable=["notes.txt", "missing.txt"])
    assert list(manifest["files"]) == ["a.txt"] and list(manifest["editable"]) == ["notes.txt"]
    assert "editable" not in write_manifest(tmp_path, "model")


def test_resumed_run_replaces_its_card(run: tasks.MLMTask, tmp_path: Path):
    "The card of a longer run counts all its sessions."
    task = tiny_run(run.config.run_folder.parent, output_dir=tmp_path / "run", max_steps=20, save_steps=10)
    task.train(stop_at_step=10)
    assert not (tmp_path / "run" / "final_model").exists()
    tiny_run(run.config.run_folder.parent, checkpoint_path=tmp_path / "run", max_steps=30).train()
    card = (tmp_path / "run" / "final_model" / "README.md").read_text(encoding="utf-8")
    assert "| optimizer steps | 30 |" in card and "\n| 10 | " in card and "\n| 30 | " in card


def test_an_error_in_the_card_costs_nothing(run, tmp_path: Path, monkeypatch, caplog: pytest.LogCaptureFixture):
    "The model is saved without a card, and the log says why."
    monkeypatch.setattr("langmlm.train.run_folder.make_model_card", lambda *_: 1 / 0)
    tiny_run(run.config.run_folder.parent, output_dir=tmp_path / "run", max_steps=2).train()
    folder = tmp_path / "run" / "final_model"
    assert find_damage(folder) == [] and not (folder / "README.md").exists()
    assert "the model card could not be written" in caplog.text and "ZeroDivisionError" in caplog.text


# The token


def test_token_is_no_public_option():
    "It is in neither the representation nor the options that are written down, but survives a copy."
    from dataclasses import replace

    config = TrainingConfig(hub_token="hf_secret", push_to_hub=True, hub_model_id="me/x")
    assert replace(config, seed=1).hub_token == "hf_secret"
    assert "hf_secret" not in repr(config) + str(config) + str(config.without_secrets())


def test_name_of_the_repository(tmp_path: Path):
    "The folder of the run names it; a name that the Hub does not allow is an error at once, if it is needed."
    assert TrainingConfig(output_dir=tmp_path / "my-model").repo_name == "my-model"
    assert TrainingConfig(run_name="x", hub_model_id="me/y").repo_name == "me/y"
    TrainingConfig(output_dir=tmp_path / "my model")
    for invalid in ({"output_dir": tmp_path / "my model"}, {"hub_model_id": "a/b/c"}, {"hub_model_id": "me/model.git"}):
        with pytest.raises(ConfigError, match="hub_model_id must be the name of a repository, got"):
            TrainingConfig(push_to_hub=True, **invalid)
    with pytest.raises(ConfigError, match="hub_strategy must be one of end, got 'every_save'"):
        TrainingConfig(hub_strategy="every_save")
