"""Importing mlx-lm leaves the process as it was."""

import subprocess
import sys

CHILD = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (1000, 1024))
import mlx_dgemma.engine
print(resource.getrlimit(resource.RLIMIT_NOFILE), resource.setrlimit.__module__)
"""


def test_a_low_limit_of_open_files_is_no_obstacle_and_stays():
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True)
    assert done.stdout == "(1000, 1024) resource\n"
