"""The command line run in this process, in another one, or in a shell."""

import subprocess
import sys

from click.testing import CliRunner

from mlx_dgemma.cli import main

LIMIT = 300  # seconds; a command takes so long only if it hangs


def run(*arguments, data=b""):
    return CliRunner().invoke(main.main, [str(one) for one in arguments], input=data, prog_name="mlx-dgemma")


def python(*arguments, **options):
    options = {"capture_output": True, "text": True, "stdin": subprocess.DEVNULL, "timeout": LIMIT} | options
    return subprocess.run([sys.executable, *arguments], check=False, **options)


def shell(command):
    return subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=LIMIT, check=False)
