"""Every fusion, head and way of training learns; what makes no sense is refused with the reason."""

import pytest

from benchmarks.matrix import ALL, REFUSED, STEPS, Case, losses_of, reason_of_refusal, train_case, write_weights

FEW = [
    Case("cross_attention", "l1", "frozen"),
    Case("gated", "flow", "lora"),
    Case("prefix", "discrete", "qlora"),
    Case("prefix", "l1", "full"),
]
"""Each fusion, each head and each mode once; the rest is slow."""


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_weights(tmp_path_factory.mktemp("weights"))


def check_that_it_learns(case: Case, weights, folder):
    if case.mode == "qlora":
        pytest.importorskip("bitsandbytes")
    first, last = losses_of(train_case(case, weights, STEPS, folder))
    assert last <= first / 2, f"{case}: the loss went from {first:.3f} to {last:.3f} in {STEPS} steps"


@pytest.mark.parametrize("case", FEW, ids="-".join)
def test_the_loss_falls_by_half(case, weights, tmp_path):
    check_that_it_learns(case, weights, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in ALL if case not in FEW], ids="-".join)
def test_the_loss_falls_by_half_in_every_combination(case, weights, tmp_path):
    check_that_it_learns(case, weights, tmp_path)


def test_the_few_hold_every_part():
    assert all({case[i] for case in FEW} == {case[i] for case in ALL} for i in range(3))


@pytest.mark.parametrize("name", REFUSED)
def test_what_makes_no_sense_is_refused_with_the_reason(name):
    assert len(reason_of_refusal(REFUSED[name])) > 40
