"""The versions that an environment has, as a constraints file: `python -m tests.constraints > tests/constraints.txt`.

To be run in the environment of a green run.
"""

import platform
import re
from importlib.metadata import distribution

from packaging.requirements import Requirement


def closure(package: str, extras: tuple[str, ...] = ()) -> dict[str, str]:
    """All that a package needs here, by name, with the versions that are installed."""
    found: dict[str, str] = {}
    queue = [Requirement(f"{package}[{','.join(extras)}]")]
    done = set()
    while queue:
        wanted = queue.pop()
        if (key := (wanted.name.lower(), *sorted(wanted.extras))) in done:
            continue
        done.add(key)
        installed = distribution(wanted.name)
        # without the mark of a build, such as +cpu, which other machines have not
        found[re.sub(r"[-_.]+", "-", wanted.name).lower()] = installed.version.partition("+")[0]
        for line in installed.requires or ():
            needed = Requirement(line)
            contexts = [{"extra": extra} for extra in ("", *wanted.extras)]
            if needed.marker is None or any(needed.marker.evaluate(c) for c in contexts):
                queue.append(needed)
    return found


if __name__ == "__main__":
    versions = closure("mechsvd", ("test",))
    del versions["mechsvd"]
    print(f"# Versions that work together, from a green run on Python {platform.python_version()}:")
    print("# pip install -c tests/constraints.txt . (made by python -m tests.constraints)")
    for name, number in sorted(versions.items()):
        print(f"{name}=={number}")
