"The final model is uploaded to a local server in place of the Hub; what goes wrong there costs neither the run nor the model."

import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import pytest
from hub import Hub
from huggingface_hub.utils import close_session

from langmlm.config import ConfigError
from langmlm.disk import find_damage
from langmlm.train.run_folder import RunFolder

TOKEN = "hf_writes"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    "A server in place of the Hub, without Xet storage, and nobody is logged in."
    constants = huggingface_hub.constants
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    close_session()
    with Hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        yield server
    close_session()


def is_in_a_file(text: str, folder: Path) -> list[Path]:
    "The files below a folder that contain a text."
    return [path for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


def test_upload(hub: Hub, create: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    "The whole folder arrives in a private repository, under the name of the run folder, and no file has the token."
    caplog.set_level("INFO")
    settings = {"logging_dir": tmp_path / "logs", "report_to": ["tensorboard"], "max_steps": 4}
    task = create(tmp_path / "my-model", push_to_hub=True, hub_token=TOKEN, **settings)
    history = task.train()
    folder = tmp_path / "my-model" / "final_model"
    sent = hub.files["me/my-model"]
    assert sent == {path.name: path.read_bytes() for path in folder.iterdir()} and hub.private == {"me/my-model": True}
    assert {"model.safetensors", "README.md", "tokenizer.json", "manifest.json"} <= sent.keys()
    assert f"uploaded {folder} to {hub.url}/me/my-model" in caplog.text
    assert is_in_a_file(TOKEN, tmp_path) == [] and TOKEN not in caplog.text + repr(task.config) + repr(history)


def test_login(hub: Hub, create: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    "Without `hub_token`, the token of the environment is used; a public repository has to be asked for."
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    create(tmp_path / "run", push_to_hub=True, hub_model_id="lab/tweets", hub_private_repo=False, max_steps=2).train()
    assert hub.private == {"lab/tweets": False} and "model.safetensors" in hub.files["lab/tweets"]
    assert b'pipeline("fill-mask", model="lab/tweets")' in hub.files["lab/tweets"]["README.md"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "no token found"),
        ({"hub_token": "hf_wrong"}, "Invalid"),
        ({"hub_token": "hf_reads"}, "the token can only read"),
        ({"hub_token": TOKEN, "hub_model_id": "me/public"}, "me/public is public: make it private, name another"),
        ({"hub_token": TOKEN, "license": "nonsense"}, "license"),
    ],
)
def test_errors_before_the_run(
    hub: Hub, create: Callable, tmp_path: Path, settings: dict, message: str, monkeypatch: pytest.MonkeyPatch
):
    "What would fail at the end fails before the first step, and the folder of the run can be used again."
    hub.add("me/public", private=False)
    steps = []
    monkeypatch.setattr("langmlm.train.loop.train_step", lambda *_: steps.append(1))
    task = create(tmp_path / "run", push_to_hub=True, max_steps=2, **settings)
    with pytest.raises(ConfigError, match=message) as caught:
        task.train()
    assert "leave push_to_hub out" in str(caught.value) and "hf_w" not in str(caught.value).replace("hf_wrong", "")
    assert not steps and not any(hub.files.values())
    monkeypatch.undo()
    create(tmp_path / "run", max_steps=2).train()


def test_no_network(create: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    "An offline machine is told so before the run."
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    close_session()
    with pytest.raises(ConfigError, match="offline mode is enabled"):
        create(tmp_path / "run", push_to_hub=True, hub_token=TOKEN, max_steps=2).train()


def test_failed_upload(hub: Hub, create: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    "The run succeeds, the model is whole, and the warning has the command that uploads it; `train` tries again."
    hub.fails = "commit/main"
    task = create(tmp_path / "run", push_to_hub=True, hub_model_id="lab/tweets", hub_token=TOKEN, max_steps=2)
    assert task.train().log_history[-1]["step"] == 2
    folder = tmp_path / "run" / "final_model"
    (warning,) = [record.getMessage() for record in caplog.records if "upload failed" in record.getMessage()]
    command = f"hf upload lab/tweets {folder} . --private"
    assert warning.endswith(f"to upload it: {command}") and TOKEN not in caplog.text
    assert find_damage(folder) == [] and hub.files["lab/tweets"] == {}

    executable = Path(sys.executable).with_name("hf")
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    hub.fails = ""
    subprocess.run([executable, *shlex.split(command)[1:]], env=environment, check=True, capture_output=True, timeout=600)
    assert hub.files["lab/tweets"].keys() == {path.name for path in folder.iterdir()}

    hub.files["lab/tweets"].clear()
    task.train()
    assert hub.files["lab/tweets"].keys() == {path.name for path in folder.iterdir()}


def test_made_public_during_the_run(hub: Hub, create: Callable, tmp_path: Path, monkeypatch, caplog):
    "Nothing is sent to a repository that became public after the check."
    task = create(tmp_path / "run", push_to_hub=True, hub_token=TOKEN, max_steps=2)
    finish = RunFolder.finish

    def make_public(*arguments):
        hub.private["me/run"] = False
        finish(*arguments)

    monkeypatch.setattr(RunFolder, "finish", make_public)
    task.train()
    assert hub.files["me/run"] == {} and "the upload failed: me/run is public" in caplog.text
    assert "hf upload" not in caplog.text  # It would publish the model


def test_card_on_the_hub_stays(hub: Hub, create: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    "A README.md in the repository is not replaced; everything else is."
    hub.add("me/run", True, **{"README.md": b"written on the Hub", "config.json": b"{}"})
    create(tmp_path / "run", push_to_hub=True, hub_token=TOKEN, max_steps=2).train()
    sent = hub.files["me/run"]
    assert sent["README.md"] == b"written on the Hub" and sent["config.json"] != b"{}"
    assert "me/run has a README.md, which is not replaced" in caplog.text


def test_command_line(hub: Hub, data: dict[str, Path], tmp_path: Path):
    "`langmlm train --push_to_hub` uploads, and neither the options of the run nor the log have the token."
    settings = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    settings |= {"max_steps": 2, "hub_model_id": "lab/cli", "hub_token": TOKEN, "output_dir": "run", "bf16": "false"}
    words = [word for name, value in {**data, **settings}.items() for word in (f"--{name}", str(value))]
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "langmlm", "train", "--push_to_hub", *words]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "model.safetensors" in hub.files["lab/cli"] and "push_to_hub: true" in (tmp_path / "run/options.yaml").read_text()
    assert is_in_a_file(TOKEN, tmp_path) == [] and TOKEN not in done.stdout + done.stderr


def test_resumed_run_uploads(hub: Hub, create: Callable, resume: Callable, tmp_path: Path):
    "The options of the upload are kept when a run is resumed; the token is not, and has to be given again."
    create(tmp_path / "run", push_to_hub=True, hub_token=TOKEN, hub_model_id="lab/x", max_steps=8).train(stop_at_step=4)
    assert hub.files == {"lab/x": {}}
    with pytest.raises(ConfigError, match="no token found"):
        resume(tmp_path / "run").train()
    resume(tmp_path / "run", hub_token=TOKEN).train()
    assert "model.safetensors" in hub.files["lab/x"]
