"""The identity of a process is that of its code in memory: functions, constants and versions."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import types

import pytest

from paroquant_stream.execution import identity as module
from paroquant_stream.execution.identity import difference, identity
from paroquant_stream.store import format as store_format
from paroquant_stream.transform import quantize

SAID = "import json; from paroquant_stream.execution.identity import identity; "
SAID += "print(json.dumps(identity()))"
SOURCE = """
from functools import cached_property, partial
LIMIT = {"a": (1, frozenset("abc"))}
def decorated(function): return partial(function, 2)
def plain(a, b=3): return [a * each for each in range(b)]
@decorated
def wrapped(a): return a + 4
class Thing:
    size = 5
    def method(self): return 6
    @property
    def read(self): return 7
    @cached_property
    def once(self): return 8
    @staticmethod
    def static(): return 9
"""


def test_another_process_of_the_same_code_has_the_same_identity():
    answer = subprocess.run([sys.executable, "-c", SAID], capture_output=True, check=True).stdout
    assert len(json.loads(answer)["modules"]) > 20
    assert difference(identity(), answer) is None


@pytest.mark.parametrize("name", ["python", "version", "transform", "path"])
def test_another_version_or_place_is_named(name):
    found = identity() | {name: "another"}
    text = difference(identity(), json.dumps(found).encode())
    assert text.startswith(f"{name}: expected ")
    assert text.endswith("found another")


@pytest.mark.parametrize("answer", [b"", b"[1]", b"{}", b'{"modules": 1}', b"\xff"])
def test_what_is_no_identity_differs(answer):
    assert difference(identity(), answer) == "it answers something else"


def test_a_worker_without_a_module_that_decides_differs():
    found = identity()
    del found["modules"]["paroquant_stream.transform.unit_pool"]
    assert "unit_pool is not what" in difference(identity(), json.dumps(found).encode())


def test_a_module_that_only_this_process_has_is_no_difference():
    more = copy.deepcopy(identity())
    more["modules"]["paroquant_stream.store.later"] = "0"
    assert difference(more, json.dumps(identity()).encode()) is None


def test_a_replaced_function_differs(monkeypatch):
    before = json.dumps(identity()).encode()
    monkeypatch.setattr(quantize, "quantize_rows", lambda *_: None)
    assert difference(identity(), before).startswith("paroquant_stream.transform.quantize is not")


def test_a_replaced_constant_differs(monkeypatch):
    before = json.dumps(identity()).encode()
    monkeypatch.setattr(store_format, "ENTRY_FORMAT", 9)
    assert difference(identity(), before).startswith("paroquant_stream.store.format is not")


def digest(source: str) -> str:
    made = types.ModuleType("made")
    exec(source, vars(made))
    return module._digest(made)  # private: it takes a module of any code


@pytest.mark.parametrize("digit", range(1, 10))
def test_every_place_of_code_counts(digit):
    assert digest(SOURCE) == digest(SOURCE)
    assert digest(SOURCE) != digest(SOURCE.replace(str(digit), "0"))


def test_a_name_from_elsewhere_and_a_line_number_do_not_count():
    more = "\n\nfrom os.path import join\nimport numpy\nstate = {}\n"
    assert digest(more + SOURCE) == digest(SOURCE)


def test_what_functools_wraps_counts():
    sources = [
        f"import functools\n@functools.cache\ndef function(): return {n}\n" for n in range(2)
    ]
    assert len({digest(source) for source in sources}) == 2
