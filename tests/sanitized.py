"""A pytest plugin: the compiled CPU kernels under address and undefined-behaviour sanitizers. Run by hand, from the root:

    export LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0
    PYTHONPATH=tests:kernels:. python -m pytest -p sanitized tests/test_tree_call.py tests/test_decoder.py

Whatever they find ends the process with a report. The library is cached beside the usual one, under its own key.
"""

from specdec_kernels import build

build.FLAGS = (
    "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all",
    *("-O1" if flag == "-O2" else flag for flag in build.FLAGS),
)  # fmt: skip
