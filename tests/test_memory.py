import pytest

from mechsvd.engine import memory
from mechsvd.engine.memory import _free_in_cgroup

GiB = 2**30


def tree(root, files):
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


@pytest.mark.fault(46)
def test_a_containers_limit_of_version_2_counts_and_its_cache_is_free(tmp_path):
    root = tree(
        tmp_path,
        {
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/memory.max": f"{4 * GiB}\n",
            "sys/fs/cgroup/memory.current": f"{3 * GiB}\n",
            "sys/fs/cgroup/memory.stat": f"anon 5\ninactive_file {GiB}\nactive_file 7\n",
        },
    )
    assert _free_in_cgroup(root) == 2 * GiB


def test_the_tightest_of_nested_groups_counts(tmp_path):
    root = tree(
        tmp_path,
        {
            "proc/self/cgroup": "0::/user/job\n",
            "sys/fs/cgroup/user/memory.max": f"{2 * GiB}\n",
            "sys/fs/cgroup/user/memory.current": f"{GiB}\n",
            "sys/fs/cgroup/user/job/memory.max": "max\n",
            "sys/fs/cgroup/user/job/memory.current": f"{GiB}\n",
        },
    )
    assert _free_in_cgroup(root) == GiB


def test_a_limit_of_version_1_counts_where_the_host_path_is_not_seen_inside(tmp_path):
    root = tree(
        tmp_path,
        {
            "proc/self/cgroup": "5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n0::/\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{3 * GiB}\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{GiB}\n",
            "sys/fs/cgroup/memory/memory.stat": "inactive_file 1\ntotal_inactive_file 1024\n",
        },
    )
    assert _free_in_cgroup(root) == 2 * GiB + 1024


@pytest.mark.parametrize("limit", ["9223372036854771712", "garbage"])
def test_no_limit_is_none(tmp_path, limit):
    files = {
        "proc/self/cgroup": "4:memory:/\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": limit,
    }
    assert _free_in_cgroup(tree(tmp_path, files)) is None
    assert _free_in_cgroup(tmp_path / "nowhere") is None


@pytest.mark.fault(46)
def test_the_smaller_of_machine_and_container_is_free(monkeypatch):
    import torch

    for machine, container, free in ((8, 2, 2), (8, None, 8), (None, 2, 2), (None, None, 4 * GiB)):
        monkeypatch.setattr(memory, "_bytes_in", lambda *args, machine=machine: machine)
        monkeypatch.setattr(memory, "_free_in_cgroup", lambda root, container=container: container)
        assert memory.free_bytes(torch.device("cpu")) == free
