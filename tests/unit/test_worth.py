"The benchmark of pretraining: nothing that is tested is trained on, and finished pieces are made once."

from pathlib import Path

from worth import POINTS, Pieces, collect_documents, whole_points, without_paths


def test_test_rows_are_not_in_the_text(tmp_path: Path):
    (tmp_path / "a.txt").write_text("one  two\nthree\n\nfour five\n\nsix\n\nseven\n", encoding="utf-8")
    rows = ["split,label,text", "test,x,one two three", "dev,y,four  five", "validation,y,six", "train,x,eight"]
    (tmp_path / "set.csv").write_text("\n".join(rows), encoding="utf-8")
    documents, counts = collect_documents([tmp_path / "a.txt"], [tmp_path / "set.csv"])
    assert sorted(documents) == ["eight", "seven"] and counts == {"removed_test_rows": 3, "documents": 2}


def test_a_piece_is_made_again_only_if_its_settings_change(tmp_path: Path):
    made = []

    def make() -> dict:
        made.append(len(made))
        return {"number": len(made)}

    results = [Pieces(tmp_path / "pieces").get("a", {"size": size}, make)["number"] for size in (1, 1, 2, 2)]
    assert results == [1, 1, 2, 2] and made == [0, 1]


def test_curves_have_equal_steps():
    assert [whole_points(steps) for steps in (0.2, POINTS * 2 + 1, POINTS * 10)] == [POINTS, POINTS * 2, POINTS * 10]


def test_results_name_no_folder():
    results = {"model": "/runs/model", "curve": [{"path": "/runs", "loss": 1.0}], "settings": {"model": {"layers": 4}}}
    assert without_paths(results) == {"curve": [{"loss": 1.0}], "settings": {"model": {"layers": 4}}}
