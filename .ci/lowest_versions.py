"""Prints the lowest version that pyproject.toml allows of each dependency, as pip constraints.

python .ci/lowest_versions.py [EXTRA ...]
"""

import re
import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
requirements = list(project["dependencies"])
for extra in sys.argv[1:]:
    requirements += project["optional-dependencies"][extra]
for requirement in requirements:
    match = re.match(r"([A-Za-z0-9_-]+)(?:\[[^]]*\])?>=([0-9.]+)", requirement)
    if match:
        print(f"{match[1]}=={match[2]}")
