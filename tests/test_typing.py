"""What a type checker sees of the package from outside."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import mechsvd as ms

SCRIPT = """
from pathlib import Path

import mechsvd as ms

model = ms.load_model()
task = ms.Task.from_text(model, "I believe")
writes = ms.collect_writes(model, [task], layers=[0], skip_bos=True)
svd: ms.Decomposition = ms.decompose(writes)
layers: tuple[ms.Decomposition, ...] = ms.decompose(writes, per_layer=True)
sweep: ms.RankSweep = ms.sweep_rank(model, task, svd, range(5), positions=[1], noise_floor=True)
text: str = ms.generate(model, "I", ms.keep(svd.subspace(3)), temperature=0.5)
texts: list[str] = ms.generate(model, "I", [None, ms.ablate(svd)])
stream: ms.WriteStream = ms.stream_writes(model, ["I"], context=9, shard=(0, 2), layers=[1])
streamed: ms.Decomposition = ms.merge([stream]).decompose(center=True)
per_site: tuple[ms.Decomposition, ...] = stream.decompose(per="site", scale="site")
loaded: ms.Ranking = ms.Ranking.load(Path("ranking.safetensors"))
attribution: ms.Attribution = ms.hessian_attribution(model, task, svd, basis="from_w", pairs=9)
attributions: ms.Attributions = ms.hessian_attribution(model, [task], svd)
pairs: ms.Interactions = ms.interactions(model, [task], svd, attribution, rows=4, layers=[0])
cards: ms.DirectionCards = ms.describe(model, svd, [0, 3], [task], layers=[1], seed=2)
found: ms.CriticalRank = ms.critical_rank(model, task, svd, criterion=ms.same_greedy_text)
"""
WRONG = {
    "ms.sweep_rank(model, task, svd, rank=[1])": 'Unexpected keyword argument "rank"',
    "ms.measure(model, task, [], layers='all')": 'incompatible type "str"',
    "ms.hessian_attribution(model, task, svd, basis='w')": 'No overload variant of "hessian_attribution"',
    "ms.rank_directions(model, task, svd, noise_floor=True)": 'keyword argument "noise_floor"',
    "ms.describe(model, svd, [0], task, direction=1)": 'Unexpected keyword argument "direction"',
    "ms.decompose(writes, per_layer=True).rank": 'has no attribute "rank"',
    "ms.stream_writes(model, 'a.txt', contxt=9)": 'Unexpected keyword argument "contxt"',
    "ms.Ranking.load('x').directions": '"Ranking" has no attribute "directions"',
}


def check(script, folder):
    """What mypy says; of other packages it sees nothing, which is faster."""
    (folder / "script.py").write_text(script)
    flags = ["--no-site-packages", "--follow-imports=silent"]
    flags += ["--ignore-missing-imports", "--config-file="]
    paths = {**os.environ, "MYPYPATH": str(Path(ms.__file__).parents[1])}
    command = [sys.executable, "-m", "mypy", *flags, "script.py"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=paths).stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("downstream")


def test_a_script_that_uses_the_package_type_checks(folder):
    assert "Success" in check(SCRIPT, folder)


def test_wrong_calls_are_found(folder):
    output = check(SCRIPT + "\n".join(WRONG), folder)
    for call, message in WRONG.items():
        assert message in output, (call, output)
    lines = {line.split(":")[1] for line in output.splitlines() if ": error:" in line}
    assert len(lines) == len(WRONG)  # an overloaded call may be wrong in two ways
