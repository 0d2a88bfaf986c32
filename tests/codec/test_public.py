"""The public face of the codec: the example in its docstring, and that it stays light."""

from __future__ import annotations

import doctest
import subprocess
import sys

import kvtc_vllm.codec


def test_the_example_in_the_docstring_runs() -> None:
    result = doctest.testmod(kvtc_vllm.codec)
    assert result.attempted == 6
    assert result.failed == 0


def test_it_imports_neither_vllm_nor_triton() -> None:
    code = "import sys, kvtc_vllm.codec; print({'vllm', 'triton'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
