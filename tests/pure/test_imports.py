"""Which modules may be imported before a script starts: those whose import the script cannot have changed by then."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from fleet.worker.imports import imports_of


def early(folder: Path, source: str) -> list[str]:
    return list(imports_of(ast.parse(source), folder).early)


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("import numpy, os\nimport torch.nn as nn", ["numpy", "torch.nn"]),
        ("import requests\nfrom torch import nn", ["torch"]),
        ("try:\n    import pandas\nexcept ImportError:\n    pandas = None", ["pandas"]),
        ("import os\nrank = int(os.environ['RANK'])\nimport torch", ["torch"]),
        (
            "import os\nx = os.environ.get('A', 1), 'B' in os.environ, dict(os.environ), {**os.environ}\nimport torch",
            ["torch"],
        ),
        ("def main():\n    import torch\nmain()", ["torch"]),
        ("if __name__ == '__main__':\n    import torch", ["torch"]),
        ("import torch\nimport os\nos.environ['A'] = '1'", ["torch"]),
        ("import torch\nimport os\nos.environ['A'] = '1'\ndef f():\n    import torch", ["torch"]),
        ("import fleet, torch\nimport os\nos.environ['A'] = '1'", ["fleet", "torch"]),
        # What comes after a change is left to the script.
        ("import os\nos.environ['A'] = '1'\nimport torch", []),
        ("import numpy, os\nos.environ.setdefault('A', '1')\nimport torch", ["numpy"]),
        ("import os\nos.environ.update(A='1')\nimport torch", []),
        ("import os\nos.environ |= {'A': '1'}\nimport torch", []),
        ("import os\ndel os.environ['A']\nimport torch", []),
        ("import os\nchange(os.environ)\nimport torch", []),
        ("from os import environ as e\ne['A'] = '1'\nimport torch", []),
        ("from os import putenv\nimport torch", []),
        ("import os\nos.putenv('A', '1')\nimport torch", []),
        ("from dotenv import load_dotenv\nload_dotenv()\nimport torch", []),
        ("import sys\nsys.path.insert(0, 'vendored')\nimport torch", []),
        ("import sys\nsys.modules['torch'] = object()\nimport torch", []),
        ("import warnings\nwarnings.filterwarnings('ignore')\nimport pandas", []),
        ("def f():\n    import os\n    os.environ['A'] = '1'\nf()\nimport torch", []),
        # So is what is imported in a function of a script that changes anything at all.
        ("import os\ndef main():\n    import torch\nos.environ['A'] = '1'\nmain()", []),
        # `import fleet` imports no numpy, fleet.init() does.
        ("import fleet, os\nos.environ['OMP_NUM_THREADS'] = '1'\nfleet.init()", []),
        ("import collections", []),
        # What torch imports when the script makes its first optimizer or wrapper.
        ("import torch\nmodel = f()\ntorch.optim.SGD(model.parameters())", ["torch", "torch._dynamo"]),
        ("import torch\ndef f(m):\n    return torch.optim.SGD(m)", ["torch", "torch._dynamo"]),
        ("import torch\nfrom torch.optim import SGD", ["torch", "torch.optim", "torch._dynamo"]),
        ("from torch.nn.parallel import DistributedDataParallel as D", ["torch.nn.parallel", "torch._dynamo"]),
        ("from torch.distributed.fsdp import fully_shard", ["torch.distributed.fsdp", "torch._dynamo"]),
        ("import torch\nif f():\n    torch.optim.SGD(m)", ["torch"]),
        ("import torch\ntorch.optim.SGD(m)\nimport os\nos.environ['TORCHDYNAMO_DISABLE'] = '1'", ["torch"]),
        ("import numpy\nfrom optim import best", ["numpy"]),
        # What a script imports only in some cases.
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import pandas", []),
        ("try:\n    import fast\nexcept ImportError:\n    import pandas", []),
        ("def f(x):\n    if x:\n        import torch", []),
    ],
)
def test_what_a_script_cannot_have_changed(tmp_path: Path, source: str, names: list[str]) -> None:
    assert early(tmp_path, source) == names


def test_its_own_modules_count(tmp_path: Path) -> None:
    (tmp_path / "settings.py").write_text("import os\nos.environ['A'] = '1'\n")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("from .model import Net\n")
    (tmp_path / "package" / "model.py").write_text("import torch\nclass Net: pass\n")
    assert early(tmp_path, "import settings\nimport torch") == []
    assert early(tmp_path, "from package import Net\nimport settings") == ["torch"]
    assert early(tmp_path, "import settings\nfrom package import Net") == []


def test_a_module_of_that_name_beside_the_script_is_the_scripts(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("")
    assert early(tmp_path, "import numpy\nimport torch") == ["numpy"]
