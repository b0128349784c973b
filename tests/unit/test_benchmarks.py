"The summaries of benchmark results, on numbers that can be checked by hand."

from data import split_documents
from learning import learning_contenders
from processes import Failure
from rounds import interleave, rotated
from summary import best_precision, by_peer, compare, is_noisy, noisy_names, rates, ratio, spread


def rounds_of(*tokens_per_second: float) -> list[dict]:
    "Rounds of two seconds each."
    return [{"tokens": 2 * rate, "seconds": 2.0} for rate in tokens_per_second]


def test_spread_has_median_extremes_and_quartiles():
    assert spread([5, 1, 4, 2, 3]) == {"median": 3, "min": 1, "q1": 2, "q3": 4, "max": 5}
    assert set(spread([7.0]).values()) == {7.0}


def test_noisy_if_the_middle_half_exceeds_a_fifth_of_the_median():
    assert not is_noisy(spread([9, 10, 11]))
    assert is_noisy(spread([8, 10, 12, 8, 12]))


def test_rates_count_real_tokens():
    assert rates([{"tokens": 300, "computed": 9_000, "seconds": 1.5}]) == [200.0]


def test_ratio_is_taken_round_by_round():
    "A machine that slows down for both changes their medians but not the ratio."
    assert ratio([100, 50, 10], [10, 5, 1]) == {"median": 10, "min": 10, "q1": 10, "q3": 10, "max": 10}
    assert ratio([10, 20, 30, 40, 50], [10, 10, 10, 10, 10])["noisy"] is True


def test_best_precision_is_the_faster():
    assert best_precision({"fp32": 10.0, "bf16": 9.0}) == "fp32"
    assert by_peer(["trainer-dynamic-bf16", "trainer-dynamic-fp32", "langmlm-fp32"]) == {
        "trainer-dynamic": ["bf16", "fp32"],
        "langmlm": ["fp32"],
    }


def test_comparison_takes_the_best_precision_of_each_side():
    summary = compare(
        {
            "langmlm-fp32": rounds_of(100, 100, 100),
            "langmlm-bf16": rounds_of(200, 200, 200),
            "trainer-dynamic-fp32": rounds_of(80, 80, 80),
            "trainer-dynamic-bf16": rounds_of(40, 40, 40),
            "langformers-fp32": rounds_of(1, 4, 10),
        }
    )
    best = summary["best"]["trainer-dynamic"]
    assert best["of"] == ["langmlm-bf16", "trainer-dynamic-fp32"] and best["median"] == 2.5
    assert summary["ratios"]["langmlm-fp32 / trainer-dynamic-bf16"]["median"] == 2.5
    assert "langmlm-bf16 / langmlm-bf16" not in summary["ratios"]
    assert noisy_names(summary) == ["langmlm-fp32 / langformers-fp32", "langmlm-bf16 / langformers-fp32", "langformers"]


def test_comparison_without_langmlm_is_empty():
    assert compare({"langformers-fp32": rounds_of(1, 2)}) == {"ratios": {}, "best": {}}


def test_every_round_starts_with_another_contender():
    assert [rotated(["a", "b", "c"], number)[0] for number in range(4)] == ["a", "b", "c", "a"]
    assert rotated([], 3) == []


def test_a_failed_contender_does_not_stop_the_others():
    class Answering:
        def ask(self, **command):
            return {"round": {"seconds": 1.0, "tokens": 2}}

    class Failing:
        def ask(self, **command):
            raise Failure("ended: killed")

    figures, failed = interleave({"good": Answering(), "bad": Failing()}, 2, {})
    assert figures == {"good": [{"seconds": 1.0, "tokens": 2}] * 2} and failed == {"bad": "ended: killed"}


def test_learning_steps_have_equal_tokens():
    chosen = learning_contenders(mean_tokens=24, max_length=128)
    assert {name: changes["batch_size"] for name, (_, changes) in chosen.items()} == {
        "langmlm-lines": 32,
        "langmlm-packed": 6,
        "trainer-dynamic": 32,
        "trainer-concatenated": 6,
        "langformers": 32,
    }


def test_long_documents_end_at_empty_lines():
    assert split_documents("a\nb\n\nc\n", "long") == ["a b", "c"]
    assert split_documents("a\nb\n", "long") == ["a", "b"]
    assert split_documents("a\n\nb\n", "short") == ["a", "b"]
