"What tools read besides the code: citation, types, warnings; and what `langmlm export` prints."

import ast
import os
import shutil
import subprocess
import sys
from inspect import signature
from pathlib import Path

import pytest
import yaml
from package import read_settings
from sandbox import ROOT

from langmlm import cli, tasks
from langmlm.train.metrics import History

SCRIPT = """
from langmlm import tasks
from langmlm.train.metrics import History

tokenizer = tasks.create_tokenizer(data_path="data.txt", tokenizer_config={"vocab_size": 50_265, "max_length": 512})
report = tokenizer.train()
model = tasks.create_mlm(
    tokenizer="tokenizer",
    tokenized_dataset="tokenized_dataset",
    training_config={"per_device_train_batch_size": 4, "num_train_epochs": 2},
    model_config={"vocab_size": 50_265, "num_hidden_layers": 12},
)
print(model.estimate().seconds, model.arithmetic().tokens)
history: History = model.train(stop_at_step=10)
history.plot("loss.png", unigram_entropy=6.0)
model.show_batch(step=1)
model.worst_tokens(rows=3)
"""


def test_citation():
    "It has the version, license and address of the package, and what the format needs."
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    settings = read_settings(ROOT)
    assert {"cff-version", "message", "title", "authors"} <= citation.keys() and citation["cff-version"] == "1.2.0"
    assert citation["version"] == settings["version"] and citation["license"] == "Apache-2.0"
    assert citation["repository-code"] == settings["git_url"]
    assert citation["url"] == settings["doc_host"] + settings["doc_baseurl"]


def test_import():
    "Importing the package raises no warning, and does not load what only plots need."
    program = "import sys, langmlm; from langmlm import tasks; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert done.stdout == "False\n"


@pytest.mark.parametrize("kind", [tasks.MLMTask, tasks.TokenizerTask, History])
def test_patched_methods_are_declared(kind: type):
    "Type checkers know the public methods that are added to a class after its body."
    tree = ast.parse(Path(sys.modules[kind.__module__].__file__).read_text(encoding="utf-8"))
    (body,) = [node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == kind.__name__]
    declared = {node.name for node in body if isinstance(node, ast.FunctionDef)}
    declared |= {node.target.id for node in body if isinstance(node, ast.AnnAssign)}
    public = {name for name, value in vars(kind).items() if callable(value) and not name.startswith("_")}
    assert public and public <= declared


def test_pyright_accepts_a_script(tmp_path: Path):
    "A user's script has no error in basic mode."
    if (pyright := shutil.which("pyright")) is None:
        pytest.skip("pyright is not installed")
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [pyright, "--pythonpath", sys.executable, tmp_path / "script.py"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stdout


def test_export(tmp_path: Path, capsys: pytest.CaptureFixture):
    "The commands name the final model of a run, and need no option."
    (tmp_path / "a run" / "final_model").mkdir(parents=True)
    assert cli.main(["export", str(tmp_path / "a run")]) == 1 and "is not the folder of a run or a model" in capsys.readouterr().err
    (tmp_path / "a run" / "final_model" / "config.json").write_text("{}", encoding="utf-8")
    assert cli.main(["export", str(tmp_path / "a run")]) == 0
    *_, last = lines = capsys.readouterr().out.splitlines()
    assert f"--model '{tmp_path}/a run/final_model' --task fill-mask" in last and lines[0].startswith("# ")
    assert list(signature(cli._export).parameters) == ["model"]
    assert not any("pip install" in line and not line.startswith("onnx_environment/") for line in lines)
