"""A server of its own process for benchmarks: started, watched from outside, stopped. Needs the `psutil` package."""

import json
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import psutil


class Server:
    """`mlx-dgemma serve` on a free port of this machine; use it as a context.

    Attributes:
        url: without a path.
        pid: the process's.
    """

    def __init__(self, *flags: str):
        self._flags = flags

    def __enter__(self) -> "Server":
        self._log = tempfile.NamedTemporaryFile("w+", suffix=".log")
        command = [sys.executable, "-m", "mlx_dgemma", "serve", "--port", "0", *self._flags]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=self._log)
        self.pid, self._watched = self._process.pid, psutil.Process(self._process.pid)
        while not (found := re.search(r"Listening on (http://[^/]+)/v1", self.log())):
            if self._process.poll() is not None:
                raise SystemExit(f"The server did not start:\n{self.log()}")
            time.sleep(0.1)
        self.url = found[1]
        self.get("/health")
        return self

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._log.close()

    def log(self) -> str:
        """What it wrote to stderr."""
        return Path(self._log.name).read_text(errors="replace")

    def text(self, path: str) -> str:
        """What stands at a path."""
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return answer.read().decode()

    def get(self, path: str) -> dict:
        """The JSON at a path."""
        return json.loads(self.text(path))

    def resident(self) -> int:
        """Bytes of memory that it has in use."""
        return self._watched.memory_info().rss

    def worked(self) -> float:
        """Seconds of processor time that it has used."""
        times = self._watched.cpu_times()
        return times.user + times.system

    def held(self) -> dict:
        """How many files and threads it has open."""
        return {"files": self._watched.num_fds(), "threads": self._watched.num_threads()}
