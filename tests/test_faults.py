"""Every fault has a test, or a reason why not."""

import subprocess
import sys
from pathlib import Path

from tests.faults import FAULTS, UNTESTED, by_fault


def test_every_fault_has_a_test_or_a_reason_and_no_test_names_another():
    tests = by_fault()
    assert set(tests) | set(UNTESTED) == set(FAULTS) == set(range(1, 60))
    assert not set(tests) & set(UNTESTED)


def test_the_script_prints_every_fault_with_its_tests():
    run = subprocess.run(
        [sys.executable, "-m", "tests.faults"], capture_output=True, text=True, check=True,
        cwd=Path(__file__).parents[1],
    )  # fmt: skip
    for number, names in by_fault().items():
        assert f"{number:2} {FAULTS[number]}\n     {names[0]}\n" in run.stdout
